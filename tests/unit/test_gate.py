"""The parts of offline evaluation that need no MLflow: rows, cases, the decision, its reports, recorded tools."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree as Xml

import pytest
from agents import Agent, function_tool

from gateway.errors import ConfigurationError
from gateway.evaluation.offline.cases import (
    Case,
    CaseState,
    Verdict,
    metrics_of,
    score_decides,
    score_of,
    scorers_of_score,
    state_of,
)
from gateway.evaluation.offline.conversations import conversation
from gateway.evaluation.offline.evaluate import Result
from gateway.evaluation.offline.gate import Check, Decision, Threshold, Wanted, decide, interval, read_threshold
from gateway.evaluation.offline.replay import Replay, cannot_replay, recorded_calls, replayed
from gateway.evaluation.offline.reporting import junit, markdown, verdict_line
from gateway.evaluation.offline.rows import read_dataset

from .traces import Call, trace


def case(
    number: int, state: CaseState = "passed", score: float | None = None, key: str | None = None, **fields: Any
) -> Case:
    """Return a case; its key is its number unless told otherwise."""
    reasons = [] if state == "passed" else ["no_tool_errors: the tool failed"]
    asked = {"messages": [{"role": "user", "content": f"Question {number}?"}]}
    known: dict[str, Any] = {"inputs": asked, "outputs": None, "expectations": {}, "verdicts": []} | fields
    return Case(
        number=number, key=key or str(number), place=f"rows.jsonl:{number}", replay="live", state=state,
        reasons=reasons, score=score, **known,
    )  # fmt: skip


def run_of(passes: Sequence[bool]) -> list[Case]:
    """Return the cases of a run, by whether each passed."""
    return [case(number, "passed" if passed else "failed") for number, passed in enumerate(passes, start=1)]


def decided(cases: list[Case], baseline: list[Case] | None = None, **wanted: Any) -> Decision:
    """Return what the gate says of cases, by their own metrics."""
    return decide(Wanted(**wanted), metrics_of(cases), cases, baseline)


# Rows


def written(folder: Path, name: str, text: str) -> str:
    """Write a file of rows and return its path."""
    (folder / name).write_text(text)
    return str(folder / name)


def test_rows_of_a_jsonl_file(tmp_path: Path) -> None:
    """A row has messages or one question under any name; what is expected may stand together or a field each."""
    path = written(
        tmp_path,
        "rows.jsonl",
        '{"inputs": {"messages": [{"role": "user", "content": "a"}]}, "expectations": {"expected_response": "1"}}\n'
        "\n"
        '{"inputs": {"question": "b"}, "expected_facts": ["2"], "rubric": "short"}\n'
        '{"question": "c", "tags": {"agent": "support"}}\n',
    )
    dataset = read_dataset(path, "math")
    assert [row.messages[0]["content"] for row in dataset.rows] == ["a", "b"]
    assert [row.expectations for row in dataset.rows] == [
        {"expected_response": "1"},
        {"expected_facts": ["2"], "rubric": "short"},
    ]
    assert (dataset.name, dataset.passed_over) == ("rows.jsonl", 1)
    assert dataset.version != read_dataset(written(tmp_path, "other.jsonl", '{"question": "a"}'), "math").version


def test_rows_of_a_csv_file(tmp_path: Path) -> None:
    """A spreadsheet's file will do: text columns, JSON where a cell holds it, line breaks in quotes, empty cells."""
    path = written(
        tmp_path,
        "rows.csv",
        '\ufeffquestion,expected_response,expected_facts\n"Two\nlines, and a comma",4,"[""a"", ""b""]"\nAnother,,\n',
    )
    rows = read_dataset(path, "math").rows
    assert [row.messages[0]["content"] for row in rows] == ["Two\nlines, and a comma", "Another"]
    assert [row.expectations for row in rows] == [{"expected_response": "4", "expected_facts": ["a", "b"]}, {}]
    assert [row.place.rpartition(":")[2] for row in rows] == ["2", "4"]


