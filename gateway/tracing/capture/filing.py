"""Capture: every span of a run is filed with the run, and made into one clean tree later.

`SpanCapture` is the SDK's tracing processor: it sees every span of every run in this process. It keeps references
only; turning them into MLflow's shapes is done off the request's way (`assembly.assemble`). What tools make with
OpenTelemetry and MLflow comes in through `foreign` and `mlflow_bridge`.
"""

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from agents import TracingProcessor, guardrail_span, set_tracing_disabled
from agents.tool_guardrails import ToolInputGuardrail, ToolOutputGuardrail
from agents.tracing import Span as SdkSpan
from agents.tracing import Trace as SdkTrace
from opentelemetry import context as context_api

from gateway.tracing.capture.foreign import ForeignSpans, install_opentelemetry
from gateway.tracing.capture.mlflow_bridge import finish_notes, install_mlflow
from gateway.tracing.capture.provider import install_provider
from gateway.tracing.capture.recording import RunCapture, SdkRecord, current_run, current_span
from gateway.tracing.spans import SpanError


class SpanCapture(TracingProcessor):
    """Files spans with the runs that are under way. Spans of other runs are passed over."""

    def __init__(self) -> None:
        self._runs: dict[str, RunCapture] = {}
        self._foreign: ForeignSpans | None = None
        self.exports = False
        """Whether MLflow may send away spans that belong to no run."""

    def install(self, *, exports: bool = False) -> None:
        """Begin to see spans; what others have set up for the SDK, OpenTelemetry and MLflow goes on beside it.

        Args:
            exports: let MLflow send away spans that belong to no run, as it would by itself: for the evaluator.
        """
        self.exports = exports
        provider = install_provider()
        provider.add_capture(self)
        set_tracing_disabled(False)
        self._foreign, bridge = install_mlflow()
        bridge.set_exports(all(each.exports for each in provider.captures))
        install_opentelemetry(self._foreign)
        _trace_tool_guardrails()

    def uninstall(self) -> None:
        """Stop to see spans. When no capture is left, MLflow is as it would be by itself."""
        provider = install_provider()
        provider.remove_capture(self)
        install_mlflow()[1].set_exports(all(each.exports for each in provider.captures))

    def begin(self, run: RunCapture) -> None:
        """Start to file spans with ``run``."""
        self._runs[run.sdk_trace_id] = run

    @contextmanager
    def inside(self, run: RunCapture) -> Iterator[None]:
        """Do the run's work in here: what is made with OpenTelemetry or MLflow is then filed with it, too."""
        run_token = current_run.set(run if run.sampled else None)
        context_token = context_api.attach(self._foreign.anchor(run)) if self._foreign else None
        try:
            yield
        finally:
            if context_token is not None:
                context_api.detach(context_token)
            current_run.reset(run_token)

    def end(self, run: RunCapture) -> None:
        """Stop: what a stray task emits later belongs to no trace any more."""
        self._runs.pop(run.sdk_trace_id, None)
        run.ended = True
        if self._foreign is not None:
            self._foreign.forget(run)
        finish_notes(run)

    def note_tool_error(self, error: BaseException) -> None:
        """Keep why the tool of the current span failed: the SDK's own span says only that it did."""
        span = current_span()
        run = self._run(span) if span else None
        if span and run:
            run.tool_errors[span.span_id] = SpanError(type(error).__name__, str(error))

    def on_span_start(self, span: SdkSpan[Any]) -> None:
        """File the span, with its time."""
        if (run := self._run(span)) is not None and span.span_id not in run.spans:
            below = self._foreign.enclosing(run, span.parent_id) if run.foreign and self._foreign else None
            run.spans[span.span_id] = SdkRecord(span, below)

    def on_span_end(self, span: SdkSpan[Any]) -> None:
        """Note the time."""
        if (run := self._run(span)) is not None and (record := run.spans.get(span.span_id)) is not None:
            record.ended_ns = record.ended_ns or time.time_ns()

    def on_trace_start(self, trace: SdkTrace) -> None:
        """Do nothing: a run's capture begins before its trace does."""

    def on_trace_end(self, trace: SdkTrace) -> None:
        """Do nothing: the runner ends the capture, also for a run that never came to this."""

    def force_flush(self) -> None:
        """Do nothing: nothing is held back here."""

    def shutdown(self) -> None:
        """Do nothing: the outbox writer drains on its own."""

    def _run(self, span: SdkSpan[Any]) -> RunCapture | None:
        """Return the span's run: that of its trace, or, if a tool began a trace of its own, that of its task."""
        run = self._runs.get(span.trace_id) or current_run.get()
        return None if run is None or run.ended else run


def _trace_tool_guardrails() -> None:
    """Let guardrails of tools have spans as those of agents have: the SDK makes none. Again, it changes nothing."""
    for kind in (ToolInputGuardrail, ToolOutputGuardrail):
        run = kind.run
        if not hasattr(run, "__wrapped__"):
            kind.run = _traced(run)  # type: ignore[method-assign]


def _traced(run: Callable[[Any, Any], Awaitable[Any]]) -> Any:
    async def run_in_span(guardrail: Any, data: Any) -> Any:
        with guardrail_span(guardrail.get_name()) as span:
            result = await run(guardrail, data)
            span.span_data.triggered = result.behavior["type"] != "allow"
            return result

    run_in_span.__wrapped__ = run  # type: ignore[attr-defined]
    return run_in_span
