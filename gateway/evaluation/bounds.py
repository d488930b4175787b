"""Bounds of what one judge call may hold.

MLflow's judges put all they judge into one prompt: a conversation of any length, what tools returned, every document
that was found. What fits is passed on as it is, the very same objects. What does not is shortened, the judge is told so
where it reads, and the score says so in its metadata.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow.entities import Span, SpanType, Trace
from mlflow.genai.judges.instructions_judge import InstructionsJudge
from mlflow.genai.scorers.base import Scorer
from mlflow.genai.scorers.builtin_scorers import (
    BuiltInScorer,
    ConversationalToolCallEfficiency,
    RetrievalGroundedness,
    RetrievalRelevance,
    RetrievalSufficiency,
    ToolCallCorrectness,
    ToolCallEfficiency,
)
from mlflow.tracing.constant import SpanAttributeKey

from gateway.evaluation.applicability import root_of
from gateway.evaluation.definitions import with_definitions
from gateway.evaluation.spans import with_attributes, with_spans

SHORTENED = "gateway.shortened"
"""Metadata of a score whose judge did not see everything: what was left out."""

_ITEM_CHARACTERS = 200  # what an item of a list is given at least; a longer list loses items
_PAYLOADS = (SpanAttributeKey.INPUTS, SpanAttributeKey.OUTPUTS)


@dataclass(frozen=True)
class Bounds:
    """How much judges are given. Each is far above what turns and conversations usually hold."""

    call_characters: int = 60_000
    """Text of the subject in one judge call: some 15,000 tokens, which the smallest contexts in use hold."""
    retention_turns: int = 20
    """Turns that `KnowledgeRetention` asks about, one call each, every time a conversation is scored."""
    documents: int = 30
    """Documents of a trace that `RetrievalRelevance` asks about, one call each; several retrievals share them."""


Reads = Callable[[Span], bool]
"""Whether a judge's prompt holds what is in a span."""


def spans_read(scorer: Scorer) -> Reads:
    """Return which spans a judge reads; of one that we do not know, all."""
    if isinstance(scorer, ToolCallCorrectness | ToolCallEfficiency | ConversationalToolCallEfficiency):
        return lambda span: span.parent_id is None or span.span_type == SpanType.TOOL
    if isinstance(scorer, RetrievalGroundedness | RetrievalRelevance | RetrievalSufficiency):
        return lambda span: span.parent_id is None or span.span_type == SpanType.RETRIEVER
    if isinstance(scorer, BuiltInScorer) or (
        isinstance(scorer, InstructionsJudge) and "trace" not in scorer.template_variables
    ):
        return lambda span: span.parent_id is None
    return lambda _span: True


def shown_trace(scorer: Scorer, trace: Trace, bounds: Bounds) -> tuple[Trace, str | None]:
    """Return the trace as a judge is shown it, and what was left out of it; itself, if that is nothing."""
    left_out = None
    if isinstance(scorer, RetrievalRelevance):
        trace, left_out = _first_documents(trace, bounds.documents)
    if isinstance(scorer, ToolCallCorrectness | ToolCallEfficiency):
        trace = with_definitions(trace)
    shown = _bounded(trace, spans_read(scorer), bounds.call_characters)
    if shown is not trace:
        cut = f"texts shortened to {bounds.call_characters} characters"
        left_out = f"{left_out}, {cut}" if left_out else cut
    return shown, left_out


def _bounded(trace: Trace, reads: Reads, most: int) -> Trace:
    sizes = [_size(getattr(span, side)) for span in trace.data.spans if reads(span) for side in ("inputs", "outputs")]
    if sum(sizes) <= most:
        return trace
    level = _level(sizes, most)
    return with_spans(trace, [_shrunk(span, level) if reads(span) else span for span in trace.data.spans])


