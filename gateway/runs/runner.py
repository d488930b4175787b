"""Runs under way: from the request to the committed turn and the finished trace.

Each run is a task of its own, that belongs to the runner and not to the connection it came over. So it can outlive its
client, be ended by a newer request in another process, and always hands over a whole trace.
"""

import asyncio
import time
import uuid
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from typing import Any, NamedTuple

import psycopg
import structlog

from gateway.crypto import Keys
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    Overloaded,
    RequestError,
    RunCancelled,
    RunError,
    RunFailed,
    RunTimeout,
    ServiceUnavailable,
    SessionBusy,
)
from gateway.plugins import AgentPlugin
from gateway.reloading import LiveSettings
from gateway.runs.active import STOPPING, ActiveRun
from gateway.runs.execution import AgentExecutor, Outcome
from gateway.runs.history import join, open_calls
from gateway.runs.line import Statement
from gateway.runs.pauses import PausedRuns
from gateway.runs.requests import Run, RunRequest, RunResult, TokenUsage
from gateway.runs.responses import ResponseStore, Status
from gateway.runs.sessions import SessionStore, Turn
from gateway.settings import Settings
from gateway.storage.signals import STOP_RESPONSE, STOP_RUN, Signals
from gateway.tracing.capture import RunCapture, SpanCapture
from gateway.tracing.handover.outbox import OutboxWriter
from gateway.tracing.redaction.redactor import Redactor
from gateway.tracing.sampling import Draw, keep_session, rate_of
from gateway.tracing.spans import SpanError, Trace

log = structlog.get_logger(__name__)

_INTERRUPTED = "A newer request on this session ended this run. The session is as it was before it."
CANCELLED = "The response was cancelled on request. The session is as it was before it."
"""What the client of a run is told that was cancelled by its id."""


class _Place(NamedTuple):
    """What a request goes on with."""

    session_id: str
    follows: int | None = None
    """Turn that it follows; ``None``: the last one."""
    agent: str | None = None
    """Agent that answers; ``None``: the default one."""
    is_new: bool = False
    """The id was made for this request: nobody else can know it yet."""


