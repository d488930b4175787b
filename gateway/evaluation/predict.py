"""The agents as predict functions for ``mlflow.genai.evaluate``.

The same agent, model and span tree as live; no session and no outbox: each row of a dataset carries the conversation
it asks. What is written to MLflow is redacted as it is live.
"""

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import mlflow
from mlflow.entities import SpanEvent, SpanType
from mlflow.entities.span_status import SpanStatusCode

from gateway.crypto import load_keys
from gateway.errors import RunError
from gateway.plugins import load_agents
from gateway.runs.execution import AgentExecutor
from gateway.settings import Settings, load_settings
from gateway.tracing import messages as chat
from gateway.tracing.capture import RunCapture, SpanCapture, assemble
from gateway.tracing.redaction.redactor import Redactor
from gateway.tracing.spans import Span, SpanError, Trace

Answer = dict[str, Any]


class Predictor:
    """Runs one agent on rows of a dataset, from any thread and any event loop.

    The runs share one event loop in a thread of its own: MLflow calls each row with a new loop, and a model's HTTP
    connections belong to the loop that opened them.
    """

    def __init__(self, settings: Settings, agent: str):
        # What a tool makes with MLflow belongs below our spans; what MLflow makes around the runs is written as ever.
        self._capture = SpanCapture()
        self._capture.install(exports=True)
        self._executor = AgentExecutor(settings, load_agents(settings.agents_dir), self._capture)
        self._plugin = self._executor.plugin(agent)
        self._redactor = Redactor(load_keys(settings).derive("redaction"), settings.redact_patterns)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name=f"predict-{agent}", daemon=True).start()

    def predict(self, messages: list[dict[str, Any]]) -> Answer:
        """Return the agent's answer to chat messages, as ``{"messages": [...]}``; its spans join MLflow's trace."""
        with self._recorded(messages) as run:
            asyncio.run_coroutine_threadsafe(self._run(messages, run), self._loop).result()
        return _answer(run)

    async def predict_async(self, messages: list[dict[str, Any]]) -> Answer:
        """Do what `predict` does, awaited."""
        with self._recorded(messages) as run:
            await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._run(messages, run), self._loop))
        return _answer(run)

    async def _run(self, messages: list[dict[str, Any]], run: RunCapture) -> None:
        outcome = await self._executor.execute(self._plugin, chat.to_items(messages), run)
        run.answer, run.left_open = outcome.answer, outcome.items if outcome.answer is None else []

    @contextlib.contextmanager
    def _recorded(self, messages: list[dict[str, Any]]) -> Any:
        """Capture a run and write its spans below a span of MLflow's own."""
        trace = Trace(
            trace_id=f"tr-{uuid.uuid4().hex}",
            agent=self._plugin.name,
            agent_version=self._plugin.version,
            session_id=uuid.uuid4().hex,
            user_id=None,
            offline=self._executor.model(self._plugin.name).offline,
            started_ns=time.time_ns(),
        )
        run = RunCapture(trace, chat.to_items(messages), sampled=True)
        self._capture.begin(run)
        failure = None
        with mlflow.start_span(name=trace.agent, span_type=SpanType.AGENT) as root:
            try:
                yield run
            except RunError as error:
                failure = error
                trace.error = SpanError(error.code, str(error.__cause__ or error))
            self._capture.end(run)
            trace.ended_ns = time.time_ns()
            _write(self._redactor.trace(assemble(run)), root)
        if failure is not None:
            # Behind the span, and without its cause: MLflow writes down what leaves a span, with its whole stack trace.
            raise type(failure)(str(failure)) from None


def predict_fn(
    agent: str, *, asynchronous: bool = False, settings: Settings | None = None
) -> Callable[..., Answer] | Callable[..., Awaitable[Answer]]:
    """Return a predict function for rows whose inputs are ``{"messages": [chat messages]}``.

    Args:
        agent: name of the agent's folder.
        asynchronous: return an ``async def`` function instead of a plain one.
        settings: ``None`` reads them as the ``gateway`` command does.

    Raises:
        ConfigurationError: the agent cannot be loaded or lacks a model.
        AgentNotFound: there is no such agent.
    """
    predictor = Predictor(settings or load_settings(), agent)

    # Plain functions: MLflow looks at their kind and their parameters, and a bound method would pass for neither.
    async def predict_async(messages: list[dict[str, Any]]) -> Answer:
        return await predictor.predict_async(messages)

    def predict(messages: list[dict[str, Any]]) -> Answer:
        return predictor.predict(messages)

    return predict_async if asynchronous else predict


def _answer(run: RunCapture) -> Answer:
    return {"messages": [{"role": "assistant", "content": run.answer or ""}]}


def _write(trace: Trace, root: Any) -> None:
    """Write the spans of ``trace`` below ``root``, which stands for the trace's own root."""
    root.set_inputs(trace.spans[0].inputs)
    root.set_outputs(trace.spans[0].outputs)
    _write_error(trace.spans[0].error, root)
    written = {trace.spans[0].span_id: root}
    for span in trace.spans[1:]:
        written[span.span_id] = _write_span(span, written.get(span.parent_id or "", root))


def _write_span(span: Span, parent: Any) -> Any:
    live = mlflow.start_span_no_context(
        name=span.name, span_type=span.kind, parent_span=parent, inputs=span.inputs, start_time_ns=span.start_ns
    )
    live.set_attributes({key: value for key, value in span.attributes.items() if value is not None})
    _write_error(span.error, live)
    live.end(outputs=span.outputs, end_time_ns=span.end_ns)
    return live


def _write_error(error: SpanError | None, live: Any) -> None:
    if error is not None:
        reason = {"exception.type": error.type, "exception.message": error.message}
        live.add_event(SpanEvent("exception", attributes=reason))
    live.set_status(SpanStatusCode.ERROR if error else SpanStatusCode.OK)