def test_rows_of_an_exported_dataset(tmp_path: Path) -> None:
    """A row that came from a trace still knows it, and how it is to be replayed; its answer may be any JSON."""
    fields = {
        "inputs": {"messages": [{"role": "user", "content": "a"}]},
        "outputs": "It is fine.",
        "tags": {"gateway.replay": "recorded_tools", "agent": "math"},
        "source": {"source_type": "TRACE", "source_data": {"trace_id": "tr-1"}},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(fields))
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerow({name: json.dumps(value) for name, value in fields.items()})
    for name in ("rows.jsonl", "rows.csv"):
        [row] = read_dataset(str(tmp_path / name), "math").rows
        assert (row.trace_id, row.replay, row.outputs) == ("tr-1", "recorded_tools", "It is fine.")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("r.jsonl", '{"question": "a"}\n{"question": }\n', r"r\.jsonl:2: this is not JSON"),
        ("r.jsonl", "[1]\n", r"r\.jsonl:1: a row is a JSON object"),
        ("r.jsonl", '{"outputs": "x"}\n', r"r\.jsonl:1: a row needs either"),
        ("r.jsonl", '{"question": "a", "expected": "4"}\n', r"r\.jsonl:1: there is no field expected;"),
        ("r.jsonl", '{"inputs": {"a": "x", "b": "y"}}\n', r"r\.jsonl:1: `inputs` has a, b"),
        ("r.jsonl", '{"inputs": {"messages": []}}\n', r"r\.jsonl:1: `messages` is a list"),
        ("r.jsonl", '{"inputs": {"messages": [{"role": "bot", "content": "x"}]}}\n', r":1: messages\[0\] needs a role"),
        (
            "r.jsonl",
            '{"question": "a", "tags": {"gateway.replay": "later"}}\n',
            r":1: the tag gateway.replay is 'later'",
        ),
        ("r.jsonl", '{"question": "a", "tags": {"gateway.replay": "recorded_answer"}}\n', ":1: .* has no `outputs`"),
        ("r.csv", "question\na\nb,c\n", r"r\.csv:3: the row has 2 cells, the header 1"),
        ("r.csv", "frage\na\n", r"r\.csv:1: the header has neither"),
        ("r.csv", "inputs\nplain text\n", r"r\.csv:2: the cell of inputs is not JSON"),
        ("r.csv", 'question\n"a\n', r"r\.csv:\d: this is not CSV"),
        ("r.jsonl", "", "is empty"),
        ("r.jsonl", '{"question": "a", "tags": {"agent": "support"}}\n', "No row .* they are for support"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path: Path, name: str, text: str, said: str) -> None:
    """What is wrong with a file is said with the line, before anything runs."""
    with pytest.raises(ConfigurationError, match=said):
        read_dataset(written(tmp_path, name, text), "math")


# Cases


@pytest.mark.parametrize(
    ("error", "verdicts", "score", "state"),
    [
        (None, [Verdict("a", True, True), Verdict("b", "text", None)], None, "passed"),
        (None, [Verdict("a", True, True), Verdict("b", False, False)], None, "failed"),
        (None, [Verdict("a", True, True)], 3.0, "failed"),
        (None, [], 4.0, "passed"),
        (None, [Verdict("a", True, True), Verdict("b", None, None, error="boom")], None, "error"),
        (None, [Verdict("a", False, False), Verdict("b", None, None, error="boom")], None, "failed"),
        (None, [Verdict("a", "text", None)], None, "error"),
        (None, [], None, "error"),
        ("the model failed", [Verdict("a", False, False)], None, "error"),
    ],
)
def test_the_state_of_a_case(error: str | None, verdicts: list[Verdict], score: float | None, state: str) -> None:
    """A case passes only if something was said of it, and nothing against it; what cannot be said is an error."""
    found, reasons = state_of(error, verdicts, score, 3.5)
    assert found == state
    assert bool(reasons) is (state != "passed")