class AgentRunner:
    """Runs agents for clients. One a web process."""

    def __init__(
        self,
        live: LiveSettings,
        keys: Keys,
        executor: AgentExecutor,
        sessions: SessionStore,
        responses: ResponseStore,
        paused: PausedRuns,
        signals: Signals,
        capture: SpanCapture,
        outbox: OutboxWriter,
        redactor: Redactor,
    ):
        self._live = live
        self._settings: Settings = live.now
        """As they were at the start: what may change while running is asked of ``live``."""
        self._sampling_key = keys.derive("sampling")
        self._executor = executor
        self._sessions = sessions
        self._responses = responses
        self._paused = paused
        self._capture = capture
        self._outbox = outbox
        self._redactor = redactor
        self._active: dict[str, ActiveRun] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopping = False
        self.changed_at = time.time()
        """When the process last became busy or idle, seconds since the epoch."""
        signals.on(STOP_RUN, lambda trace_id: self.stop(trace_id, _INTERRUPTED))
        signals.on(STOP_RESPONSE, lambda trace_id: self.stop(trace_id, CANCELLED))

    @property
    def busy(self) -> bool:
        """Whether a run is under way."""
        return bool(self._active)

    async def end(self, within_s: float) -> None:
        """Take no more runs, let those under way finish for ``within_s``, then end them and wait for their traces."""
        self._stopping = True
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), within_s)
        for active in list(self._active.values()):
            active.cancel(ServiceUnavailable(STOPPING))
        await self._idle.wait()

    async def run(self, request: RunRequest) -> RunResult:
        """Run the agent and return its answer; the errors are those of `start` and `ActiveRun.result`."""
        return await (await self.start(request)).result()

    async def start(self, request: RunRequest) -> ActiveRun:
        """Begin a run.

        Raises:
            AgentNotFound: there is no such agent; nothing was stored.
            InvalidRequest: the client's tools cannot be offered.
            ResponseNotFound, ApprovalNotFound: what the request goes on with is not there.
            Overloaded: there are as many runs as the process may have.
            ServiceUnavailable: the process is stopping, or the database is away.

        The run then ends with one of these, or a result:
            RunError: the run failed; the session is as it was, the trace is kept like any other.
            SessionBusy: another run had the session for longer than this one's whole time, or the policy is to reject.
            SessionNotFound: the session belongs to another key.
            ServiceUnavailable: the database is away; the session is as it was.
        """
        self._admit()
        try:
            if any(item.get("type") == "item_reference" for item in request.items):
                items = await self._responses.resolve(request.items, request.key_id)
                request = replace(request, items=items)
            place = await self._place(request)
            plugin = self._executor.plugin(place.agent)
            self._executor.check(plugin, request.options)
            self._admit()  # others may have come in the meantime
            active = self._begin(plugin, request, place.session_id)
            try:
                if request.render and _is_announced(request):
                    body = request.render(active.run, None)
                    await self._responses.execute([self._response(active, "in_progress", body, None)])
            except BaseException:
                self._finish(active, None, counts=False)
                raise
        except psycopg.OperationalError as error:
            raise _database_away(error) from error
        active.start(asyncio.create_task(self._carry_out(active, plugin, place), name=active.run.trace_id))
        return active

    def stop(self, trace_id: str, reason: str) -> None:
        """End the run of that trace, if it is under way in this process."""
        if active := self._active.get(trace_id):
            active.cancel(RunCancelled(reason))

    def _admit(self) -> None:
        if self._stopping:
            raise ServiceUnavailable(STOPPING)
        if len(self._active) >= self._settings.max_concurrent_runs:
            raise Overloaded(
                f"This process has {len(self._active)} runs under way, which is all it may have. Try again shortly."
            )

    async def _place(self, request: RunRequest) -> _Place:
        session_id, follows = request.session_id, None
        if request.previous_response_id is not None:
            session_id, follows = await self._responses.place(request.previous_response_id, request.key_id)
        if not request.approvals:
            is_new = session_id is None
            return _Place(session_id or f"s-{uuid.uuid4().hex}", follows, request.agent, is_new)
        paused = await self._paused.find(request.approvals[0].approval_id, request.key_id)
        if None not in {request.agent, paused.agent} and request.agent != paused.agent:
            raise InvalidRequest(f"The run that waits for this approval is one of the agent {paused.agent!r}.", "model")
        # Never a fork's: the run that waits is the last turn, or it is over.
        return _Place(session_id or paused.session_id, None, paused.agent or request.agent)

    def _begin(self, plugin: AgentPlugin, request: RunRequest, session_id: str) -> ActiveRun:
        stored_id = self._redactor.identifier(session_id, "session")
        model = self._executor.model(plugin.name)
        now = time.time()
        trace = Trace(
            trace_id=f"tr-{uuid.uuid4().hex}",
            agent=plugin.name,
            agent_version=plugin.version,
            session_id=stored_id,
            user_id=self._redactor.identifier(request.user, "user") if request.user else None,
            key_id=request.key_id,
            offline=model.offline,
            started_ns=int(now * 1e9),
        )
        capture = RunCapture(
            trace,
            _asked(request),
            sampled=False,
            client_tools=request.options.client_tools,
            traceparent=request.traceparent,
            tracestate=request.tracestate,
        )
        self._capture.begin(capture)
        run = Run(
            trace_id=trace.trace_id,
            session_id=session_id,
            agent=plugin.name,
            agent_version=plugin.version,
            model=model.name,
            offline=model.offline,
            sampled=False,
            created_at=now,
        )
        active = ActiveRun(request, run, capture, Draw(0.0, drawn=False, asked=request.keep_trace))
        self._draw(active, None)
        if not self._active:
            self.changed_at = now
        self._active[trace.trace_id] = active
        self._idle.clear()
        return active

    async def _carry_out(self, active: ActiveRun, plugin: AgentPlugin, place: _Place) -> None:
        """Run to the end, whatever that is; tell the client and hand over the trace."""
        outcome: RunResult | GatewayError
        try:
            outcome = await self._answer(active, plugin, place)
            error = None
        except BaseException as raised:  # noqa: BLE001 - the task ends here, and its client must hear of it
            active.settling = True
            outcome = active.reason(raised) or _public(raised)
            error = _trace_error(raised, outcome)
            if active.counts(outcome):
                outcome.trace_id = active.run.trace_id
            active.capture.answer = None
            try:
                await self._store_failure(active, outcome)
            except Exception:
                log.exception("that a response has failed could not be noted", trace_id=active.run.trace_id)
        self._finish(active, error, counts=active.counts(outcome))
        active.end(outcome)

    def _finish(self, active: ActiveRun, error: SpanError | None, *, counts: bool) -> None:
        capture = active.capture
        self._capture.end(capture)
        capture.trace.ended_ns = time.time_ns()
        capture.trace.error = error
        if counts:
            if not active.executed:
                self._outbox.begin(active.run.agent)
            self._outbox.offer(capture, active.draw)
        self._active.pop(active.run.trace_id)
        if not self._active:
            self.changed_at = time.time()
            self._idle.set()

    async def _answer(self, active: ActiveRun, plugin: AgentPlugin, place: _Place) -> RunResult:
        """Take the session's turn, run, commit; return what the client gets."""
        timeout_s = self._settings.run_timeout_s
        try:
            async with asyncio.timeout(timeout_s) as deadline, AsyncExitStack() as stack:
                active.enter()
                turn = await self._turn(active, place, stack)
                active.check()
                self._draw(active, turn.rate)
                active.took_turn = True
                active.begun.set()
                outcome = await self._execute(active, plugin, turn)
                result = _result(active.run, outcome)
                # The run is done: a turn that is stored must not be answered as too late, nor as cancelled.
                deadline.reschedule(None)
                active.settling = True
                await self._commit(active, turn, outcome, result)
                return result
        except psycopg.OperationalError as error:
            raise _database_away(error) from error
        except TimeoutError:
            if not active.took_turn:
                raise SessionBusy(
                    f"Another request held this session's turn for {timeout_s:g} s. Send one turn at a time, or try "
                    "again."
                ) from None
            raise RunTimeout(
                f"The run took longer than {timeout_s:g} s. Ask for less at once, or raise GATEWAY_RUN_TIMEOUT_S."
            ) from None

    async def _turn(self, active: ActiveRun, place: _Place, stack: AsyncExitStack) -> Turn:
        """Return the turn that the run is to have, held until ``stack`` is left if it is to be remembered."""
        request, session_id, owner = active.request, active.capture.trace.session_id, active.run.trace_id
        follows, user_id = place.follows, active.capture.trace.user_id
        # Nobody hears of its id before the answer, and by no user's name can it be asked to be forgotten.
        if place.is_new and not (_is_announced(request) or (user_id and request.remember)):
            return self._sessions.begin(session_id, owner, key_id=request.key_id)
        if not request.remember and not request.approvals:
            earlier = await self._sessions.peek(
                session_id, key_id=request.key_id, last=follows, continues=request.answers_calls
            )
            return Turn(session_id, 0, owner, request.key_id, earlier)
        key_id = request.key_id
        if follows is None:
            policy = self._settings.session_policy
            held = self._sessions.turn(
                session_id, owner, key_id=key_id, policy=policy, continues=request.answers_calls, user_id=user_id
            )
            return await stack.enter_async_context(held)
        held = self._sessions.after(
            session_id, follows, owner, key_id=key_id, continues=request.answers_calls, user_id=user_id
        )
        turn = await stack.enter_async_context(held)
        if turn.session_id != session_id:  # a fork's: the run belongs to it from the start
            active.run.session_id = active.capture.trace.session_id = turn.session_id
        return turn

    def _draw(self, active: ActiveRun, rate: float | None) -> None:
        """Decide whether the run is captured.

        Args:
            active: the run, its session known.
            rate: the one that its session's first turn was drawn by; ``None``: this is the first, or nobody knows.
        """
        settings, run, capture = self._live.now, active.run, active.capture
        rate = rate_of(settings, run.agent) if rate is None else rate
        drawn = keep_session(self._sampling_key, capture.trace.session_id, rate)
        active.draw = Draw(rate, drawn, asked=active.request.keep_trace)
        run.sampled = drawn and settings.tracing
        # A tail rule knows only at the end whether it wants the trace.
        capture.sampled = settings.tracing and (drawn or bool(settings.tail_rules))

    async def _execute(self, active: ActiveRun, plugin: AgentPlugin, turn: Turn) -> Outcome:
        request = active.request
        emit = active.emit if request.stream else None
        if request.approvals:
            snapshot, decisions = await self._paused.take(turn, request.approvals)
            self._begin_to_execute(active)
            outcome = await self._executor.resume(plugin, snapshot, decisions, active.capture, request.options, emit)
        else:
            history = turn.history if request.transcript is None else request.transcript
            items = join(history, request.items)
            self._begin_to_execute(active)
            # The end of the list is the request's own, unless what is there answers calls of the turns before.
            earlier = 0 if request.answers_calls else max(len(items) - len(request.items), 0)
            outcome = await self._executor.execute(
                plugin, items, active.capture, request.options, emit, history=earlier
            )
        active.capture.answer = outcome.answer
        active.capture.left_open = outcome.items if outcome.answer is None else []
        active.capture.waiting_tools = frozenset(each.tool for each in outcome.approvals)
        return outcome

    def _begin_to_execute(self, active: ActiveRun) -> None:
        """Count the run as served: from here on it is in the ledger, whatever comes."""
        active.executed = True
        self._outbox.begin(active.run.agent)

    async def _commit(self, active: ActiveRun, turn: Turn, outcome: Outcome, result: RunResult) -> None:
        """Keep the turn, the response and the paused run, all or none."""
        request, run = active.request, active.run
        remember = request.remember or bool(request.approvals)
        also: list[Statement] = []
        if remember and open_calls(turn.history):
            also += self._paused.drop(turn)
        if remember and outcome.snapshot is not None:
            also += self._paused.keep(turn, run.trace_id, run.agent, outcome.snapshot, outcome.approvals)
        if request.render is not None:
            body = request.render(run, result)
            also.append(self._response(active, "completed", body, turn.number if remember else None))
        if remember:
            await self._sessions.commit(
                turn,
                [*request.items, *outcome.items],
                trace_id=run.trace_id,
                user_id=active.capture.trace.user_id,
                continues=request.answers_calls,
                also=also,
            )
        elif also:
            await self._responses.execute(also)

    def _response(self, active: ActiveRun, status: Status, body: dict[str, Any], turn: int | None) -> Statement:
        trace = active.capture.trace
        return self._responses.put(
            active.run,
            active.request,
            body,
            status=status,
            session_id=trace.session_id,
            user_id=trace.user_id,
            turn=turn,
            known=status != "in_progress" and _is_announced(active.request),
        )

    async def _store_failure(self, active: ActiveRun, error: GatewayError) -> None:
        """Note in the stored response that its run failed, so that nobody waits for it."""
        request = active.request
        if request.render is None or not _is_announced(request):
            return
        status: Status = "cancelled" if isinstance(error, RunCancelled) else "failed"
        await self._sessions.settle([self._response(active, status, request.render(active.run, error), None)])


