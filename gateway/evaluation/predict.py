"""The agents as predict functions for ``mlflow.genai.evaluate``.

The same agent, model and span tree as live; no session and no outbox: each row of a dataset carries the conversation
it asks. What is written to MLflow is redacted as it is live.
"""

import asyncio
import contextlib
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import mlflow
from mlflow.entities import SpanEvent, SpanType
from mlflow.entities import Trace as MlflowTrace
from mlflow.entities.span_status import SpanStatus, SpanStatusCode
from mlflow.tracing.constant import SpanAttributeKey, TraceMetadataKey

from gateway.crypto import load_keys
from gateway.errors import GatewayError, RunError, RunFailed, RunTimeout
from gateway.evaluation.offline.replay import Replay, current_replay, replayed
from gateway.plugins import AgentPlugin, load_agents
from gateway.runs.execution import AgentExecutor
from gateway.runs.models import ChosenModel
from gateway.settings import Settings, load_settings
from gateway.tracing import messages as chat
from gateway.tracing.capture import RunCapture, SpanCapture, assemble
from gateway.tracing.redaction.redactor import Redactor
from gateway.tracing.spans import Span, SpanError, Trace

Answer = dict[str, Any]

_MADE_ANEW = frozenset(
    {
        SpanAttributeKey.REQUEST_ID,
        SpanAttributeKey.SPAN_TYPE,
        SpanAttributeKey.INPUTS,
        SpanAttributeKey.OUTPUTS,
    }
)
_SAID_BY_AGENT = frozenset({"assistant", "tool"})


class Predictor:
    """Runs one agent on rows of a dataset, from any thread and any event loop.

    The runs share one event loop in a thread of its own: MLflow calls each row with a new loop, and a model's HTTP
    connections belong to the loop that opened them.
    """

    def __init__(self, settings: Settings, agent: str):
        """Load the agent.

        Raises:
            ConfigurationError: it cannot be loaded or lacks a model.
            AgentNotFound: there is no such agent.
        """
        # What a tool makes with MLflow belongs below our spans; what MLflow makes around the runs is written as ever.
        self._settings = settings
        self._capture = SpanCapture()
        self._capture.install(exports=True)
        try:
            self._executor = AgentExecutor(settings, load_agents(settings.agents_dir), self._capture)
            self.plugin: AgentPlugin = self._executor.plugin(agent)
        except GatewayError:
            self._capture.uninstall()
            raise
        self.redactor = Redactor(load_keys(settings).derive("redaction"), settings.redact_patterns)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name=f"predict-{agent}", daemon=True).start()

    @cached_property
    def _replaying(self) -> AgentExecutor:
        """The same agent with tools that answer from a recording: made when the first row wants it."""
        plugin = replace(self.plugin, agent=replayed(self.plugin.agent))
        settings = self._settings.model_copy(update={"default_agent": None})
        return AgentExecutor(settings, {plugin.name: plugin}, self._capture)

    @property
    def model(self) -> ChosenModel:
        """The model that answers for the agent."""
        return self._executor.model(self.plugin.name)

    def predict(self, messages: list[dict[str, Any]]) -> Answer:
        """Return the agent's answer to chat messages, as ``{"messages": [...]}``; its spans join MLflow's trace."""
        with self._recorded(messages, None) as run:
            asyncio.run_coroutine_threadsafe(self._run(messages, run, None), self._loop).result()
        return _answer(run)

    async def predict_async(
        self, messages: list[dict[str, Any]], *, session_id: str | None = None, replay: Replay | None = None
    ) -> Answer:
        """Do what `predict` does, awaited. When it is cancelled, as after a timeout, the run and its trace end.

        Args:
            messages: the conversation, as chat messages.
            session_id: what placeholders on the trace are comparable within; ``None``: a session of its own.
            replay: gives the results of tools in their place; ``None``: the agent's tools run.

        Raises:
            RunError: the agent did not answer, or left what was recorded.
        """
        with self._recorded(messages, session_id) as run:
            work = asyncio.run_coroutine_threadsafe(self._run(messages, run, replay), self._loop)
            await asyncio.wrap_future(work)
        return _answer(run)

    def recall(
        self,
        messages: list[dict[str, Any]],
        outputs: Any,
        *,
        session_id: str,
        recorded: MlflowTrace | None,
    ) -> Answer:
        """Return an answer that was given earlier, with a trace like that of the run that gave it; nothing is run.

        Args:
            messages: the conversation, as chat messages.
            outputs: the answer: a text, or ``{"messages": [...]}``.
            session_id: what placeholders on the trace are comparable within.
            recorded: the run's own trace, whose spans are copied; ``None``: it is not there any more.
        """
        answer = {"messages": [{"role": "assistant", "content": outputs}]} if isinstance(outputs, str) else outputs
        asked, answered = self.redactor.value([{"messages": _turn(messages)}, answer], session_id)
        root = _begin(self._new_trace(session_id), asked)
        if recorded is not None:
            _copy(recorded, root)
        root.set_status(SpanStatusCode.OK)
        root.end(outputs=answered)
        return dict(answered)

    async def _run(self, messages: list[dict[str, Any]], run: RunCapture, replay: Replay | None) -> None:
        current_replay.set(replay)  # of this task alone
        executor = self._executor if replay is None else self._replaying
        outcome = await executor.execute(executor.plugin(self.plugin.name), chat.to_items(messages), run)
        if replay is not None and replay.missed:
            raise RunFailed(
                f"The agent called {', '.join(replay.missed)} in a way that was not recorded, so that there is no "
                "result to give it. Run the case with real data, or take it out."
            )
        run.answer, run.left_open = outcome.answer, outcome.items if outcome.answer is None else []

    @contextlib.contextmanager
    def _recorded(self, messages: list[dict[str, Any]], session_id: str | None) -> Iterator[RunCapture]:
        """Capture a run, and write its spans to MLflow when it has ended: with its times, not those of the writing."""
        trace = self._new_trace(session_id)
        run = RunCapture(trace, chat.to_items(_turn(messages)), sampled=True)
        self._capture.begin(run)
        failure: RunError | asyncio.CancelledError | None = None
        try:
            yield run
        except RunError as error:
            failure = error
            trace.error = SpanError(error.code, str(error.__cause__ or error))
        except asyncio.CancelledError as cancelled:
            failure = cancelled
            trace.error = SpanError(RunTimeout.code, "The run was ended before it had an answer.")
        self._capture.end(run)
        trace.ended_ns = time.time_ns()
        _write(self.redactor.trace(assemble(run)))
        if isinstance(failure, asyncio.CancelledError):
            raise failure
        if failure is not None:
            # Without its cause, which may quote what the user wrote: MLflow keeps what a predict function raises.
            raise type(failure)(str(failure)) from None

    def _new_trace(self, session_id: str | None) -> Trace:
        return Trace(
            trace_id=f"tr-{uuid.uuid4().hex}",
            agent=self.plugin.name,
            agent_version=self.plugin.version,
            session_id=session_id or uuid.uuid4().hex,
            user_id=None,
            offline=self.model.offline,
            started_ns=time.time_ns(),
        )


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


