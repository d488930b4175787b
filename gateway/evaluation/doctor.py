"""What only the data tells: scorers that wait for spans which never come, records that nothing can be asked of.

``gateway doctor`` looks at MLflow's latest traces, at the datasets, and at files of records. It writes nothing.
"""

import inspect
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlflow import MlflowClient
from mlflow.entities import Trace as MlflowTrace
from mlflow.exceptions import MlflowException
from mlflow.genai.judges.instructions_judge import InstructionsJudge
from mlflow.genai.scorers.base import Scorer, flatten_scorers
from mlflow.genai.scorers.builtin_scorers import BuiltInScorer, MissingColumnsException
from mlflow.tracing.constant import TraceMetadataKey

from gateway.errors import ConfigurationError
from gateway.evaluation.applicability import (
    NO_RETRIEVAL,
    NO_TOOL_CALL,
    expectations_of,
    why_not_session,
    why_not_trace,
)
from gateway.evaluation.catalog import find_scorers, runs_live
from gateway.evaluation.filters import TraceFacts, why_not
from gateway.evaluation.mistakes import (
    Finding,
    is_file_store,
    mistakes_of_scorers,
    mistakes_of_settings,
    of_artifacts,
)
from gateway.evaluation.scoring import LiveScorer
from gateway.rules import ScorerFilter, ScorerRule
from gateway.settings import Settings, config_path
from gateway.toml_lines import place_of

LATEST = 200
"""Traces that are looked at: enough to have met what is usual, read in a second or two."""

_SESSION_KEYS = frozenset(
    {
        "session.id",
        "session_id",
        "sessionId",
        "mlflow.session",
        TraceMetadataKey.TRACE_SESSION,
        "gen_ai.conversation.id",
    }
)


class Record(NamedTuple):
    """One record of a dataset or of a file, with where it stands."""

    place: str
    content: Any
    """A dictionary, if it is as it must be."""


def examine(settings: Settings, files: Sequence[Path] = (), away: str | None = None) -> list[Finding]:
    """Return all that is wrong with the scorers, the traces, the datasets and files of records. Blocks.

    MLflow must be configured (`gateway.evaluation.store.configure_mlflow`).

    Args:
        settings: those of the evaluator.
        files: JSON Lines files of records; with them the ``golden.jsonl`` of each agent is looked at.
        away: why MLflow cannot be asked; ``None`` if it can be.
    """
    scorers: list[LiveScorer] = []
    findings: list[Finding] = []
    try:
        scorers = list(find_scorers(settings).values())
    except ConfigurationError as error:
        findings = [Finding("error", "scorers", line, "") for line in str(error).splitlines()]
    live = [each for each in scorers if runs_live(each)]
    findings += [*mistakes_of_scorers(live), *mistakes_of_settings(settings, live)]
    if away is not None:
        findings.append(Finding("error", "MLflow", f"it cannot be asked. {away}", ""))
    elif not is_file_store(settings.mlflow_tracking_uri):
        findings += _in_mlflow(settings, live, scorers)
    for file in (*sorted(settings.agents_dir.glob("*/golden.jsonl")), *files):
        findings += of_records(str(file), read_records(file), scorers)
    return findings


def _in_mlflow(settings: Settings, live: list[LiveScorer], scorers: list[LiveScorer]) -> list[Finding]:
    client = MlflowClient()
    try:
        experiment = client.get_experiment_by_name(settings.mlflow_experiment)
    except Exception as error:  # noqa: BLE001 - whatever it is, MLflow cannot be asked
        fix = "Start `gateway serve`, or mend GATEWAY_MLFLOW_TRACKING_URI."
        return [Finding("error", "MLflow", f"it cannot be asked: {str(error).splitlines()[0]}.", fix)]
    if experiment is None:
        return [_no_traces(settings.mlflow_experiment)]
    location = str(experiment.artifact_location)
    findings = of_artifacts(location, os.environ, f"MLflow's experiment {experiment.name}")
    traces = client.search_traces(
        locations=[experiment.experiment_id], max_results=LATEST, order_by=["timestamp_ms DESC"]
    )
    findings += of_traces(list(traces), live) if traces else [_no_traces(experiment.name)]
    return [*findings, *_of_datasets(client, experiment.experiment_id, scorers)]