def _is_announced(request: RunRequest) -> bool:
    """Whether the response is stored before the run is done: its client may ask for it."""
    return request.background or request.stream


def _asked(request: RunRequest) -> list[Any]:
    """Return what the trace shows as the turn's input: a decision that a person took is the system's to tell."""
    told = ("approved" if each.approve else "not approved" for each in request.approvals)
    return request.items or [{"role": "system", "content": f"The call was {what}."} for what in told]


def _result(run: Run, outcome: Outcome) -> RunResult:
    return RunResult(
        run=run,
        answer=outcome.answer or "",
        output=outcome.output,
        usage=TokenUsage(*outcome.usage),
        completed_at=time.time(),
        approvals=outcome.approvals,
    )


def _database_away(error: Exception) -> ServiceUnavailable:
    log.error("database away", error=str(error))
    return ServiceUnavailable(
        "The gateway cannot reach its database, so it cannot load or keep the session. Try again shortly."
    )


def _public(error: BaseException) -> GatewayError:
    """Return the error that the client is told."""
    if isinstance(error, RequestError | RunError | ServiceUnavailable):
        return error
    log.error("unexpected error in a run", exc_info=error)
    return GatewayError("The gateway failed on this request; its log says why.")


def _trace_error(error: BaseException, told: GatewayError) -> SpanError:
    """Return what the trace says of a run that was not answered."""
    if isinstance(told, RunCancelled) or (
        isinstance(error, asyncio.CancelledError) and not isinstance(told, RunFailed)
    ):
        return SpanError("CANCELLED", str(told))
    cause = error.__cause__ or error
    try:
        return SpanError(told.code, str(cause))
    except Exception:  # noqa: BLE001 - an agent's own exceptions may fail at that, too
        return SpanError(told.code, type(cause).__name__)
