"""A run under way, as its client sees it: its events, its end, and how to end it."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from gateway.errors import GatewayError, RequestError, RunFailed, ServiceUnavailable
from gateway.runs.requests import Run, RunRequest, RunResult
from gateway.tracing.capture import RunCapture
from gateway.tracing.sampling import Draw

STOPPING = "The gateway is stopping. Send the request again."
"""What clients are told whose runs end since the process does."""


class ActiveRun:
    """A run under way, as its client sees it."""

    def __init__(self, request: RunRequest, run: Run, capture: RunCapture, draw: Draw):
        self.request = request
        self.run = run
        self.capture = capture
        self.draw = draw
        self.begun = asyncio.Event()
        """Set when the run has its session's turn, or has ended without it."""
        self.took_turn = False
        self.executed = False
        """The agent was run; before that, a refusal is no run."""
        self.settling = False
        """Its end is being stored: it can no longer be ended otherwise."""
        self._events: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._result: asyncio.Future[RunResult] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        self._entered = False
        self._reason: GatewayError | None = None

    async def result(self) -> RunResult:
        """Wait for the end and return what came of it; raise the `GatewayError` that ended it.

        Cancelling this wait does not end the run.
        """
        return await asyncio.shield(self._result)

    async def events(self, wait_s: float) -> list[dict[str, Any]]:
        """Return the item-level events since the last call, at once if there are any.

        Returns none after ``wait_s`` seconds without one, and when the run is done.
        """
        if not self._events and not self.done:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), wait_s)
        self._news.clear()
        events, self._events = self._events, []
        return events

    def cancel(self, reason: GatewayError) -> None:
        """End the run at once; ``reason`` is what its client is told. Nothing happens if it has ended."""
        if self.settling or self._reason:
            return
        self._reason = reason
        if self._task is not None and self._entered:  # a task that is cancelled before it begins never does
            self._task.cancel()

    @property
    def done(self) -> bool:
        """Whether the run has ended and its trace is handed over."""
        return self._result.done()

    def emit(self, event: dict[str, Any]) -> None:
        """Give an event to the client."""
        self._events.append(event)
        self._news.set()

    def start(self, task: "asyncio.Task[None]") -> None:
        """Take the task that carries the run out."""
        self._task = task

    def enter(self) -> None:
        """Begin, in the run's own task; raise `asyncio.CancelledError` if it was ended before."""
        self._entered = True
        self.check()

    def check(self) -> None:
        """Raise `asyncio.CancelledError` if the run was ended and nothing came of it.

        A cancellation that arrives in the moment in which what is waited for does, is lost on Python 3.11 where that
        is waited for with ``wait_for``, as psycopg does.
        """
        if self._reason is not None:
            raise asyncio.CancelledError

    def end(self, outcome: RunResult | GatewayError) -> None:
        """Tell the client how the run ended."""
        if isinstance(outcome, GatewayError):
            self._result.set_exception(outcome)
            self._result.exception()  # seen: the client may have left
        else:
            self._result.set_result(outcome)
        self.begun.set()
        self._news.set()

    def counts(self, outcome: RunResult | GatewayError) -> bool:
        """Whether it is a run for the ledger: not if it was refused before the agent ran."""
        return self.executed or not isinstance(outcome, RequestError)

    def when_done(self, call: Callable[[], None]) -> None:
        """Call back when the run has ended, or at once if it has."""
        self._result.add_done_callback(lambda _: call())

    def reason(self, error: BaseException) -> GatewayError | None:
        """Return why the run was cancelled, if that is what ``error`` says."""
        if not isinstance(error, asyncio.CancelledError):
            return None
        if self._reason is None and self._task is not None and not self._task.cancelling():
            return RunFailed("The agent cancelled itself on this request; its trace has the details.")
        return self._reason or ServiceUnavailable(STOPPING)