def _turn(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the new messages, as a live run has them on its root: those behind the last word of the agent."""
    last = max((at for at, each in enumerate(messages) if each.get("role") in _SAID_BY_AGENT), default=-1)
    return messages[last + 1 :] or messages


def _answer(run: RunCapture) -> Answer:
    if run.answer is None and run.left_open:
        return {"messages": [chat.answer(run.left_open)]}
    return {"messages": [{"role": "assistant", "content": run.answer or ""}]}


def _begin(trace: Trace, inputs: Any) -> Any:
    """Begin MLflow's trace, which says of itself what a live one says; return its root."""
    about = {
        TraceMetadataKey.TRACE_SESSION: trace.session_id,
        "gateway.agent": trace.agent,
        "gateway.agent_version": trace.agent_version,
        "gateway.offline": str(trace.offline).lower(),
    }
    return mlflow.start_span_no_context(
        name=trace.agent,
        span_type=SpanType.AGENT,
        inputs=inputs,
        tags={"agent": trace.agent},
        metadata=about,
        start_time_ns=trace.started_ns,
    )


def _write(trace: Trace) -> None:
    """Write a redacted trace to MLflow."""
    first = trace.spans[0]
    root = _begin(trace, first.inputs)
    root.set_attributes(_given(first))
    _write_error(first.error, root)
    written = {first.span_id: root}
    for span in trace.spans[1:]:
        written[span.span_id] = _write_span(span, written.get(span.parent_id or "", root))
    root.end(outputs=first.outputs, end_time_ns=first.end_ns)


def _write_span(span: Span, parent: Any) -> Any:
    live = mlflow.start_span_no_context(
        name=span.name, span_type=span.kind, parent_span=parent, inputs=span.inputs, start_time_ns=span.start_ns
    )
    live.set_attributes(_given(span))
    _write_error(span.error, live)
    live.end(outputs=span.outputs, end_time_ns=span.end_ns)
    return live


def _copy(recorded: MlflowTrace, root: Any) -> None:
    """Copy the spans of a recorded trace below ``root``, which stands for its root."""
    written = {span.span_id: root for span in recorded.data.spans if span.parent_id is None}
    for span in sorted(recorded.data.spans, key=lambda each: each.start_time_ns):
        if span.span_id in written:
            continue
        live = mlflow.start_span_no_context(
            name=span.name,
            span_type=span.span_type,
            parent_span=written.get(span.parent_id, root),
            inputs=span.inputs,
            start_time_ns=span.start_time_ns,
        )
        kept = {key: value for key, value in span.attributes.items() if key not in _MADE_ANEW}
        live.set_attributes(kept)
        for event in span.events:
            live.add_event(event)
        live.set_status(span.status)
        live.end(outputs=span.outputs, end_time_ns=span.end_time_ns)
        written[span.span_id] = live


def _given(span: Span) -> dict[str, Any]:
    return {key: value for key, value in span.attributes.items() if value is not None}


def _write_error(error: SpanError | None, live: Any) -> None:
    if error is None:
        live.set_status(SpanStatusCode.OK)
        return
    reason = {"exception.type": error.type, "exception.message": error.message}
    live.add_event(SpanEvent("exception", attributes=reason))
    live.set_status(SpanStatus(SpanStatusCode.ERROR, error.message))
