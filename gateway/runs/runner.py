"""One live run, from the request to the committed turn and the finished trace."""

import asyncio
import time
import uuid
from dataclasses import dataclass
from typing import Any

import psycopg
import structlog
from agents import Usage

from gateway.crypto import Keys
from gateway.errors import GatewayError, RunTimeout, ServiceUnavailable, SessionBusy
from gateway.plugins import AgentPlugin
from gateway.runs.execution import AgentExecutor, answer_text
from gateway.runs.sessions import SessionStore
from gateway.settings import Settings
from gateway.tracing.capture import RunCapture, SpanCapture
from gateway.tracing.outbox import OutboxWriter
from gateway.tracing.redaction import Redactor
from gateway.tracing.sampling import keep_session
from gateway.tracing.spans import SpanError, Trace

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class RunRequest:
    """What every accepted body is decoded into."""

    items: list[Any]
    """This turn's new input, as Responses items; never empty."""
    agent: str | None = None
    """``None``: the default agent."""
    session_id: str | None = None
    """``None``: a new session."""
    user: str | None = None


@dataclass(frozen=True)
class RunResult:
    """A run that was answered."""

    answer: str
    output: list[Any]
    """Responses items that the run produced: messages, tool calls and their outputs."""
    session_id: str
    """As the client gave it, or as generated: send it again to go on."""
    trace_id: str
    sampled: bool
    """Whether the trace is kept and scored."""
    usage: Usage
    agent: str
    agent_version: str
    model: str
    offline: bool


class AgentRunner:
    """Runs agents for clients. One a web process."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        executor: AgentExecutor,
        sessions: SessionStore,
        capture: SpanCapture,
        outbox: OutboxWriter,
        redactor: Redactor,
    ):
        self._sample_rate = settings.sample_rate
        self._timeout_s = settings.run_timeout_s
        self._sampling_key = keys.derive("sampling")
        self._executor = executor
        self._sessions = sessions
        self._capture = capture
        self._outbox = outbox
        self._redactor = redactor
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self) -> None:
        """Wait until no run is under way, cancelled ones included: until then traces are still to come."""
        await self._idle.wait()

    async def run(self, request: RunRequest) -> RunResult:
        """Run the agent and return its answer.

        Raises:
            AgentNotFound: there is no such agent; nothing was stored.
            RunError: the run failed; the session is as it was, the trace is kept like any other.
            SessionBusy: another run held the session for longer than this one's whole time.
            ServiceUnavailable: the database is away; the session is as it was.
        """
        plugin = self._executor.plugin(request.agent)
        session_id = request.session_id or f"s-{uuid.uuid4().hex}"
        run = self._begin(plugin, request, session_id)
        try:
            output, usage = await self._answer(plugin, request, run)
        except BaseException as error:
            run.answer = None
            self._finish(run, _run_error(error))
            if isinstance(error, GatewayError):
                error.trace_id = run.trace.trace_id
            raise
        self._finish(run, None)
        model = self._executor.model(plugin.name)
        return RunResult(
            answer=run.answer or "",
            output=output,
            session_id=session_id,
            trace_id=run.trace.trace_id,
            sampled=run.sampled,
            usage=usage,
            agent=plugin.name,
            agent_version=plugin.version,
            model=model.name,
            offline=model.offline,
        )

    def _begin(self, plugin: AgentPlugin, request: RunRequest, session_id: str) -> RunCapture:
        stored_id = self._redactor.identifier(session_id, "session")
        trace = Trace(
            trace_id=f"tr-{uuid.uuid4().hex}",
            agent=plugin.name,
            agent_version=plugin.version,
            session_id=stored_id,
            user_id=self._redactor.identifier(request.user, "user") if request.user else None,
            offline=self._executor.model(plugin.name).offline,
            inclusion_probability=self._sample_rate,
            started_ns=time.time_ns(),
        )
        sampled = keep_session(self._sampling_key, stored_id, self._sample_rate)
        run = RunCapture(trace, request.items, sampled=sampled)
        self._capture.begin(run)
        self._running += 1
        self._idle.clear()
        return run

    def _finish(self, run: RunCapture, error: SpanError | None) -> None:
        self._capture.end(run)
        run.trace.ended_ns = time.time_ns()
        run.trace.error = error
        self._outbox.offer(run)
        self._running -= 1
        if not self._running:
            self._idle.set()

    async def _answer(self, plugin: AgentPlugin, request: RunRequest, run: RunCapture) -> tuple[list[Any], Usage]:
        """Take the session's turn, run, commit; return the new items and the usage."""
        waiting = True
        limit = f"{self._timeout_s:g} s"
        try:
            async with (
                asyncio.timeout(self._timeout_s) as deadline,
                self._sessions.turn(run.trace.session_id) as turn,
            ):
                waiting = False
                result = await self._executor.execute(plugin, turn.history + request.items, run)
                # Not `result.to_input_list()`: a handoff may have rewritten the history that it begins with.
                output = [item.to_input_item() for item in result.new_items]
                run.answer = answer_text(result.final_output)
                deadline.reschedule(None)  # the run is done: a turn that is stored must not be answered as too late
                await self._sessions.commit(turn, request.items + output)
                return output, result.context_wrapper.usage
        except psycopg.OperationalError as error:
            log.error("database away", error=str(error))
            raise ServiceUnavailable(
                "The gateway cannot reach its database, so it cannot load or keep the session. Try again shortly."
            ) from error
        except TimeoutError:
            if waiting:
                raise SessionBusy(
                    f"Another request held this session's turn for {limit}. Send one turn at a time, or try again."
                ) from None
            raise RunTimeout(
                f"The run took longer than {limit}. Ask for less at once, or raise GATEWAY_RUN_TIMEOUT_S."
            ) from None


def _run_error(error: BaseException) -> SpanError:
    """Return what the trace says of a run that was not answered."""
    if isinstance(error, asyncio.CancelledError):
        return SpanError("CANCELLED", "The run was cancelled before it was answered.")
    if isinstance(error, GatewayError):
        return SpanError(error.code, str(error.__cause__ or error))
    return SpanError(type(error).__name__, str(error))