def _no_traces(experiment: str) -> Finding:
    problem = f"there are no traces in the experiment {experiment} yet, so that what needs them was not looked at."
    return Finding("note", "MLflow", problem, "Ask an agent something, and run `gateway doctor` again.")


def _of_datasets(client: MlflowClient, experiment_id: str, scorers: list[LiveScorer]) -> Iterator[Finding]:
    try:
        datasets = list(client.search_datasets(experiment_ids=[experiment_id]))
    except MlflowException as error:
        yield Finding(
            "error",
            "MLflow's datasets",
            f"the server refuses to list them: {str(error).splitlines()[0]}.",
            "If it runs on a folder (mlruns), start it on a database: `mlflow server --backend-store-uri "
            "sqlite:///mlflow.db`.",
        )
        return
    for dataset in datasets:
        records = (Record(f"record {row.dataset_record_id}", vars(row)) for row in dataset.records)
        yield from of_records(f"dataset {dataset.name}", records, scorers)


def of_traces(traces: Sequence[MlflowTrace], scorers: Iterable[LiveScorer]) -> list[Finding]:
    """Find scorers for which none of the traces has what they read.

    Args:
        traces: the latest ones.
        scorers: those that run live.
    """
    findings: list[Finding] = []
    for live in scorers:
        everything = live.rule.model_copy(update={"filter": ScorerFilter()})
        theirs = [trace for trace in traces if why_not(everything, TraceFacts([trace])) is None]
        if theirs:
            findings += [*_without_spans(live, theirs), *_without_tools(live, theirs), *_without_session(live, theirs)]
    return findings


def _without_spans(live: LiveScorer, traces: Sequence[MlflowTrace]) -> Iterator[Finding]:
    parts = flatten_scorers([live.scorer])
    if live.scores_conversations:
        reasons = {why_not_session(part, traces, {}) for part in parts}
    else:
        reasons = {why_not_trace(part, trace, expectations_of(trace)) for part in parts for trace in traces}
    looked = f"none of the latest {len(traces)} traces has a"
    if reasons == {NO_RETRIEVAL}:
        yield Finding(
            "warning",
            live.place,
            f"{live.name} judges retrieval, and {looked} RETRIEVER span: it never applies.",
            'Let the tool that searches say so: `mlflow.get_current_active_span().set_span_type("RETRIEVER")`, with '
            "the documents as its outputs; or leave the scorer to agents that search (`agents`).",
        )
    if reasons == {NO_TOOL_CALL}:
        yield Finding(
            "warning",
            live.place,
            f"{live.name} judges tool calls, and {looked} TOOL span: it never applies.",
            "Leave it to agents that have tools (`agents`); other applications must give the spans of their tools the "
            "type TOOL.",
        )


def _without_tools(live: LiveScorer, traces: Sequence[MlflowTrace]) -> Iterator[Finding]:
    wanted = live.rule.filter.tools
    facts = TraceFacts(traces)
    if wanted and why_not(ScorerRule(filter=ScorerFilter(tools=wanted)), facts):
        yield Finding(
            "warning",
            place_of(config_path(), "scorers", live.name, "filter") or live.place,
            f"{live.name} is for runs that called {' or '.join(wanted)}, and none of the latest {len(traces)} did.",
            f"Check the names in `filter`; called were {', '.join(sorted(facts.tools)) or 'none'}.",
        )