def test_the_average_score_is_of_quality_where_it_ran() -> None:
    """The quality judge gives the score, as a text too; without it all numbers do, and verdicts are no numbers."""
    judged = [Verdict("quality", "4", None), Verdict("words", 40, None), Verdict("fits", True, True)]
    assert scorers_of_score(["quality", "words"], [judged]) == ["quality"]
    assert score_of(judged, ["quality"]) == 4.0
    assert scorers_of_score(["words", "fits"], [judged[1:]]) == ["words"]
    assert score_of([Verdict("fits", True, True), Verdict("nan", "nan", None)], ["fits", "nan"]) is None


def test_a_score_on_an_unknown_scale_decides_where_nothing_else_does() -> None:
    """The quality judge's score decides, as one does that was asked for; other numbers give way to verdicts."""
    verdict, number = Verdict("exact", True, True), Verdict("similarity", 0.9, None)
    assert score_decides(["quality"], [verdict], is_asked_for=False)
    assert score_decides(["similarity"], [number, verdict], is_asked_for=True)
    assert score_decides(["similarity"], [number], is_asked_for=False)
    assert not score_decides(["similarity"], [number, verdict], is_asked_for=False)


def test_the_metrics_of_a_run() -> None:
    """The states add up to the cases, errors count against the pass rate, and scorers have shares of their own."""
    said = [Verdict("exact", True, True), Verdict("quality", "5", None)]
    cases = [case(1, score=5.0, verdicts=said, duration_s=1.0), case(2, "failed"), case(3, "error"), case(4)]
    found = metrics_of(cases)
    assert [found[name] for name in ("total_cases", "passed_cases", "failed_cases", "error_cases")] == [4, 2, 1, 1]
    assert (found["pass_rate"], found["average_score"]) == (0.5, 5.0)
    assert (found["exact/pass_rate"], found["quality/mean"], found["latency_p95_s"]) == (1.0, 5.0, 1.0)
    assert "exact/mean" not in found


def test_the_quality_judge(shipped_scorers) -> None:
    """It grades from 1 to 5, from what was asked, what was answered and what was expected."""
    judge = shipped_scorers("quality").quality
    assert judge.feedback_value_type == Literal["1", "2", "3", "4", "5"]
    assert judge.template_variables == {"inputs", "outputs", "expectations"}
    assert not judge.is_session_level_scorer


# The decision


def test_the_defaults_of_the_gate() -> None:
    """A pass rate of 0.80 and a mean score of 3.5 pass; just below either fails, and the reason has the figures."""
    good = [*run_of([True] * 4), case(5, "failed")]
    assert decided(good).passed
    bad = [*run_of([True] * 3), case(4, "failed"), case(5, "error")]
    assert verdict_line(decided(bad)) == "✗ OVERALL: FAIL - pass_rate >= 0.8: 0.6"
    assert decided([case(1, score=3.0), case(2, score=4.0)]).passed
    assert decided([case(1, score=3.0), case(2, score=3.9)]).reason == "average_score >= 3.5: 3.45"
    assert verdict_line(decided(good)) == "✓ OVERALL: PASS"


def test_a_score_that_nobody_gave() -> None:
    """Without any number the default threshold is left out and said so; one that was asked for fails."""
    decision = decided(run_of([True]))
    assert decision.passed
    assert "no scorer gave a number" in decision.notes[0]
    assert not decided(run_of([True]), score=3.0).passed


def test_other_metrics() -> None:
    """Any metric can be asked for, at least or at most; one that was not measured fails."""
    cases = [case(1, duration_s=2.0), case(2, duration_s=4.0)]
    assert decided(cases, others=[Threshold("latency_p95_s", "<=", 4)]).passed
    assert not decided(cases, others=[Threshold("latency_mean_s", "<=", 2)]).passed
    assert "not measured" in decided(cases, others=[Threshold("total_tokens", "<=", 2)]).reason


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("exact_match/mean>=0.9", Threshold("exact_match/mean", ">=", 0.9)),
        (" latency_p95_s <= 10 ", Threshold("latency_p95_s", "<=", 10)),
        ("length/p90>=1", Threshold("length/p90", ">=", 1)),
        ("length/pass_rate>=1", Threshold("length/pass_rate", ">=", 1)),
    ],
)
def test_thresholds_are_read(text: str, read: Threshold) -> None:
    """A threshold is a metric of the run or of a scorer, a comparison and a number."""
    assert read_threshold(text, {"exact_match": ["mean"], "length": ["p90"]}) == read


