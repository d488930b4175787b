"""Spans that are not the Agents SDK's: what a tool's author, or a library that a tool uses, makes with OpenTelemetry.

MLflow's spans are of that kind too (`mlflow_bridge`). All are filed with the run that their task works for, not by
their trace id: that is the caller's when it sent one, and several runs may share it.

Where a span belongs is decided when it begins, in its maker's context. Two things are current there: a span of the
SDK and a span of OpenTelemetry. The inner one of the two is its parent; `ForeignRecord.inside` tells which that is.
"""

from collections.abc import Callable, Sequence
from typing import Any

from opentelemetry import context as context_api
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from opentelemetry.util.types import Attributes, AttributeValue

from gateway.tracing.capture.recording import ForeignRecord, RunCapture, current_run, current_span, short_id

AUTOLOG_RUN = "mlflow.openai.agent_run_root"
"""Attribute of the span that MLflow's autologging puts around a run: our root stands for it."""

_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


class StandIn(Span):
    """What is set on one of our own spans from outside, kept until the tree is made. It never ends."""


class Anchor(trace.Span):
    """The OpenTelemetry side of a run: it stands for whichever span of the SDK is current where it is asked.

    So a span begun in a tool has the tool's span as its parent, a client that passes its context on sends the tool's
    span id, and what is set on "the current span" is set on the tool's.
    """

    def __init__(self, spans: "ForeignSpans", run: RunCapture):
        self.run = run
        self._spans = spans
        self._trace_id = int(run.caller.trace_id if run.caller else run.stem, 16)
        self._state = _state(run)

    @property
    def context(self) -> SpanContext:
        """Ids of the current span, under the trace id that the caller sees."""
        current = inside(self.run)
        return SpanContext(self._trace_id, int(current or self.run.root_id, 16), False, _SAMPLED, self._state)

    @property
    def attributes(self) -> Attributes:
        """What was set on the current span from outside."""
        return self._stand_in().attributes

    def get_span_context(self) -> SpanContext:
        """Return the ids of the current span."""
        return self.context

    def is_recording(self) -> bool:
        """Whether what is set on it is kept."""
        return not self.run.ended

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        """Set an attribute of the current span."""
        self._stand_in().set_attribute(key, value)

    def set_attributes(self, attributes: Any) -> None:
        """Set attributes of the current span."""
        self._stand_in().set_attributes(attributes)

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        """Note something that happened in the current span."""
        self._stand_in().add_event(name, attributes, timestamp)

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,
    ) -> None:
        """Note an exception in the current span."""
        self._stand_in().record_exception(exception, attributes, timestamp, escaped)

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """Say whether the current span failed."""
        self._stand_in().set_status(status, description)

    def update_name(self, name: str) -> None:
        """Do nothing: our spans are named by what they are."""

    def end(self, end_time: int | None = None) -> None:
        """Do nothing: the SDK ends its own spans."""

    def _stand_in(self) -> StandIn:
        return self._spans.stand_in(self.run, self.context)


class ForeignSpans(SpanProcessor):
    """Files OpenTelemetry's spans with the runs that they were made for. One a process."""

    def __init__(self) -> None:
        self._owners: dict[str, RunCapture] = {}
        self.on_register: Callable[[RunCapture, Any], None] | None = None
        """Takes each span of a run as it begins: MLflow wants to know them."""

    def anchor(self, run: RunCapture) -> Context:
        """Return the OpenTelemetry context for the work of a run."""
        if run.sampled:
            return trace.set_span_in_context(Anchor(self, run))
        if run.caller is None:
            return context_api.get_current()
        # Passed on to what the run calls, which is told that nothing is recorded here.
        passed = SpanContext(int(run.caller.trace_id, 16), int(run.caller.span_id, 16), True, trace_state=_state(run))
        return trace.set_span_in_context(NonRecordingSpan(passed))

    def run_of(self, parent_context: Context | None) -> RunCapture | None:
        """Return the run that a span begun here, with this parent, belongs to."""
        if (run := current_run.get()) is None:
            parent = trace.get_current_span(parent_context)  # a thread that was given a context, or a parent, by hand
            run = parent.run if isinstance(parent, Anchor) else self._owners.get(_id(parent.get_span_context()))
        return None if run is None or run.ended else run

    def owns(self, span: ReadableSpan) -> bool:
        """Whether the span was filed with a run that is under way."""
        return _id(span.get_span_context()) in self._owners

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """File the span."""
        if (run := self.run_of(parent_context)) is None:
            return
        span_id, within = _id(span.get_span_context()), inside(run)
        run.foreign[span_id] = ForeignRecord(span, _parent(run, span, within), within)
        self._owners[span_id] = run
        if span.parent is not None and _id(span.parent) == (within or run.root_id) and self.on_register is not None:
            self.stand_in(run, span.parent)  # LangChain's autologging goes up the tree, as far as it is known
        self._register(run, span)

    def stand_in(self, run: RunCapture, context: SpanContext) -> StandIn:
        """Return what takes up all that is set on the run's own span of these ids."""
        span_id = _id(context)
        if (stand_in := run.stand_ins.get(span_id)) is None:
            stand_in = run.stand_ins[span_id] = StandIn("current", context, resource=Resource.get_empty())
        self._register(run, stand_in)
        return stand_in

    def _register(self, run: RunCapture, span: Span) -> None:
        if self.on_register is not None and not run.ended:
            self.on_register(run, span)

    def enclosing(self, run: RunCapture, sdk_parent: str | None) -> str | None:
        """Return the id of the foreign span that a span of the SDK begins in here; ``None`` if there is none.

        Args:
            run: the run.
            sdk_parent: the parent that the SDK knows.
        """
        span_id = _id(trace.get_current_span().get_span_context())
        record = run.foreign.get(span_id)
        if record is None or record.inside != (short_id(sdk_parent) if sdk_parent else None):
            return None
        if AUTOLOG_RUN in (record.span.attributes or ()):
            # It will not be in the tree, so what the run's tools make must not see it as current. Whoever made it
            # current takes it, and this with it, away again.
            context_api.attach(self.anchor(run))
        return span_id

    def forget(self, run: RunCapture) -> None:
        """Stop to file spans with the run."""
        for span_id in list(run.foreign):
            self._owners.pop(span_id, None)

    def on_end(self, span: ReadableSpan) -> None:
        """Do nothing: the span was filed when it began."""

    def shutdown(self) -> None:
        """Do nothing: nothing is held back here."""

    def force_flush(self, timeout_millis: int = 30_000) -> bool:  # noqa: ARG002 - the interface's name
        """Do nothing: nothing is held back here."""
        return True


