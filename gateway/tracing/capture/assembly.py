"""From what a run left behind to one clean tree.

What makes it clean: the span of the agent that the run started with becomes the root; what the SDK and autologging put
around runs and turns is left out, and what lies below moves up. Done in a thread, after the run.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from agents.tracing import (
    AgentSpanData,
    FunctionSpanData,
    GenerationSpanData,
    ResponseSpanData,
    TaskSpanData,
    TurnSpanData,
)

from gateway.tracing import messages
from gateway.tracing.capture.arguments import check_arguments
from gateway.tracing.capture.content import (
    CHAT_TOOLS,
    FIRST_TOKEN_S,
    TRIGGERED,
    arguments,
    content,
    derived_id,
    documents,
    function_calls,
    hosted_calls,
    model_output,
)
from gateway.tracing.capture.foreign import AUTOLOG_RUN
from gateway.tracing.capture.foreign_content import foreign_content, foreign_error
from gateway.tracing.capture.provider import ModelCall
from gateway.tracing.capture.recording import ForeignRecord, RunCapture, SdkRecord, short_id
from gateway.tracing.spans import Outcome, Span, SpanError, Trace

CUT_OFF = "gateway.cut_off"
"""The span had not ended when its run did, or was cancelled with it."""
CANCELLED = "gateway.cancelled"
"""On the root: the run was ended before it had an answer."""
CANCELLED_TYPE = "CANCELLED"

_FRAMES = {TaskSpanData, TurnSpanData}
_Record = SdkRecord | ForeignRecord
_Kept = list[tuple[str, _Record, Span]]


def assemble(run: RunCapture) -> Trace:
    """Return the run's finished trace, spans in MLflow's shapes, root first, not redacted yet."""
    trace, root = run.trace, _root(run)
    tree = _Tree(run, root.span_id)
    made = [(span_id, record, _span(span_id, record, tree.parent(record), run)) for span_id, record in tree.kept()]
    trace.spans = [root, *_with_calls(made)]
    _add_notes(run, trace.spans)
    _fill_agents(trace.spans)
    _note_first_text(run, root, trace.spans)
    return trace


def outcome(trace: Trace) -> Outcome:
    """Return on what grounds a finished trace may be worth keeping."""
    return Outcome(
        failed=trace.error is not None,
        tool_failed=any(span.error for span in trace.spans if span.kind in {"TOOL", "RETRIEVER"}),
        guardrail_tripped=any(TRIGGERED in span.attributes for span in trace.spans),
        duration_s=(trace.ended_ns - trace.started_ns) / 1e9,
    )


def _root(run: RunCapture) -> Span:
    trace = run.trace
    outputs = None
    if run.answer is not None:
        outputs = {"messages": [{"role": "assistant", "content": run.answer}]}
    elif run.left_open:
        outputs = {"messages": [messages.answer(run.left_open)]}
    root = Span(
        span_id=run.root_id,
        parent_id=None,
        name=trace.agent,
        kind="AGENT",
        start_ns=trace.started_ns,
        end_ns=trace.ended_ns,
        inputs={"messages": messages.from_items(run.turn_input)},
        outputs=outputs,
        error=trace.error,
    )
    if trace.error is not None and trace.error.type == CANCELLED_TYPE:
        root.attributes = {CANCELLED: True}
    return root


class _Tree:
    """Which spans stay, and below which."""

    def __init__(self, run: RunCapture, root_id: str):
        self._root_id = root_id
        # Copies: a stray thread of a tool may still begin spans.
        sdk = [(short_id(span_id), record) for span_id, record in list(run.spans.items())]
        foreign = list(run.foreign.items())
        self._records: dict[str, _Record] = dict([*sdk, *foreign])
        self._left_out: dict[str, str | None] = {}
        for span_id, record in sdk:
            if _is_frame(record) or _is_stand_in(record, run):
                self._left_out[span_id] = _parent_id(record)
        for span_id, made in foreign:
            if AUTOLOG_RUN in (made.span.attributes or ()) or self._is_known_call(made):
                self._left_out[span_id] = made.parent
        self._merge_first_agent(sdk)

    def kept(self) -> list[tuple[str, _Record]]:
        """Return the spans that stay, in the order of their begin."""
        kept = [(span_id, record) for span_id, record in self._records.items() if span_id not in self._left_out]
        return sorted(kept, key=lambda entry: _started_ns(entry[1]))

    def parent(self, record: _Record) -> str:
        """Return the id of the span that the span lies below."""
        return self._nearest(_parent_id(record)) or self._root_id

    def _nearest(self, span_id: str | None) -> str | None:
        """Return the id if that span stays, else that of the next one around it that does."""
        while span_id in self._left_out:
            span_id = self._left_out[span_id]
        return span_id if span_id in self._records else None

    def _is_known_call(self, record: ForeignRecord) -> bool:
        """Whether it is the call of a model that has a span already: autologging sees the client make it."""
        around = self._records.get(self._nearest(record.parent) or "")
        if not isinstance(around, SdkRecord):
            return False
        is_call = isinstance(around.span.span_data, GenerationSpanData | ResponseSpanData)
        return is_call and foreign_content(record.span).kind in {"CHAT_MODEL", "LLM"}

    def _merge_first_agent(self, sdk: Iterable[tuple[str, SdkRecord]]) -> None:
        """Leave the span of the agent out that the run started with: our root stands for it."""
        for span_id, record in sdk:
            if type(record.data) is AgentSpanData and self._nearest(_parent_id(record)) is None:
                self._left_out[span_id] = None
                return


def _is_frame(record: SdkRecord) -> bool:
    return type(record.data) in _FRAMES


def _is_stand_in(record: SdkRecord, run: RunCapture) -> bool:
    """Whether the span is that of a call which the client makes, or a person decides on: nothing was done here."""
    data = record.data
    if type(data) is not FunctionSpanData:
        return False
    waits = data.name in run.waiting_tools and data.output is None and not record.span.error
    return data.name in run.client_tools or waits


def _parent_id(record: _Record) -> str | None:
    if isinstance(record, ForeignRecord):
        return record.parent
    return record.below or (short_id(record.span.parent_id) if record.span.parent_id else None)


def _started_ns(record: _Record) -> int:
    return record.started_ns if isinstance(record, SdkRecord) else record.span.start_time or 0


def _span(span_id: str, record: _Record, parent: str, run: RunCapture) -> Span:
    trace = run.trace
    if isinstance(record, SdkRecord):
        made, ended_ns, error = content(record.data), record.ended_ns, _sdk_error(record, run)
        is_cut_off = _is_cut_off(record, trace.error) and error is None
        started_ns = record.started_ns
    else:
        made, ended_ns, error = foreign_content(record.span), record.span.end_time, foreign_error(record.span)
        is_cut_off, started_ns = not ended_ns, record.span.start_time
    started_ns = min(max(started_ns, trace.started_ns), trace.ended_ns)
    ended_ns = min(max(ended_ns or trace.ended_ns, started_ns), trace.ended_ns)
    attributes = dict(made.attributes)
    if is_cut_off:
        attributes[CUT_OFF] = True
        error = error or SpanError(*_reason(trace.error))
    span = Span(
        span_id, parent, made.name, made.kind, started_ns, ended_ns, made.inputs, made.outputs, attributes, error
    )
    if isinstance(record, SdkRecord):
        _note_first_token(record, span)
    return span


def _sdk_error(record: SdkRecord, run: RunCapture) -> SpanError | None:
    """Return why a span of the SDK failed: the tool's own words where its author lets the model have them."""
    if noted := run.tool_errors.get(record.span.span_id):
        return noted
    if not (error := record.span.error):
        return None
    detail = error.get("data") or {}
    if CUT_OFF in detail:
        return None
    kind = "ToolError" if type(record.data) is FunctionSpanData else "Error"
    return SpanError(detail.get("type") or kind, str(detail.get("error") or error["message"]))


