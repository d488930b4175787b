"""What people and machines are told: a table in the terminal, a Markdown summary, JUnit for the CI system."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gateway.evaluation.offline.cases import Case
from gateway.evaluation.offline.evaluate import Evaluation, Result
from gateway.evaluation.offline.gate import Decision
from gateway.evaluation.offline.rows import ReplayKind
from gateway.tracing.messages import text_of

PASSED = "✓ OVERALL: PASS"
FAILED = "✗ OVERALL: FAIL"

_HOW: dict[ReplayKind, str] = {
    "live": "answered live",
    "recorded_tools": "answered with recorded tool results",
    "recorded_answer": "scored by the recorded answer",
}
_MOST_SHOWN = 20
_QUESTION_CHARACTERS = 60
_REASON_CHARACTERS = 200
# What XML 1.0 has no form for, not even an escaped one.
_NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def verdict_line(decision: Decision) -> str:
    """Return the last line of a gate."""
    return PASSED if decision.passed else f"{FAILED} - {decision.reason}"


def announce(evaluation: Evaluation, console: Console) -> None:
    """Say what is about to be run."""
    predictor, dataset = evaluation.predictor, evaluation.dataset
    model = "its offline model, no language model" if predictor.model.offline else predictor.model.name
    console.print(
        Text(f"{predictor.plugin.name} ({model}) on {dataset.name}, version {dataset.version}:"), soft_wrap=True
    )
    console.print(
        Text(f"{len(evaluation.keys)} cases, {_ways(evaluation.replays)}; {len(evaluation.selection.all)} scorers"),
        soft_wrap=True,
    )
    for note in evaluation.notes:
        console.print(Text(f"Note: {note}"), soft_wrap=True)


def show(result: Result, console: Console) -> None:
    """Show what came of a run: scorers, cases that did not pass, totals."""
    console.print(_scorer_table(result.cases))
    bad = [case for case in result.cases if case.state != "passed"]
    for case in bad[:_MOST_SHOWN]:
        console.print(Text(f"{case.state.upper():6} {case.place}: {question(case)!r}"), soft_wrap=True)
        console.print(Text(f"       {_short('; '.join(case.reasons), _REASON_CHARACTERS)}"), soft_wrap=True)
    if len(bad) > _MOST_SHOWN:
        console.print(Text(f"and {len(bad) - _MOST_SHOWN} more; all are artifacts of the run, under results/"))
    console.print(Text(totals(result)), soft_wrap=True)
    if (spent := judges_spent(result.metrics)) is not None:
        console.print(Text(spent), soft_wrap=True)
    console.print(Text(f"MLflow run {result.run_id}"), soft_wrap=True)


def totals(result: Result) -> str:
    """Return the run's figures in one line."""
    metrics = result.metrics
    parts = [f"{metrics[name]:.0f} {name.removesuffix('_cases')}" for name in _COUNTS]
    parts.append(f"pass rate {metrics['pass_rate']:.3f}")
    if result.score_from:
        parts.append(f"average score {metrics['average_score']:.2f} (from {', '.join(result.score_from)})")
    else:
        parts.append("no average score: no scorer gave a number")
    return ", ".join(parts)


def judges_spent(metrics: Mapping[str, float]) -> str | None:
    """Return what the judges took in one line; ``None``: none was asked, or nobody counted."""
    if not metrics.get("judge_calls"):
        return None
    calls, tokens_in, tokens_out = (metrics[f"judge_{name}"] for name in ("calls", "input_tokens", "output_tokens"))
    cost_usd = metrics.get("judge_cost_usd")
    cost = "at a price that is not known" if cost_usd is None else f"{cost_usd:.6f} USD"
    return f"judges: {calls:.0f} calls, {tokens_in:.0f} tokens in, {tokens_out:.0f} tokens out, {cost}"


def show_decision(decision: Decision, console: Console) -> None:
    """Show what a gate says, and why."""
    for note in decision.notes:
        console.print(Text(f"Note: {note}"), soft_wrap=True)
    for check in decision.checks:
        console.print(Text(f"{'✓' if check.passed else '✗'} {check}"), soft_wrap=True)
    console.print(Text(verdict_line(decision), "bold green" if decision.passed else "bold red"), soft_wrap=True)


def question(case: Case) -> str:
    """Return the last thing that the user says in a case, shortened."""
    messages = case.inputs.get("messages", ()) if isinstance(case.inputs, dict) else ()
    asked = [each for each in messages if isinstance(each, dict) and each.get("role") == "user"]
    return _short(text_of(asked[-1].get("content")) if asked else "", _QUESTION_CHARACTERS)


def markdown(result: Result, decision: Decision) -> str:
    """Return the summary of a gate, for people who look at a pull request."""
    return "\n".join(_markdown_lines(result, decision)) + "\n"


