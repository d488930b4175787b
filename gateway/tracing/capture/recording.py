"""What one run leaves behind while it is under way: references to spans, and nothing computed yet.

Two kinds of spans meet here: those of the Agents SDK, and *foreign* ones, made with OpenTelemetry or with MLflow by a
tool's author or by a library that the tool uses.
"""

import contextvars
import time
from typing import Any

from agents.tracing import Span as SdkSpan
from agents.tracing.scope import Scope
from agents.tracing.span_data import SpanData
from agents.tracing.spans import NoOpSpan

from gateway.tracing.capture.traceparent import parse_traceparent
from gateway.tracing.spans import SpanError, Trace

SPAN_ID_DIGITS = 16


class QuietSpan(NoOpSpan[Any]):
    """A span that is not recorded, and hides nothing: the recorded one around it stays the current one for us.

    The SDK's own no-op spans become current as well, for instance around each model call whose tracing is off.
    """

    __slots__ = ("around",)

    def __init__(self, data: SpanData, around: SdkSpan[Any] | None):
        super().__init__(data)
        self.around = around


def current_span() -> SdkSpan[Any] | None:
    """Return the SDK's span that is current in this context, if it is recorded."""
    span = Scope.get_current_span()
    while isinstance(span, QuietSpan):
        span = span.around
    return None if isinstance(span, NoOpSpan) else span


def short_id(span_id: str) -> str:
    """Return an id of the SDK's (``span_`` and 24 digits) as one of OpenTelemetry's (16 digits)."""
    return span_id.removeprefix("span_")[:SPAN_ID_DIGITS]


class SdkRecord:
    """A span of the SDK's, with our clock's times in nanoseconds since the epoch."""

    __slots__ = ("below", "data", "ended_ns", "span", "started_ns")

    def __init__(self, span: SdkSpan[Any], below: str | None):
        self.span = span
        self.data: Any = span.span_data
        self.below = below
        """Id of the foreign span that it began in; ``None``: its parent is the SDK's."""
        self.started_ns = time.time_ns()
        self.ended_ns = 0
        """0: not ended."""


class ForeignRecord:
    """A span that was made with OpenTelemetry or MLflow."""

    __slots__ = ("inside", "parent", "span")

    def __init__(self, span: Any, parent: str | None, inside: str | None):
        self.span = span
        """The SDK object of OpenTelemetry; what is set on it later is seen."""
        self.parent = parent
        """Id of the span that it belongs to, of either kind; ``None``: the root."""
        self.inside = inside
        """Id of the SDK's span that was current when it began."""


class RunCapture:
    """What one run leaves behind."""

    def __init__(
        self,
        trace: Trace,
        turn_input: list[Any],
        *,
        sampled: bool,
        client_tools: frozenset[str] = frozenset(),
        traceparent: str | None = None,
        tracestate: str | None = None,
    ):
        """Take the trace's frame and what is known of the run when it begins.

        Args:
            trace: ids and times; no spans yet.
            turn_input: this turn's new input items.
            sampled: whether the trace is kept; if not, only the ledger hears of the run.
            client_tools: names of the tools that the client runs itself.
            traceparent: the caller's W3C header as it came; an invalid one is passed over.
            tracestate: the header that goes with it.
        """
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
        self.caller = parse_traceparent(traceparent)
        if self.caller is not None:
            trace.traceparent, trace.tracestate = str(self.caller), tracestate
        self.ended = False
        self.spans: dict[str, SdkRecord] = {}
        """By the SDK's span id, in the order of their begin."""
        self.foreign: dict[str, ForeignRecord] = {}
        """By span id, in the order of their begin."""
        self.stand_ins: dict[str, Any] = {}
        """What was set from outside on spans of the SDK, by their ids."""
        self.notes: Any = None
        """MLflow's TraceInfo of the run, once a tool has used MLflow."""
        self.tool_errors: dict[str, SpanError] = {}

    @property
    def sdk_trace_id(self) -> str:
        """The trace's id in the SDK's form."""
        return "trace_" + self.stem

    @property
    def stem(self) -> str:
        """The 32 hexadecimal digits that the ids of the trace, the response and its items have in common."""
        return self.trace.trace_id.removeprefix("tr-")

    @property
    def root_id(self) -> str:
        """The id of the root span: the last digits of the trace's."""
        return self.trace.trace_id[-SPAN_ID_DIGITS:]


current_run: contextvars.ContextVar[RunCapture | None] = contextvars.ContextVar("current_run", default=None)
"""The run that this task, or this thread of a tool, works for; ``None`` outside of runs and in runs not sampled."""
