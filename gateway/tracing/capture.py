"""From the SDK's spans to one clean tree a run.

`SpanCapture` is the SDK's tracing processor: it sees every span of every run in this process and files it with its
run. It keeps references only; turning them into MLflow's shapes is done later, off the request's way (`assemble`).

What makes the tree clean: the SDK's task and turn spans are switched off (`gateway.runs.execution`), its span of the
agent that the run started with becomes the root, and the spans below it move up to the root.
"""

import contextlib
import json
import time
from collections.abc import Iterable
from typing import Any

from agents import TracingProcessor
from agents.tracing import (
    AgentSpanData,
    CustomSpanData,
    FunctionSpanData,
    GenerationSpanData,
    GuardrailSpanData,
    HandoffSpanData,
    MCPListToolsSpanData,
    get_current_span,
)
from agents.tracing import Span as SdkSpan
from agents.tracing import Trace as SdkTrace

from gateway.tracing import messages
from gateway.tracing.spans import Span, SpanError, SpanKind, Trace

CHAT_TOOLS = "mlflow.chat.tools"
TOKEN_USAGE = "mlflow.chat.tokenUsage"  # noqa: S105 - the name of an attribute
MODEL = "mlflow.llm.model"
PROVIDER = "mlflow.llm.provider"
_SPAN_ID_DIGITS = 16
_CUSTOM_KINDS: dict[str, SpanKind] = {"RETRIEVER": "RETRIEVER", "TOOL": "TOOL", "AGENT": "AGENT"}

_Captured = tuple[SdkSpan[Any], int, int]


class RunCapture:
    """What one run leaves behind: its spans as the SDK made them, with our clock's times."""

    def __init__(
        self, trace: Trace, turn_input: list[Any], *, sampled: bool, client_tools: frozenset[str] = frozenset()
    ):
        """Take the trace's frame (ids and times; no spans yet), this turn's new input items, and the client's tools."""
        self.trace = trace
        self.turn_input = turn_input
        self.sampled = sampled
        """Whether the trace is kept; if not, only the ledger hears of the run."""
        self.answer: str | None = None
        """Text of the final answer; ``None`` if the run failed or its last calls are left open."""
        self.left_open: list[Any] = []
        """Items of a run that ended with tool calls for the client or for a person to decide on."""
        self.client_tools = client_tools
        self.waiting_tools: frozenset[str] = frozenset()
        """Tools whose calls wait for a person's decision."""
        self.spans: list[_Captured] = []
        self.started: dict[str, int] = {}
        self.tool_errors: dict[str, SpanError] = {}

    @property
    def sdk_trace_id(self) -> str:
        """The trace's id in the SDK's form."""
        return "trace_" + self.stem

    @property
    def stem(self) -> str:
        """The 32 hexadecimal digits that the ids of the trace, the response and its items have in common."""
        return self.trace.trace_id.removeprefix("tr-")


class SpanCapture(TracingProcessor):
    """Files the SDK's spans with the runs that are under way. Spans of other runs are passed over."""

    def __init__(self) -> None:
        self._runs: dict[str, RunCapture] = {}

    def begin(self, run: RunCapture) -> None:
        """Start to file spans with ``run``."""
        self._runs[run.sdk_trace_id] = run

    def end(self, run: RunCapture) -> None:
        """Stop: what a stray task emits later belongs to no trace any more."""
        self._runs.pop(run.sdk_trace_id, None)

    def note_tool_error(self, error: BaseException) -> None:
        """Keep why the tool of the current span failed: the SDK's own span says only that it did."""
        span = get_current_span()
        run = self._runs.get(span.trace_id) if span else None
        if span and run:
            run.tool_errors[span.span_id] = SpanError(type(error).__name__, str(error))

    def on_span_start(self, span: SdkSpan[Any]) -> None:
        """Note the time."""
        if run := self._runs.get(span.trace_id):
            run.started[span.span_id] = time.time_ns()

    def on_span_end(self, span: SdkSpan[Any]) -> None:
        """File the span."""
        if run := self._runs.get(span.trace_id):
            now = time.time_ns()
            run.spans.append((span, run.started.pop(span.span_id, now), now))

    def on_trace_start(self, trace: SdkTrace) -> None:
        """Do nothing: a run's capture begins before its trace does."""

    def on_trace_end(self, trace: SdkTrace) -> None:
        """Do nothing: the runner ends the capture, also for a run that never came to this."""

    def force_flush(self) -> None:
        """Do nothing: nothing is held back here."""

    def shutdown(self) -> None:
        """Do nothing: the outbox writer drains on its own."""


def assemble(run: RunCapture) -> Trace:
    """Return the run's finished trace, spans in MLflow's shapes, root first, not redacted yet."""
    trace = run.trace
    root = Span(
        span_id=trace.trace_id[-_SPAN_ID_DIGITS:],
        parent_id=None,
        name=trace.agent,
        kind="AGENT",
        start_ns=trace.started_ns,
        end_ns=trace.ended_ns,
        inputs={"messages": messages.from_items(run.turn_input)},
        outputs=_root_outputs(run),
        error=trace.error,
    )
    captured = sorted((entry for entry in run.spans if not _is_stand_in(entry, run)), key=lambda entry: entry[1])
    merged = _first_agent(captured)
    known = {span.span_id for span, _, _ in captured if span.span_id != merged}
    trace.spans = [root]
    for span, start_ns, end_ns in captured:
        if span.span_id != merged:
            parent = _short(span.parent_id) if span.parent_id in known else root.span_id
            error = run.tool_errors.get(span.span_id) or _cut_off(span, trace.error)
            trace.spans.append(_convert(span, parent, start_ns, end_ns, error))
    return trace


