"""MLflow's own interfaces inside a run: ``mlflow.trace``, ``start_span``, ``update_current_trace``, autologging.

Their spans are OpenTelemetry's, so `foreign` files them; what is left is to let MLflow find them again, and to keep
its exporters away from them. Importing MLflow takes seconds, and most agents do not use it: nothing here imports it
before somebody else has. A tool may do so as late as in its first call, so the import itself is the moment to step in.
"""

import importlib
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from gateway.tracing.capture.foreign import ForeignSpans
from gateway.tracing.capture.recording import RunCapture

_PROVIDER = "mlflow.tracing.provider"
_OURS = ("mlflow.", "gateway.")
_AUTHORS = "mlflow.source."  # where an author says which version of its code this was
_BUFFER = {"MLFLOW_TRACE_BUFFER_MAX_SIZE": "100000", "MLFLOW_TRACE_BUFFER_TTL_SECONDS": "86400"}
_URI = "MLFLOW_TRACKING_URI"
_UNUSED_URI = "http://localhost:5000"
_EXPERIMENT = "0"  # MLflow wants one named; the evaluator writes to the right one


class MlflowBridge(MetaPathFinder):
    """Steps in when MLflow's tracing is imported, or at once if it has been. One a process."""

    def __init__(self, spans: ForeignSpans):
        self.spans = spans
        self.exports = True
        """Whether MLflow may send away spans that belong to no run, as it would by itself."""

    def install(self) -> None:
        """Begin."""
        sys.meta_path.insert(0, self)
        if (module := sys.modules.get(_PROVIDER)) is not None:
            self._adopt(module)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Let the one module be loaded as always, and step in right after."""
        if fullname != _PROVIDER or (spec := PathFinder.find_spec(fullname, path, target)) is None:
            return None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_adopt(module: ModuleType) -> None:
            execute(module)
            self._adopt(module)

        loader.exec_module = execute_and_adopt
        return spec

    def set_exports(self, exports: bool) -> None:
        """Say whether MLflow may send away spans that belong to no run."""
        # One set of tracers and one current span for MLflow and OpenTelemetry. MLflow reads it at each call.
        os.environ["MLFLOW_USE_DEFAULT_TRACER_PROVIDER"] = "false"
        for name, value in _BUFFER.items():  # by default MLflow forgets all but a thousand runs under way
            os.environ.setdefault(name, value)
        # Without one MLflow looks for a database of its own, and fails where only `mlflow-tracing` is there. Nothing is
        # sent to it.
        if exports and os.environ.get(_URI) == _UNUSED_URI:
            del os.environ[_URI]
        elif not exports:
            os.environ.setdefault(_URI, _UNUSED_URI)
        was, self.exports = self.exports, exports
        if exports and not was and (module := sys.modules.get(_PROVIDER)) is not None:
            module.provider.once._done = False  # noqa: SLF001 - its exporters were not set up, and now may be

    def _adopt(self, module: ModuleType) -> None:
        """Let MLflow use our processor, and its own only outside of runs."""
        make, reset = module._get_span_processors, module.provider.reset  # noqa: SLF001

        def processors(disabled: bool = False) -> list[Any]:
            if not self.exports:
                return [self.spans]  # whatever an agent's module sets up
            return [] if disabled else [self.spans, *map(self._outside_only, make())]

        def reset_unless_ours() -> None:
            if self.exports:
                reset()  # takes OpenTelemetry's global provider away

        module._get_span_processors = processors  # type: ignore[attr-defined]  # noqa: SLF001
        module.provider.reset = reset_unless_ours
        self.spans.on_register = self._register

    def _outside_only(self, processor: Any) -> Any:
        """Return MLflow's processor, deaf to spans of runs."""
        start, end = processor.on_start, processor.on_end

        def on_start(span: Any, parent_context: Any = None) -> None:
            if self.exports and self.spans.run_of(parent_context) is None:
                start(span, parent_context)

        def on_end(span: Any) -> None:
            if self.exports and not self.spans.owns(span):
                end(span)

        # On the object, not around it: MLflow looks for processors of its own type, to flush and retire them.
        processor.on_start, processor.on_end = on_start, on_end
        return processor

    def _register(self, run: RunCapture, span: Any) -> None:
        """Make the span known to MLflow, with the run's trace if it is the first."""
        entities, manager = importlib.import_module("mlflow.entities"), _manager()
        trace_id = run.trace.trace_id
        if run.notes is None:
            run.notes = entities.TraceInfo(
                trace_id=trace_id,
                trace_location=entities.TraceLocation.from_experiment_id(_EXPERIMENT),
                request_time=run.trace.started_ns // 1_000_000,
                state=entities.TraceState.IN_PROGRESS,
                trace_metadata={},
                tags={},
            )
            # By a number that is the run's alone: the trace id that the caller sees may be that of several.
            manager.register_trace(int(run.stem, 16), run.notes)
        span_id = f"{span.get_span_context().span_id:016x}"
        if manager.get_span_from_id(trace_id, span_id) is None:
            manager.register_span(entities.LiveSpan(span, trace_id))


def finish_notes(run: RunCapture) -> None:
    """Put what was said of the whole trace on it, and let MLflow forget the run."""
    if (info := run.notes) is None:
        return
    trace, run.notes = run.trace, None
    trace.tags = _authors(info.tags)
    trace.metadata = _authors(info.trace_metadata)
    trace.client_request_id = info.client_request_id
    trace.request_preview, trace.response_preview = info.request_preview, info.response_preview
    manager = _manager()
    with manager.get_trace(trace.trace_id) as known:
        if known is not None:
            known.span_dict.clear()  # else each would be copied on the way out
    manager.pop_trace(int(run.stem, 16))


def install_mlflow() -> tuple[ForeignSpans, MlflowBridge]:
    """Return the one of each that this process has; made and installed at the first call."""
    for finder in sys.meta_path:
        if isinstance(finder, MlflowBridge):
            return finder.spans, finder
    bridge = MlflowBridge(ForeignSpans())
    bridge.install()
    return bridge.spans, bridge


def _authors(entries: dict[str, Any]) -> dict[str, str]:
    """Return what an author may set: session, user, versions and the like are the gateway's to say."""
    return {key: str(value) for key, value in entries.items() if key.startswith(_AUTHORS) or not key.startswith(_OURS)}


def _manager() -> Any:
    return importlib.import_module("mlflow.tracing.trace_manager").InMemoryTraceManager.get_instance()