def _without_session(live: LiveScorer, traces: Sequence[MlflowTrace]) -> Iterator[Finding]:
    if not live.scores_conversations:
        return
    alone = [trace for trace in traces if not trace.info.trace_metadata.get(TraceMetadataKey.TRACE_SESSION)]
    if not alone:
        return
    on_span = [key for trace in alone for span in trace.data.spans for key in span.attributes if key in _SESSION_KEYS]
    how = (
        f"have a session as the span attribute `{on_span[0]}` only, which is not where MLflow looks for it"
        if on_span
        else "have no session"
    )
    yield Finding(
        "warning",
        live.place,
        f"{live.name} scores conversations, and {len(alone)} of the latest {len(traces)} traces {how}: it never sees "
        f"them (the first is {alone[0].info.trace_id}).",
        'Whoever writes them must call `mlflow.update_current_trace(metadata={"mlflow.trace.session": session_id})`; '
        "the gateway's own traces have it.",
    )


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a JSON Lines file; one that is no JSON as the text that it is."""
    if not path.is_file():
        raise ConfigurationError(f"There is no file {path}.")
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.strip():
            try:
                yield Record(f"line {number}", json.loads(line))
            except ValueError:
                yield Record(f"line {number}", line)


def of_records(place: str, records: Iterable[Record], scorers: Iterable[LiveScorer]) -> list[Finding]:
    """Find records that cannot be asked, or that the scorers have nothing to compare with in.

    Args:
        place: the dataset, or the file.
        records: as MLflow takes them: ``inputs``, ``outputs``, ``expectations``.
        scorers: all that there are, live or not.
    """
    records = list(records)
    expecting = sorted(live.name for live in scorers if needs_expectations(live.scorer))
    found: list[Finding | None] = [
        _told(place, "error", records, _is_no_object, "no JSON object", 'Write one a line: {"inputs": {...}}.'),
        _told(place, "error", records, _lacks_inputs, "no `inputs`", f"Put what is asked into `inputs`: {_LIKE}"),
        _told(place, "error", records, _cannot_be_asked, "no chat messages in `inputs`", f"Agents are asked {_LIKE}"),
        _told(
            place, "error", records, _has_odd_expectations, "`expectations` that are no object",
            'Write {"expected_response": "..."}.',
        ),
        _told(
            place, "warning", records, _has_nothing_to_compare, "neither `outputs` nor `expectations`",
            "They can be asked, and nothing says what is right: add `expectations`, or `outputs` to score as they are.",
        ),
    ]  # fmt: skip
    if expecting:
        fix = f"Without them these do not apply: {', '.join(expecting)}. " + 'Write {"expected_response": "..."}.'
        found.append(_told(place, "warning", records, _lacks_expectations, "no `expectations`", fix))
    return [finding for finding in found if finding]


_LIKE = '{"messages": [{"role": "user", "content": "..."}]}.'


def _told(
    place: str, severity: Any, records: list[Record], is_so: Callable[[Any], bool], what: str, fix: str
) -> Finding | None:
    these = [record for record in records if is_so(record.content)]
    if not these:
        return None
    count = f"{len(these)} of {len(records)} records {'has' if len(these) == 1 else 'have'} {what}"
    return Finding(severity, f"{place}, {these[0].place}", f"{count}.", fix)


def _is_no_object(content: Any) -> bool:
    return not isinstance(content, dict)


def _lacks_inputs(content: Any) -> bool:
    return isinstance(content, dict) and not content.get("inputs") and not content.get("trace")


def _cannot_be_asked(content: Any) -> bool:
    inputs = content.get("inputs") if isinstance(content, dict) else None
    return bool(inputs) and not (isinstance(inputs, dict) and isinstance(inputs.get("messages"), list))


def _has_odd_expectations(content: Any) -> bool:
    expectations = content.get("expectations") if isinstance(content, dict) else None
    return bool(expectations) and not isinstance(expectations, dict)


def _lacks_expectations(content: Any) -> bool:
    return isinstance(content, dict) and bool(content.get("outputs")) and not content.get("expectations")


def _has_nothing_to_compare(content: Any) -> bool:
    return isinstance(content, dict) and not content.get("outputs") and not content.get("expectations")


def needs_expectations(scorer: Scorer) -> bool:
    """Whether a scorer compares with what was expected."""
    return any(_expects(part) for part in flatten_scorers([scorer]))


def _expects(part: Scorer) -> bool:
    if isinstance(part, InstructionsJudge):
        return "expectations" in part.template_variables
    if isinstance(part, BuiltInScorer):
        try:
            part.validate_columns({"inputs", "outputs", "trace"})
        except MissingColumnsException:
            return True
        return False
    parameter = inspect.signature(part.__call__).parameters.get("expectations")
    return parameter is not None and parameter.default is inspect.Parameter.empty