@pytest.mark.parametrize(
    "text", ["exact_match/mean", "exact_match/mean>0.9", "exact_match/mean>=high", "exact/mean>=1", "nothing>=1",
             "exact_match/p90>=1", "pass_rate>=nan"],
)  # fmt: skip
def test_thresholds_that_cannot_be_meant(text: str) -> None:
    """A metric that will not be measured, or no number, is refused before anything runs."""
    with pytest.raises(ConfigurationError, match="--metric"):
        read_threshold(text, {"exact_match": ["mean"]})


def test_the_interval_is_students() -> None:
    """Mean ± t · s / √n: for 1 to 5 that is 3 ± 1.963; one value has no interval."""
    found = interval([1, 2, 3, 4, 5])
    assert found.mean == 3
    assert found.high - 3 == pytest.approx(1.9632, abs=1e-4)
    assert interval([1.0]).high == math.inf


def test_the_baseline_is_compared_by_question() -> None:
    """Worse fails, equal and better pass, whatever the order of the questions."""
    good, bad = run_of([True] * 14), run_of([True] * 5 + [False] * 9)
    assert decided(good, good).passed
    assert decided(good, bad).passed
    assert not decided(bad, good, pass_rate=0.0).passed
    assert decided(list(reversed(good)), good).passed
    again = [case(1, key="same"), case(2, "failed", key="same")]
    assert decided(again, again, pass_rate=0.0).passed


def test_a_baseline_with_too_few_cases_to_tell() -> None:
    """A drop that may be chance passes and says so; with `strict` it fails."""
    before, now = run_of([True] * 14), run_of([True] * 12 + [False] * 2)
    [check] = [each for each in decided(now, before).checks if "baseline" in each.name]
    assert check.passed
    assert "not clear" in check.found
    assert not decided(now, before, is_strict=True).passed
    assert decided(before, before, is_strict=True).passed


def test_the_scores_are_compared_with_the_baseline() -> None:
    """A loss of points beyond the margin fails; one within it passes; without scores it is left out and noted."""
    before = [case(number, score=5.0) for number in range(1, 9)]
    assert not decided([case(number, score=4.0) for number in range(1, 9)], before).passed
    assert decided([case(number, score=4.8) for number in range(1, 9)], before).passed
    assert any("average_score is not compared" in note for note in decided(run_of([True] * 8), before).notes)


# Reports


def result_of(cases: list[Case]) -> Result:
    """Return the result of a run with these cases."""
    names = ("agent", "agent_version", "dataset", "dataset_version", "assistant_model", "judge_model")
    return Result("run-1", dict.fromkeys(names, "x"), metrics_of(cases), cases, [], [])


def test_junit() -> None:
    """JUnit has a test a check and a test a case, told apart by failure and error; no character breaks the file."""
    odd = case(2, "failed", inputs={"messages": [{"role": "user", "content": "<b>\x00 & \ud800?"}]})
    cases = [case(1), odd, case(3, "error")]
    root = Xml.fromstring(junit(result_of(cases), decided(cases)))
    gate, tested = root.findall("testsuite")
    assert (gate.get("tests"), gate.get("failures")) == ("1", "1")
    assert [tested.get(name) for name in ("tests", "failures", "errors")] == ["3", "1", "1"]
    assert [[child.tag for child in test] for test in tested] == [[], ["failure"], ["error"]]
    assert "the tool failed" in str(tested[1][0].get("message"))