def _first_documents(trace: Trace, most: int) -> tuple[Trace, str | None]:
    """Return the trace with the first documents of each retrieval, ``most`` in all, and what was left out."""
    found = {span.span_id: span.outputs for span in trace.data.spans if span.span_type == SpanType.RETRIEVER}
    most = max(1, most // max(1, len(found)))
    long = {span_id: each for span_id, each in found.items() if isinstance(each, list) and len(each) > most}
    if not long:
        return trace, None
    spans = [
        with_attributes(span, {SpanAttributeKey.OUTPUTS: long[span.span_id][:most]}) if span.span_id in long else span
        for span in trace.data.spans
    ]
    return with_spans(trace, spans), f"{sum(len(each) - most for each in long.values())} documents left out"


def bounded_session(traces: Sequence[Trace], reads: Reads, most: int) -> tuple[list[Trace], str | None]:
    """Return a conversation of no more than about ``most`` characters, and what was left out of it, if anything was.

    The first turn stays, since it says what the conversation is about, and as many of the last as fit, since a
    conversation is judged by how it ends. In place of the turns between stands one that says how many there were.
    """
    ordered = sorted(traces, key=lambda trace: trace.info.request_time)
    if sum(_read_size(trace, reads) for trace in ordered) <= most:
        return ordered, None
    each = [_bounded(trace, reads, most // 4) for trace in ordered]
    shortened = sum(one is not other for one, other in zip(each, ordered, strict=True))
    room = most - _read_size(each[0], reads)
    begin = len(each)
    while begin > 1 and (room := room - _read_size(each[begin - 1], reads)) >= 0:
        begin -= 1
    between = each[1:begin]
    gap = [_gap(between[-1], len(between))] if between else []
    said = [
        f"{len(between)} of {len(each)} turns left out" if between else "",
        f"{shortened} turns shortened" if shortened else "",
    ]
    return [each[0], *gap, *each[begin:]], ", ".join(filter(None, said))


def shrink(value: Any, most: int) -> Any:
    """Return a value of JSON whose text has about ``most`` characters at most: itself, if it has no more.

    It keeps its form. Of texts the middle goes, of lists the items in the middle, and what is small stays whole.
    """
    if _size(value) <= most:
        return value
    if isinstance(value, str):
        return _clip(value, most)
    if isinstance(value, dict):
        level = _level([_size(each) for each in value.values()], most)
        return {key: shrink(each, level) for key, each in value.items()}
    if isinstance(value, list):
        items = _without_middle(value, max(2, most // _ITEM_CHARACTERS))
        level = _level([_size(each) for each in items], most)
        return [shrink(each, level) for each in items]
    return value


def _clip(text: str, most: int) -> str:
    note = f" [{len(text) - most} characters are left out here] "
    keep = max(0, most - len(note))
    return text[: keep - keep // 2] + note + text[len(text) - keep // 2 :]


def _without_middle(items: list[Any], most: int) -> list[Any]:
    if len(items) <= most:
        return items
    note = f"[{len(items) - most} items are left out here]"
    # Where messages stand, a text would be no message.
    mark = {"role": "system", "content": note} if isinstance(items[0], dict) and "role" in items[0] else note
    return [*items[: most - most // 2], mark, *items[len(items) - most // 2 :]]


def _level(sizes: Sequence[int], most: int) -> int:
    """Return the size to which the largest are to be cut so that all together have ``most``."""
    left = most
    for position, size in enumerate(ascending := sorted(sizes)):
        share = max(0, left) // (len(ascending) - position)
        if size > share:
            return share
        left -= size
    return max(sizes, default=0)


def _size(value: Any) -> int:
    return 0 if value is None else len(value) if isinstance(value, str) else len(json.dumps(value, default=str))


def _read_size(trace: Trace, reads: Reads) -> int:
    return sum(_size(span.inputs) + _size(span.outputs) for span in trace.data.spans if reads(span))


def _shrunk(span: Span, level: int) -> Span:
    values = dict(zip(_PAYLOADS, (span.inputs, span.outputs), strict=True))
    return with_attributes(span, {name: shrink(value, level) for name, value in values.items() if _size(value) > level})


def _gap(trace: Trace, turns: int) -> Trace:
    """Return the trace as a turn that says that turns are missing."""
    note = f"[{turns} turns of this conversation are left out here, since it is too long]"
    root = with_attributes(root_of(trace), {SpanAttributeKey.INPUTS: {"messages": [{"role": "user", "content": note}]}})
    return with_spans(trace, [with_attributes(root, {SpanAttributeKey.OUTPUTS: None})])