def _is_cut_off(record: SdkRecord, ended: SpanError | None) -> bool:
    """Whether the span was ended by its run's end, or by being cancelled."""
    data, error = record.data, record.span.error
    if not record.ended_ns or (error and CUT_OFF in (error.get("data") or {})):
        return True
    if type(data) is ModelCall:
        return data.output is None
    return type(data) is FunctionSpanData and data.output is None and ended is not None


def _reason(ended: SpanError | None) -> tuple[str, str]:
    return (ended.type, ended.message) if ended else (CANCELLED_TYPE, "Cut off before it ended.")


def _note_first_token(record: SdkRecord, span: Span) -> None:
    data = record.data
    if type(data) is ModelCall and data.first_token_ns:
        span.attributes[FIRST_TOKEN_S] = max(data.first_token_ns - span.start_ns, 0) / 1e9


def _add_notes(run: RunCapture, spans: list[Span]) -> None:
    """Add what a tool's author set on "the current span", which was one of these."""
    for span in spans if run.stand_ins else ():
        if (stand_in := run.stand_ins.get(span.span_id)) is None:
            continue
        noted = foreign_content(stand_in)
        if noted.kind != "CHAIN":
            span.kind = noted.kind
        span.inputs = span.inputs if noted.inputs is None else noted.inputs
        span.outputs = span.outputs if noted.outputs is None else noted.outputs
        if span.kind == "RETRIEVER":
            span.outputs = documents(span.outputs)
        span.attributes = span.attributes | noted.attributes
        span.error = span.error or foreign_error(stand_in)


