"""A circuit breaker: a model that is down is left alone for a while, then asked by one call.

Closed, calls pass; some failures in a row open it. Open, none passes until a time is over. Then one passes as a probe,
half-open: if it succeeds all pass again, if it fails the time doubles.
"""

from collections.abc import Callable
from typing import Literal

BreakerState = Literal["closed", "open", "half_open"]

_LONGEST_OPEN_S = 600.0  # a provider that comes back is used again within ten minutes


class Breaker:
    """State of one model, as this worker sees it."""

    def __init__(self, clock: Callable[[], float], *, failures: int, open_s: float):
        """Take the clock and the limits.

        Args:
            clock: seconds that only grow.
            failures: in a row, after which it opens.
            open_s: seconds for which it is open at first.
        """
        self._clock = clock
        self._limit = failures
        self._shortest_open_s = open_s
        self._open_s = open_s
        self._failures = 0
        self._round = 0  # a call that was let in before it opened or closed says nothing about what is now
        self._open_until: float | None = None
        self._probing = False

    @property
    def state(self) -> BreakerState:
        """Whether calls pass: all (``closed``), none (``open``), or one (``half_open``), which may be under way."""
        if self._open_until is None:
            return "closed"
        return "half_open" if self._probing or self._clock() >= self._open_until else "open"

    @property
    def wait_s(self) -> float:
        """Seconds until a call may pass; 0 if one may."""
        return max((self._open_until or 0.0) - self._clock(), 0.0)

    def admit(self) -> "Passage | None":
        """Let a call pass, or return ``None``. What became of it must be told to the passage, once."""
        if self._open_until is not None:
            if self._probing or self._clock() < self._open_until:
                return None
            self._probing = True
        return Passage(self, self._round)

    def _end(self, round_: int, ok: bool | None) -> None:
        if round_ != self._round:
            return
        if ok is None:
            self._probing = False
        elif ok:
            self._failures = 0
            if self._open_until is not None:
                self._turn(None, self._shortest_open_s)
        elif self._open_until is not None:
            self._turn(self._clock() + min(self._open_s * 2, _LONGEST_OPEN_S), min(self._open_s * 2, _LONGEST_OPEN_S))
        else:
            self._failures += 1
            if self._failures >= self._limit:
                self._turn(self._clock() + self._open_s, self._open_s)

    def _turn(self, open_until: float | None, open_s: float) -> None:
        self._round += 1
        self._failures = 0
        self._probing = False
        self._open_until = open_until
        self._open_s = open_s


class Passage:
    """A call that was let in."""

    def __init__(self, breaker: Breaker, round_: int):
        self._breaker: Breaker | None = breaker
        self._round = round_

    def succeeded(self) -> None:
        """The model answered, be it that it refused the request."""
        self._end(ok=True)

    def failed(self) -> None:
        """The model is not there, or does not work."""
        self._end(ok=False)

    def abandoned(self) -> None:
        """Nobody knows: the call was given up, or told to wait. Saying it after another word does nothing."""
        self._end(ok=None)

    def _end(self, *, ok: bool | None) -> None:
        breaker, self._breaker = self._breaker, None
        if breaker is not None:
            breaker._end(self._round, ok)  # noqa: SLF001 - the two are one thing
