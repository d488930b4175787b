"""Threads for scorers, which can be given up: a scorer is anybody's code, and Python cannot stop a thread.

A call has a deadline. When that has passed, its caller goes on, a fresh thread takes the place of the one that hangs,
and what the late call returns is thrown away. Two bounds keep this from piling up: a scorer with
``most_stuck_each`` calls that hang is not called again until one of them came back, and with ``most_stuck`` of all
scorers none is. Both are outcomes that the caller makes visible, at no cost in time: a scorer that always hangs costs
its deadline twice, not once a trace.

The threads are daemons: one that hangs does not keep the process from ending.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

from mlflow.genai.scorers import base as mlflow_scorers

T = TypeVar("T")

# MLflow runs each scorer in one more thread, with a deadline of its own of five minutes. Its thread would be the one
# that hangs, beyond our count; where it sees this variable set, it calls the scorer directly.
_WATCHED = getattr(mlflow_scorers, "_in_scorer_timeout", None)


class GivenUp(Exception):
    """The call has passed its deadline, or was not begun since others like it hang."""


@dataclass(frozen=True)
class ThreadStatistics:
    """What a `ScorerThreads` has done."""

    threads: int
    """Threads there are: idle, at work, or stuck."""
    stuck: int
    """Those in a call that was given up and has not come back."""
    timed_out: int
    """Calls that were given up, ever."""
    came_back_late: int
    """Those of them that came back later; what they returned was thrown away."""
    refused: int
    """Calls that were not begun since others hung, ever."""


@dataclass
class _Call:
    """One call of a scorer."""

    key: str
    work: Callable[[], Any]
    future: "Future[Any]"
    given_up: bool = False
    over: bool = False
    """It came back; its future has the result, or is about to."""


class ScorerThreads:
    """As many threads as there are calls at once, kept for the next calls."""

    def __init__(self, most_stuck: int = 16, most_stuck_each: int = 2):
        """Take the bounds: how many calls may hang, of all scorers together and of each."""
        self._most_stuck = most_stuck
        self._most_stuck_each = most_stuck_each
        self._lock = threading.Lock()
        self._idle: list[SimpleQueue[_Call | None]] = []
        self._stuck: Counter[str] = Counter()
        self._threads = self._timed_out = self._late = self._refused = 0

    def run(self, key: str, work: Callable[[], T], deadline_s: float) -> T:
        """Return what ``work`` returns, or raise what it raises.

        Args:
            key: name of the scorer, by which calls that hang are counted.
            work: the call.
            deadline_s: seconds that the caller waits at most.

        Raises:
            GivenUp: the deadline has passed, or too many such calls hang already.
        """
        call = self._begin(key, work)
        try:
            return call.future.result(deadline_s)  # type: ignore[no-any-return]
        except TimeoutError:
            if not self._give_up(call):
                return call.future.result()  # type: ignore[no-any-return]
            raise GivenUp(f"no answer within {deadline_s:g} s") from None

    async def wait(self, key: str, work: Callable[[], T], deadline_s: float) -> T:
        """Do the same as `run` without blocking the event loop. Cancelled, it gives the call up."""
        call = self._begin(key, work)
        answer: asyncio.Future[T] = asyncio.wrap_future(call.future)
        try:
            done, _ = await asyncio.wait({answer}, timeout=deadline_s)
        except asyncio.CancelledError:
            self._give_up(call)
            raise
        if done or not self._give_up(call):
            return await answer
        answer.cancel()
        raise GivenUp(f"no answer within {deadline_s:g} s")

    def statistics(self) -> ThreadStatistics:
        """Return what was done so far."""
        with self._lock:
            stuck = self._stuck.total()
            return ThreadStatistics(self._threads, stuck, self._timed_out, self._late, self._refused)

    def close(self) -> None:
        """End the threads that are idle. Those that hang end with the process."""
        with self._lock:
            idle, self._idle = self._idle, []
        for calls in idle:
            calls.put(None)

    def _begin(self, key: str, work: Callable[[], Any]) -> _Call:
        with self._lock:
            if self._stuck[key] >= self._most_stuck_each or self._stuck.total() >= self._most_stuck:
                self._refused += 1
                mine = f"{self._stuck[key]} of its earlier calls and {self._stuck.total()} of all scorers"
                raise GivenUp(f"not called: {mine} hang still")
            calls = self._idle.pop() if self._idle else None
            self._threads += calls is None
        call = _Call(key, work, Future())
        call.future.set_running_or_notify_cancel()
        if calls is None:
            calls = SimpleQueue()
            threading.Thread(target=self._serve, args=[calls], name="scorer", daemon=True).start()
        calls.put(call)
        return call

    def _serve(self, calls: "SimpleQueue[_Call | None]") -> None:
        if _WATCHED is not None:
            _WATCHED.set(True)
        while (call := calls.get()) is not None:
            try:
                result = call.work()
            except BaseException as error:  # noqa: BLE001 - a scorer may even call sys.exit()
                self._came_back(call, calls)
                call.future.set_exception(error)
            else:
                self._came_back(call, calls)
                call.future.set_result(result)
                del result
            del call  # while the thread waits for its next one, nothing of this one is kept
        with self._lock:
            self._threads -= 1

    def _came_back(self, call: _Call, calls: "SimpleQueue[_Call | None]") -> None:
        with self._lock:
            call.over = True
            if call.given_up:
                self._stuck[call.key] -= 1
                self._late += 1
            self._idle.append(calls)

    def _give_up(self, call: _Call) -> bool:
        """Count the call as stuck; ``False`` if it has just come back."""
        with self._lock:
            if call.over:
                return False
            call.given_up = True
            self._stuck[call.key] += 1
            self._timed_out += 1
            return True
