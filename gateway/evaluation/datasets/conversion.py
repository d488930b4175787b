"""Between traces and the records of MLflow's datasets.

MLflow keys a dataset's records by their inputs and overwrites the tags of equal ones. So everything that concerns one
of a record's traces stands under a tag of its own, or names the trace.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import structlog
from mlflow.entities import Assessment, DatasetRecord, SpanType, TraceInfo
from mlflow.entities import Trace as MlflowTrace
from mlflow.tracing.constant import TraceMetadataKey

from gateway.evaluation.datasets.replay import REPLAY_BECAUSE_TAG, REPLAY_TAG, replay_of
from gateway.evaluation.datasets.rows import Row
from gateway.tracing.redaction.redactor import Redactor, Unredactable

log = structlog.get_logger(__name__)

HUMAN = "HUMAN"
FROM = "from."
"""Tag of a record for each of its traces, with what put it there."""
SCORE = "score."
FEEDBACK = "feedback."
"""Tag of a record for what a person said of its trace: value, who, which trace."""
EXPECTATION = "expectation."
"""Tag of a record for each expectation that came from a trace: whose it is, and which trace."""
_TOLD_AGAIN = frozenset(
    {
        "trace_id", "session_id", "agent", "agent_version", "scorers", "rule", "inclusion_probability",
        "whole_session_of", REPLAY_TAG, REPLAY_BECAUSE_TAG,
    }
)  # fmt: skip


class Said(NamedTuple):
    """What somebody said of a trace in MLflow: a person's feedback, or an expectation of anybody's."""

    name: str
    value: Any
    rationale: str | None
    by: str
    source_type: str
    """HUMAN, CODE or LLM_JUDGE, as MLflow has it."""
    is_expectation: bool
    said_at: datetime


def said_of(info: TraceInfo) -> list[Said]:
    """Return what people said of a trace, and all its expectations; of each name what was said last. Not redacted."""
    assessments = [
        each
        for each in info.assessments
        if each.valid is not False and (each.expectation is not None or _is_persons(each))
    ]
    last = {(each.name, each.expectation is None): each for each in sorted(assessments, key=_time)}
    return [
        Said(
            name=each.name,
            value=each.feedback.value if each.expectation is None else each.expectation.value,
            rationale=each.rationale,
            by=each.source.source_id or "",
            source_type=each.source.source_type,
            is_expectation=each.expectation is not None,
            said_at=datetime.fromtimestamp(_time(each) / 1000, UTC),
        )
        for each in last.values()
    ]


def _is_persons(assessment: Assessment) -> bool:
    return assessment.feedback is not None and assessment.source.source_type == HUMAN


def _time(assessment: Assessment) -> int:
    return int(assessment.last_update_time_ms or assessment.create_time_ms or 0)


def record(row: Row, trace: MlflowTrace, redactor: Redactor | None) -> dict[str, Any]:
    """Return the dataset record of a trace.

    Args:
        row: why it is wanted.
        trace: as it is in MLflow, redacted.
        redactor: for what people wrote of it in MLflow, which nobody redacted yet; ``None``: that is left out, as is
            what it fails on.
    """
    metadata = trace.info.trace_metadata
    trace_id = trace.info.trace_id
    session_id = metadata.get(TraceMetadataKey.TRACE_SESSION, "")
    inputs = {"messages": conversation_so_far(trace)}
    said = _redacted(trace.info, redactor, session_id or trace_id) if redactor else []
    expectations = {each.name: each.value for each in said if each.is_expectation}
    tags = {
        "trace_id": trace_id,
        "session_id": session_id,
        "agent": metadata.get("gateway.agent", ""),
        "agent_version": metadata.get("gateway.agent_version", ""),
        "scorers": ", ".join(sorted(row.scorers)),
        "rule": row.rule or "",
        "inclusion_probability": repr(row.probability),
        **{f"{SCORE}{name}": json.dumps(value) for name, value in row.scorers.items()},
        # Records with equal inputs are one in MLflow: this keeps the provenance of each of its traces.
        f"{FROM}{trace_id}": json.dumps(row.provenance or row.scorers, sort_keys=True),
        **{_tag_of(each): _about(each, trace_id) for each in said},
        **replay_of(trace, inputs).tags(),
    }
    if row.session_of:
        tags["whole_session_of"] = row.session_of
    source_type = HUMAN if any(each.is_expectation and each.source_type == HUMAN for each in said) else "TRACE"
    source = {"trace_id": trace_id, "session_id": session_id, "source_id": trace_id}
    found = {
        "inputs": inputs,
        "outputs": trace.data.spans[0].outputs,
        "source": {"source_type": source_type, "source_data": source},
        "tags": tags,
    }
    return found | ({"expectations": expectations} if expectations else {})


def _redacted(info: TraceInfo, redactor: Redactor, scope: str) -> list[Said]:
    """Return what people said as it may be kept; what cannot be redacted stays out."""
    redacted = []
    for each in said_of(info):
        try:
            name, value = redactor.text(each.name, scope), redactor.value(each.value, scope)
            rationale = None if each.rationale is None else redactor.text(each.rationale, scope)
            by = redactor.identifier(each.by, "person")
        except Unredactable as error:
            log.error("what somebody said of a trace was withheld", trace_id=info.trace_id, error=str(error))
        else:
            redacted.append(each._replace(name=name, value=value, rationale=rationale, by=by))
    return redacted


def _tag_of(said: Said) -> str:
    return f"{EXPECTATION if said.is_expectation else FEEDBACK}{said.name}"


def _about(said: Said, trace_id: str) -> str:
    about = {"source": said.source_type, "by": said.by, "trace_id": trace_id}
    if not said.is_expectation:
        about["value"] = said.value
    if said.rationale:
        about["rationale"] = said.rationale
    return json.dumps(about, ensure_ascii=False)


def conversation_so_far(trace: MlflowTrace) -> list[dict[str, Any]]:
    """Return the chat messages by which this turn can be asked again: the history that the agent saw, and the turn."""
    calls = [span for span in trace.data.spans if span.span_type == SpanType.CHAT_MODEL]
    first = min(calls, key=lambda span: span.start_time_ns, default=trace.data.spans[0])
    messages: list[dict[str, Any]] = (first.inputs or {}).get("messages", [])
    return [message for message in messages if message.get("role") != "system"]


def origins(record: DatasetRecord) -> set[str]:
    """Return the ids of the traces that a record came from; none if a person thought it up."""
    tagged = {tag.removeprefix(FROM) for tag in record.tags or {} if tag.startswith(FROM)}
    source = record.source.source_data.get("trace_id") if record.source else None
    return tagged | {source} if source else tagged


def without(record: DatasetRecord, gone: set[str]) -> dict[str, Any]:
    """Return what is left of a record of several traces when those that are ``gone`` are taken out.

    What it tells of the traces themselves (outputs, agent, scores) may be of any: it is merged again from the others.
    What people said of the traces that are gone goes with them; what they wrote into the record itself stays.
    """
    tags = record.tags or {}
    theirs = {tag for tag, value in tags.items() if tag.startswith((FEEDBACK, EXPECTATION)) and _names(value, gone)}
    expected = {tag.removeprefix(EXPECTATION) for tag in theirs if tag.startswith(EXPECTATION)}
    return {
        "inputs": record.inputs,
        "expectations": {name: value for name, value in (record.expectations or {}).items() if name not in expected},
        "source": {"source_type": "TRACE", "source_data": {"trace_id": min(origins(record) - gone)}},
        "tags": {
            tag: value
            for tag, value in tags.items()
            if tag not in _TOLD_AGAIN | theirs and not tag.startswith(SCORE) and tag.removeprefix(FROM) not in gone
        },
    }


def as_human(record: DatasetRecord, new: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with what is new of it, whose expectations are a person's from now on.

    MLflow's merge adds expectations and tags, but a record's source stays as it was at first.
    """
    return {
        "inputs": record.inputs,
        "outputs": new.get("outputs"),
        "expectations": {**(record.expectations or {}), **new.get("expectations", {})},
        "tags": {**(record.tags or {}), **new["tags"]},
        "source": new["source"],
    }


def _names(about: str, gone: set[str]) -> bool:
    """Whether a tag of `record` is about one of the traces; people may have written anything there."""
    try:
        told = json.loads(about)
    except ValueError:
        return False
    return isinstance(told, dict) and told.get("trace_id") in gone