def _cut_off(span: SdkSpan[Any], ended: SpanError | None) -> SpanError | None:
    """Return why a tool call has no result, if the run was ended in the middle of it."""
    data = span.span_data
    is_open = isinstance(data, FunctionSpanData) and data.output is None and not span.error
    return SpanError(ended.type, ended.message) if ended and is_open else None


def _root_outputs(run: RunCapture) -> dict[str, Any] | None:
    if run.answer is not None:
        return {"messages": [{"role": "assistant", "content": run.answer}]}
    return {"messages": [messages.answer(run.left_open)]} if run.left_open else None


def _is_stand_in(captured: _Captured, run: RunCapture) -> bool:
    """Whether the span is that of a call which the client makes, or a person decides on: nothing was done here."""
    span, data = captured[0], captured[0].span_data
    if not isinstance(data, FunctionSpanData):
        return False
    waits = data.name in run.waiting_tools and data.output is None and not span.error
    return data.name in run.client_tools or waits


def _first_agent(captured: Iterable[_Captured]) -> str | None:
    """Return the id of the span of the agent that the run started with: our root stands for it."""
    agents = (s.span_id for s, _, _ in captured if isinstance(s.span_data, AgentSpanData) and s.parent_id is None)
    return next(agents, None)


def _convert(span: SdkSpan[Any], parent: str, start_ns: int, end_ns: int, tool_error: SpanError | None) -> Span:
    name, kind, inputs, outputs, attributes = _content(span.span_data)
    error = tool_error or (_sdk_error(span) if span.error else None)
    return Span(_short(span.span_id), parent, name, kind, start_ns, end_ns, inputs, outputs, attributes, error)


def _sdk_error(span: SdkSpan[Any]) -> SpanError:
    """Return the error that the SDK noted: the tool's own words where its author lets the model have them."""
    noted = span.error or {"message": "failed", "data": None}
    detail = (noted.get("data") or {}).get("error")
    kind = "ToolError" if isinstance(span.span_data, FunctionSpanData) else "Error"
    return SpanError(kind, str(detail or noted["message"]))


_Content = tuple[str, SpanKind, Any, Any, dict[str, Any]]


def _content(data: Any) -> _Content:
    """Return name, kind, inputs, outputs and attributes of a span."""
    match data:
        case GenerationSpanData():
            return _model_call(data)
        case FunctionSpanData():
            return data.name, "TOOL", _arguments(data.input), data.output, {}
        case AgentSpanData():
            return data.name, "AGENT", None, None, {}
        case HandoffSpanData():
            route = {"from_agent": data.from_agent, "to_agent": data.to_agent}
            return f"handoff to {data.to_agent}", "HANDOFF", route, None, {}
        case GuardrailSpanData():
            return data.name, "GUARDRAIL", None, {"triggered": data.triggered}, {}
        case MCPListToolsSpanData():
            return f"list tools of {data.server}", "CHAIN", {"server": data.server}, data.result, {}
        case CustomSpanData():
            kind = _CUSTOM_KINDS.get(str(data.data.get("span_type")), "CHAIN")
            if "inputs" in data.data or "outputs" in data.data:
                return data.name, kind, data.data.get("inputs"), data.data.get("outputs"), {}
            return data.name, kind, None, {key: item for key, item in data.data.items() if key != "span_type"}, {}
        case _:
            return str(data.type), "CHAIN", None, None, {}


def _model_call(data: GenerationSpanData) -> _Content:
    config = data.model_config or {}
    attributes: dict[str, Any] = {MODEL: data.model, PROVIDER: config.get("provider")}
    if config.get("tools"):
        attributes[CHAT_TOOLS] = config["tools"]
    if data.usage:
        counts = ("input_tokens", "output_tokens", "total_tokens")
        attributes[TOKEN_USAGE] = {key: data.usage.get(key, 0) for key in counts}
    asked = messages.from_items(data.input or [], instructions=config.get("instructions"))
    inputs: dict[str, Any] = {"messages": asked}
    if config.get("settings"):
        inputs |= config["settings"]
    outputs = None if data.output is None else {"choices": [{"index": 0, "message": messages.answer(data.output)}]}
    return data.model or "model", "CHAT_MODEL", inputs, outputs, attributes


def _arguments(raw: str | None) -> Any:
    """Return the arguments of a tool call as an object; as the raw text if they are not valid JSON."""
    with contextlib.suppress(ValueError):
        return json.loads(raw) if raw else {}
    return raw


def _short(span_id: str | None) -> str:
    return (span_id or "").removeprefix("span_")[:_SPAN_ID_DIGITS]
