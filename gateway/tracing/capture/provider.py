"""The Agents SDK's trace provider, ours: it keeps our capture on, whoever else sets processors.

``mlflow.openai.autolog()`` clears the SDK's processors and adds one of its own, which would make a second tree of each
run. Here the first has no effect on the capture and the second is refused. Other processors (Logfire's, Langfuse's)
get every span, as they would from the SDK's own provider.
"""

import os
from typing import Any

from agents.tracing import GenerationSpanData, ResponseSpanData, TracingProcessor, set_trace_provider, setup
from agents.tracing import Span as SdkSpan
from agents.tracing import Trace as SdkTrace
from agents.tracing.processors import default_processor
from agents.tracing.provider import DefaultTraceProvider
from agents.tracing.scope import Scope
from agents.tracing.spans import NoOpSpan, SpanImpl, TSpanData
from agents.tracing.traces import TraceImpl

from gateway.tracing.capture.recording import QuietSpan, current_span


class ModelCall(GenerationSpanData):
    """One call of a language model, with what the SDK's own spans of it lack."""

    __slots__ = (
        "answered_by",
        "first_text_ns",
        "first_token_ns",
        "inner",
        "instructions",
        "provider",
        "settings",
        "tools",
    )

    def __init__(
        self,
        asked: Any,
        model: str,
        *,
        provider: str | None,
        instructions: str | None,
        tools: list[dict[str, Any]],
        settings: dict[str, Any],
    ):
        super().__init__(input=asked, model=model, model_config={"provider": provider, **settings})
        self.provider = provider
        self.instructions = instructions
        self.tools = tools
        self.settings = settings
        self.answered_by: str | None = None
        """Name of the model that says it answered; ``None``: it did not say."""
        self.first_token_ns: int | None = None
        """When a streamed answer began, nanoseconds since the epoch; ``None``: no stream, or nothing came."""
        self.first_text_ns: int | None = None
        """When its first text came, which a client can see."""
        self.inner: Any = None
        """What the wrapped model put on its own span, which is not recorded beside this one."""


class CaptureProvider(DefaultTraceProvider):
    """Gives spans to our captures first and always, then to the processors that others add."""

    def __init__(self, others: list[TracingProcessor]):
        super().__init__()
        self.captures: list[Any] = []
        """Our own processors, in the order in which they get a span."""
        self.set_processors(others)

    def add_capture(self, capture: TracingProcessor) -> None:
        """Give it every span from now on. Adding it again changes nothing."""
        others = self._others()
        if capture not in self.captures:
            self.captures = [capture, *self.captures]
        self.set_processors(others)

    def remove_capture(self, capture: TracingProcessor) -> None:
        """Give it no more spans."""
        others = self._others()
        self.captures = [each for each in self.captures if each is not capture]
        self.set_processors(others)

    def register_processor(self, processor: TracingProcessor) -> None:
        """Add another's processor, unless it is MLflow's."""
        if _is_welcome(processor):
            super().register_processor(processor)

    def set_processors(self, processors: list[TracingProcessor]) -> None:
        """Replace the others' processors; ours stay."""
        others = [each for each in processors if _is_welcome(each) and each not in self.captures]
        super().set_processors([*self.captures, *others])

    def create_span(
        self,
        span_data: TSpanData,
        span_id: str | None = None,
        parent: SdkTrace | SdkSpan[Any] | None = None,
        disabled: bool = False,
    ) -> SdkSpan[TSpanData]:
        """Make a span; one that is not to be recorded does not hide the one that it lies in."""
        current, trace = Scope.get_current_span(), Scope.get_current_trace()
        if disabled:
            return QuietSpan(span_data, current)
        if parent is None and isinstance(span_data, GenerationSpanData | ResponseSpanData):
            around = current_span()
            if around is not None and isinstance(around.span_data, ModelCall):
                around.span_data.inner = span_data
                return QuietSpan(span_data, around)
        is_usual = parent is None and not self._disabled and (current is None or type(current) is SpanImpl)
        if is_usual and isinstance(trace, TraceImpl):
            # What the SDK's own provider comes to after logging and checks, in a third of the time.
            return SpanImpl(
                trace_id=trace.trace_id,
                span_id=span_id or self.gen_span_id(),
                parent_id=current.span_id if current else None,
                processor=self._multi_processor,
                span_data=span_data,
                tracing_api_key=trace.tracing_api_key,
                trace_metadata=trace.metadata,
            )
        span = super().create_span(span_data, span_id, parent)
        return QuietSpan(span_data, current) if isinstance(span, NoOpSpan) else span

    def gen_span_id(self) -> str:
        """Return a new id: the SDK's own way takes three times as long."""
        return f"span_{os.urandom(12).hex()}"

    def _others(self) -> list[TracingProcessor]:
        return [each for each in self._multi_processor._processors if each not in self.captures]  # noqa: SLF001


def install_provider() -> CaptureProvider:
    """Make sure that the SDK uses our provider, and return it. What others have added to the one before stays."""
    provider = setup.GLOBAL_TRACE_PROVIDER
    if isinstance(provider, CaptureProvider):
        return provider
    # The SDK's own processor sends every trace to OpenAI.
    before: Any = getattr(getattr(provider, "_multi_processor", None), "_processors", ())
    ours = CaptureProvider([each for each in before if each is not default_processor()])
    set_trace_provider(ours)
    return ours


def _is_welcome(processor: TracingProcessor) -> bool:
    return not type(processor).__module__.startswith("mlflow.")