def test_markdown() -> None:
    """The summary has the verdict, the checks and what failed; what people wrote cannot break the table."""
    odd = case(1, "failed", inputs={"messages": [{"role": "user", "content": "a | b\n@team `x`"}]})
    text = markdown(result_of([odd]), decided([odd]))
    assert "✗ OVERALL: FAIL" in text
    assert "a \\| b @\u200bteam \\`x\\`" in text
    assert "the tool failed" in text
    assert all(line.count("|") - line.count("\\|") == 5 for line in text.splitlines() if line.startswith("| rows"))


def test_the_reason_of_a_decision() -> None:
    """A failure is explained by what failed, a pass by what was checked."""
    checks = [Check("a >= 1", True, "2"), Check("b >= 1", False, "0")]
    assert Decision(checks).reason == "b >= 1: 0"
    assert Decision(checks[:1]).reason == "a >= 1: 2"


# Recorded tools


@function_tool
async def look_up(email: str, limit: int | None = None) -> str:
    """Look somebody up, which must not happen in a replay."""
    raise AssertionError("the tool itself ran")


def test_recorded_calls_are_given_out_in_order() -> None:
    """Equal calls give their results in order, the last one again; what makes no difference finds them too."""
    recorded = trace(
        "find <EMAIL:x7qa>",
        "done",
        Call("look_up", {"email": "<EMAIL:x7qa>"}, "nobody"),
        Call("look_up", {"email": "<EMAIL:x7qa>"}, "Ann"),
        Call("look_up", {"email": "bob", "limit": 2}, "Bob"),
    )
    replay = Replay(recorded_calls(recorded))
    given = ['{"email": "<EMAIL:x7qa>"}', '{"email": " <email:X7QA>", "limit": null}', '{"email": "<EMAIL:x7qa>"}']
    assert [replay.call("look_up", each) for each in given] == ["nobody", "Ann", "Ann"]
    assert replay.call("look_up", '{"limit": 2.0, "email": "Bob"}') == "Bob"
    assert replay.missed == []
    replay.call("look_up", '{"email": "carl"}')
    replay.call("delete_all", "{}")
    assert replay.missed == ["look_up", "delete_all"]


def test_a_recorded_failure_tells_the_model_what_it_was_told() -> None:
    """A call that failed then gives the same text now, or its reason if that is not on the trace."""
    recorded = trace("a", "b", Call("x", {}, "Sorry: gone", error="gone"), Call("y", {}, None, error="away"))
    replay = Replay(recorded_calls(recorded))
    assert replay.call("x", "{}") == "Sorry: gone"
    assert replay.call("y", "{}") == "Error: away"


def test_what_cannot_be_replayed() -> None:
    """Tools that are no functions, and handoffs that code decides on, would run for real: it is said which."""
    other = Agent(name="other", tools=[look_up])
    agent = Agent(name="desk", tools=[look_up], handoffs=[other])
    other.handoffs = [agent]
    assert cannot_replay(agent) is None
    copied = replayed(agent)
    assert copied.tools[0].on_invoke_tool is not look_up.on_invoke_tool  # type: ignore[union-attr]
    assert copied.handoffs[0].handoffs[0] is copied  # type: ignore[union-attr]
    assert agent.tools[0] is look_up
    other.handoffs = [Agent(name="third", mcp_servers=[object()])]  # type: ignore[list-item]
    assert "third has tools of MCP servers" in str(cannot_replay(agent))


# Conversations


def test_a_conversation_from_a_row() -> None:
    """Each earlier turn of a row becomes a trace with its question, answer and calls; the run's own is the last."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 1})}}
    history = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "2"},
        {"role": "assistant", "content": "It is 2."},
        {"role": "user", "content": "two"},
    ]
    last = trace("two", "fine")
    earlier, now = conversation(history, last, "math", "s-1")
    root, tool = earlier.data.spans
    assert (root.inputs["messages"][0]["content"], root.outputs["messages"][0]["content"]) == ("one", "It is 2.")
    assert (tool.name, tool.span_type, tool.inputs, tool.outputs) == ("add", "TOOL", {"a": 1}, 2)
    assert earlier.info.request_time < now.info.request_time
    assert now is last
    assert conversation(history[:1], last, "math", "s-1") == [last]
