"""From what judges have spent to the share that they still judge: pure functions of amounts and time.

A budget is money or tokens for an hour or a day (UTC). Spending is to follow an even pace that uses 95 % of it. As long
as it is behind that pace, everything is judged that the scorers' own shares select; what a quiet time left over may be
spent in a burst. Ahead of it, the share falls exponentially with the lead::

    lead  = spent / budget - 0.95 * elapsed                  (as parts of the budget and of the hour or day)
    share = exp(-(lead + carried) / 0.015)                   (1 where that is not above 0)

Where full judging would cost D times the pace, spending settles at the pace with the lead at 0.015 * ln(D). The slope
there does not depend on D, so the share neither creeps nor swings, at 2 times the budget as at 200 times: a deviation
is halved in 40 s of an hour, in 16 minutes of a day, well above the seconds between a decision and its bill.

``carried`` is the lead at the end of the hour before, so that a new hour does not begin with a burst; at the most 0.1.
In the last 3 % of a budget the share also falls to 0 in proportion to what is left; at 100 % it is 0, and no call
leaves any more, whatever was decided before. Beyond a budget goes at the most what is under way then.

The result is the same for all workers that see the same amounts. It multiplies the probability of each score, which is
recorded with it, so that means stay unbiased while it moves.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

PACE = 0.95
"""Part of a budget that even spending uses: the lead of busy times must fit into the rest."""
_STEEPNESS = 0.015
_LONGEST_CARRY = 0.1
_BRAKE = 0.03

_HOUR = timedelta(hours=1)
_DAY = timedelta(days=1)
_PAST_HOURS = 24
_PAST_DAYS = 2
HISTORY = _DAY * (_PAST_DAYS + 1)
"""How far back spending counts."""


@dataclass(frozen=True)
class Spent:
    """Money and tokens."""

    usd: float = 0.0
    tokens: int = 0

    def __add__(self, other: "Spent") -> "Spent":
        """Return both together."""
        return Spent(self.usd + other.usd, self.tokens + other.tokens)


_NOTHING = Spent()


@dataclass(frozen=True)
class Budget:
    """What all judges together may spend; ``None``: no limit."""

    usd_per_hour: float | None = None
    usd_per_day: float | None = None
    tokens_per_hour: int | None = None
    tokens_per_day: int | None = None


def judged_share(budget: Budget, hours: Mapping[datetime, Spent], now: datetime) -> float:
    """Return the factor in [0, 1] by which all judges' shares are multiplied.

    Args:
        budget: of all judges.
        hours: what was spent in each hour of the last `HISTORY`, by its beginning (UTC).
        now: the present (UTC).
    """
    return min((_share(*window) for window in _windows(budget, hours, now)), default=1.0)


def used(budget: Budget, hours: Mapping[datetime, Spent], now: datetime) -> float:
    """Return how much of the present hour's or day's budget is used, of that which is used most; 1 is all of it."""
    return max((spent for spent, _, _ in _windows(budget, hours, now)), default=0.0)


def _share(spent: float, elapsed: float, past: Sequence[float]) -> float:
    """Return the share by one budget.

    Args:
        spent: part of the budget that is spent.
        elapsed: part of the hour or day that is over.
        past: what was spent in those before, as part of the budget, the oldest first.
    """
    carried = 0.0
    for each in past:
        carried = min(max(carried + each - PACE, 0.0), _LONGEST_CARRY)
    lead = spent - PACE * elapsed + carried
    return math.exp(-max(lead, 0.0) / _STEEPNESS) * min(max((1.0 - spent) / _BRAKE, 0.0), 1.0)


_Window = tuple[float, float, list[float]]


def _windows(budget: Budget, hours: Mapping[datetime, Spent], now: datetime) -> list[_Window]:
    """Return for each limit that is set what is spent, what is over, and what was spent before, all as parts."""
    hour = now.replace(minute=0, second=0, microsecond=0)
    day = hour.replace(hour=0)
    windows: list[_Window] = []
    if budget.usd_per_hour is not None or budget.tokens_per_hour is not None:
        by_hour = [hours.get(hour - _HOUR * back, _NOTHING) for back in range(_PAST_HOURS, -1, -1)]
        windows += _of_each(budget.usd_per_hour, budget.tokens_per_hour, by_hour, (now - hour) / _HOUR)
    if budget.usd_per_day is not None or budget.tokens_per_day is not None:
        by_day = [_between(hours, day - _DAY * back, day - _DAY * (back - 1)) for back in range(_PAST_DAYS, -1, -1)]
        windows += _of_each(budget.usd_per_day, budget.tokens_per_day, by_day, (now - day) / _DAY)
    return windows


def _of_each(usd: float | None, tokens: int | None, spent: Sequence[Spent], elapsed: float) -> Iterator[_Window]:
    for limit, amounts in ((usd, [each.usd for each in spent]), (tokens, [float(each.tokens) for each in spent])):
        if limit is not None:
            *past, present = [_part(amount, limit) for amount in amounts]
            yield present, elapsed, past


def _between(hours: Mapping[datetime, Spent], begin: datetime, end: datetime) -> Spent:
    return sum((spent for hour, spent in hours.items() if begin <= hour < end), _NOTHING)


def _part(amount: float, limit: float) -> float:
    """Return the part of a limit; a limit of 0 is used up from the beginning."""
    return amount / limit if limit else 1.0