def junit(result: Result, decision: Decision) -> str:
    """Return the gate as JUnit's XML: a test a check, and a test a case."""
    suites = Xml.Element("testsuites")
    name = f"{result.params['agent']} on {result.params['dataset']}"
    checks = _suite(suites, f"gate: {name}", len(decision.checks), sum(not each.passed for each in decision.checks), 0)
    for check in decision.checks:
        test = Xml.SubElement(checks, "testcase", classname="gate", name=_xml(check.name))
        if not check.passed:
            Xml.SubElement(test, "failure", message=_xml(check.found))
    states = [case.state for case in result.cases]
    cases = _suite(suites, f"cases: {name}", len(states), states.count("failed"), states.count("error"))
    for case in result.cases:
        test = Xml.SubElement(
            cases,
            "testcase",
            classname=_xml(f"{result.params['agent']}.{result.params['dataset']}"),
            name=_xml(f"{case.number}: {question(case)}"),
            time=f"{case.duration_s or 0:.3f}",
        )
        if case.state != "passed":
            kind = "failure" if case.state == "failed" else "error"
            detail = Xml.SubElement(test, kind, message=_xml(_short("; ".join(case.reasons), _REASON_CHARACTERS)))
            detail.text = _xml("\n".join([case.place, *case.reasons, f"trace {case.trace_id}"]))
    Xml.indent(suites)
    return Xml.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def write_reports(folder: Path, result: Result, decision: Decision) -> list[Path]:
    """Write ``junit.xml`` and ``summary.md`` into the folder, which is made if it is not there; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"junit.xml": junit(result, decision), "summary.md": markdown(result, decision)}
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


_COUNTS = ("total_cases", "passed_cases", "failed_cases", "error_cases")


def _ways(replays: Mapping[ReplayKind, int]) -> str:
    return ", ".join(f"{count} {_HOW[kind]}" for kind, count in replays.items())


def _scorer_table(cases: Sequence[Case]) -> Table:
    table = Table("scorer", "passed", "failed", "no verdict", "in error", "mean")
    for name, cells in _by_scorer(cases):
        table.add_row(Text(name), *(Text(cell) for cell in cells))
    return table


def _by_scorer(cases: Sequence[Case]) -> Iterator[tuple[str, list[str]]]:
    for name in sorted({each.name for case in cases for each in case.verdicts}):
        said = [each for case in cases for each in case.verdicts if each.name == name]
        numbers = [each.number for each in said if each.number is not None]
        counts = [
            sum(each.passed is True for each in said),
            sum(each.passed is False for each in said),
            sum(each.passed is None and each.error is None for each in said),
            sum(each.error is not None for each in said),
        ]
        yield name, [*map(str, counts), f"{sum(numbers) / len(numbers):.3g}" if numbers else ""]


def _markdown_lines(result: Result, decision: Decision) -> Iterator[str]:
    params = result.params
    yield f"## {'✓' if decision.passed else '✗'} {_cell(params['agent'])} on {_cell(params['dataset'])}"
    yield ""
    yield f"**{_cell(verdict_line(decision))}**"
    yield ""
    yield f"{_cell(totals(result))}."
    yield ""
    yield "| | check | measured |"
    yield "|---|---|---|"
    for check in decision.checks:
        yield f"| {'✓' if check.passed else '✗'} | {_cell(check.name)} | {_cell(check.found)} |"
    yield ""
    yield "| scorer | passed | failed | no verdict | in error | mean |"
    yield "|---|---|---|---|---|---|"
    for name, cells in _by_scorer(result.cases):
        yield f"| {_cell(name)} | {' | '.join(cells)} |"
    bad = [case for case in result.cases if case.state != "passed"]
    if bad:
        yield ""
        yield "| case | | question | why |"
        yield "|---|---|---|---|"
        for case in bad[:_MOST_SHOWN]:
            why = _short("; ".join(case.reasons), _REASON_CHARACTERS)
            yield f"| {_cell(case.place)} | {case.state} | {_cell(question(case))} | {_cell(why)} |"
    if len(bad) > _MOST_SHOWN:
        yield f"\nAnd {len(bad) - _MOST_SHOWN} more."
    yield ""
    for note in (*result.notes, *decision.notes):
        yield f"- {_cell(note)}"
    if (spent := judges_spent(result.metrics)) is not None:
        yield f"- {spent}"
    yield f"- model {_cell(params['assistant_model'])}, judge {_cell(params['judge_model'])}, dataset version "
    yield f"  {_cell(params['dataset_version'])}, agent version {params['agent_version']}, MLflow run {result.run_id}"


def _suite(suites: Xml.Element, name: str, tests: int, failures: int, errors: int) -> Xml.Element:
    counts: dict[str, Any] = {"tests": str(tests), "failures": str(failures), "errors": str(errors)}
    return Xml.SubElement(suites, "testsuite", name=_xml(name), **counts)


def _short(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)


def _cell(text: str) -> str:
    """Return a text that cannot break a table, nor be taken for markup: it holds what people and models wrote."""
    line = " ".join(text.split())
    return re.sub(r"([\\`*_{}\[\]<>|#!~])", r"\\\1", line).replace("@", "@\u200b")