class _RunsOnly(Sampler):
    """Records what belongs to a run: there is nowhere to send the rest, unless another processor takes it."""

    def __init__(self, spans: ForeignSpans):
        self._spans = spans
        self.everything = False

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,  # noqa: ARG002 - the interface's names, here and below
        name: str,  # noqa: ARG002
        kind: SpanKind | None = None,  # noqa: ARG002
        attributes: Attributes = None,
        links: Sequence[trace.Link] | None = None,  # noqa: ARG002
        trace_state: TraceState | None = None,  # noqa: ARG002
    ) -> SamplingResult:
        """Decide on one span, in its maker's context."""
        state = trace.get_current_span(parent_context).get_span_context().trace_state
        if self.everything or self._spans.run_of(parent_context) is not None:
            return SamplingResult(Decision.RECORD_AND_SAMPLE, attributes, state)
        return SamplingResult(Decision.DROP, None, state)

    def get_description(self) -> str:
        """Return what OpenTelemetry calls it."""
        return "RunsOnly"


class _Provider(TracerProvider):
    """OpenTelemetry's provider for a process that has none."""

    def __init__(self, spans: ForeignSpans):
        self._runs_only = _RunsOnly(spans)
        super().__init__(self._runs_only, Resource.create({"service.name": "agent-gateway"}), shutdown_on_exit=False)
        super().add_span_processor(spans)

    def add_span_processor(self, span_processor: SpanProcessor) -> None:
        """Add another's processor, which gets all spans of the process from then on."""
        self._runs_only.everything = True
        super().add_span_processor(span_processor)


def install_opentelemetry(spans: ForeignSpans) -> None:
    """See to it that spans made with OpenTelemetry's global tracers are filed, whoever has set that up before."""
    provider = trace.get_tracer_provider()
    if not isinstance(provider, TracerProvider):
        # Not `set_tracer_provider`: it refuses a second one, and MLflow takes the first away when its settings change.
        trace._TRACER_PROVIDER = _Provider(spans)  # noqa: SLF001
    elif spans not in provider._active_span_processor._span_processors:  # noqa: SLF001
        provider.add_span_processor(spans)


def inside(run: RunCapture) -> str | None:
    """Return the id of the run's span of the SDK that is current in this context; ``None``: there is none."""
    span = current_span()
    return short_id(span.span_id) if span is not None and span.span_id in run.spans else None


def _parent(run: RunCapture, span: Span, within: str | None) -> str | None:
    """Return the id of the span that a foreign span belongs to."""
    if span.parent is None or (outer := run.foreign.get(parent_id := _id(span.parent))) is None:
        return within
    # A parent other than the current span was named by the span's maker, who will know.
    was_named = trace.get_current_span().get_span_context().span_id != span.parent.span_id
    return parent_id if within is None or outer.inside == within or was_named else within


def _state(run: RunCapture) -> TraceState | None:
    return TraceState.from_header([run.trace.tracestate]) if run.trace.tracestate else None


def _id(context: SpanContext | None) -> str:
    return f"{context.span_id:016x}" if context else ""