def _with_calls(made: _Kept) -> Iterable[Span]:
    """Yield the spans; after each model call those of the tools that its provider ran, and of tools not there."""
    offered: dict[str | None, dict[str, Any]] = {}
    called = {(span.parent_id, span.name) for _, _, span in made if span.kind != "CHAT_MODEL"}
    for span_id, record, span in made:
        yield span
        if not isinstance(record, SdkRecord):
            continue
        data = record.data
        if type(data) is FunctionSpanData:
            if (schema := offered.get(span.parent_id, {}).get(data.name)) is not None:
                span.attributes |= check_arguments(span.inputs, schema)
        elif span.kind == "CHAT_MODEL" and (output := model_output(data)):
            definitions = [each["function"] for each in span.attributes.get(CHAT_TOOLS, ())]
            tools = offered[span.parent_id] = {each["name"]: each["parameters"] for each in definitions}
            yield from _hosted_spans(span_id, span, output)
            for call in function_calls(output, tools):
                if (span.parent_id, call.get("name")) not in called:
                    yield _unknown_call(span, call)


def _hosted_spans(span_id: str, model_call: Span, output: Any) -> Iterable[Span]:
    for call in hosted_calls(output):
        made, at_ns = call.content, model_call.end_ns  # when it was, the provider does not say
        error = SpanError("ToolError", call.error) if call.error else None
        yield Span(
            derived_id(span_id, call.call_id),
            span_id,
            made.name,
            made.kind,
            at_ns,
            at_ns,
            made.inputs,
            made.outputs,
            made.attributes,
            error,
        )


def _unknown_call(model_call: Span, call: Mapping[str, Any]) -> Span:
    """Return a failed span for a call of a tool that is not there: the SDK makes none."""
    error = SpanError("UnknownTool", "The model called a tool that it was not offered.")
    at_ns, given = model_call.end_ns, arguments(call.get("arguments"))
    span_id = derived_id(model_call.span_id, str(call.get("call_id")))
    return Span(span_id, model_call.parent_id, str(call.get("name")), "TOOL", at_ns, at_ns, given, None, {}, error)


def _fill_agents(spans: list[Span]) -> None:
    """Give each further agent its inputs and outputs: what its first model call was asked, its last one answered."""
    agents = {span.span_id: span for span in spans[1:] if span.kind == "AGENT" and span.inputs is None}
    for span in spans if agents else ():
        agent = agents.get(span.parent_id or "")
        if agent is None or span.kind != "CHAT_MODEL" or not isinstance(span.inputs, dict):
            continue
        if agent.inputs is None:
            asked = span.inputs.get("messages") or []
            agent.inputs = {"messages": [each for each in asked if each.get("role") != "system"]}
        choices = (span.outputs or {}).get("choices") or []
        agent.outputs = {"messages": [choice["message"] for choice in choices]} if choices else None


def _note_first_text(run: RunCapture, root: Span, spans: list[Span]) -> None:
    """Note on the root when its client could see the first text: text of agents that tools run does not reach it."""
    records = [(span_id, record.data) for span_id, record in list(run.spans.items())]
    streamed = [(span_id, data) for span_id, data in records if type(data) is ModelCall and data.first_text_ns]
    above = {span.span_id: span for span in spans} if streamed else {}
    texts: list[Any] = []
    for span_id, data in streamed:
        span = above.get(short_id(span_id))
        while span is not None and span.kind in {"CHAT_MODEL", "AGENT"} and span is not root:
            span = above.get(span.parent_id or "")
        if span is root:
            texts.append(data.first_text_ns)
    if texts:
        root.attributes = root.attributes | {FIRST_TOKEN_S: max(min(texts) - root.start_ns, 0) / 1e9}
