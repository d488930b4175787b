"""What judges spent, all workers together, and the share of the judging that is still paid for."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import UTC, datetime, timedelta

import psycopg
import structlog

from gateway.evaluation.judging.budget import HISTORY, Budget, Spent, judged_share, used
from gateway.evaluation.judging.prices import Tokens
from gateway.storage.database import Pool

log = structlog.get_logger(__name__)

_FRESH = timedelta(seconds=0.1)
_NEARLY_USED_UP = 0.9
_LOOK_S = 1.0  # a kill -9 loses no more than this of what was spent


@dataclass(frozen=True)
class HourOfModel:
    """What one model took in one hour: a row of ``judge_spending``, or what is to be added to it."""

    calls: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    unpriced_calls: int = 0
    """Calls that used tokens at an unknown price."""

    def __add__(self, other: "HourOfModel") -> "HourOfModel":
        """Return both together."""
        return HourOfModel(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))

    @property
    def spent(self) -> Spent:
        """As budgets count it."""
        return Spent(self.cost_usd, self.input_tokens + self.output_tokens)


_Rows = dict[tuple[str, datetime], HourOfModel]


class SpendingBook:
    """Counts in memory, writes in batches, and reads what all workers wrote."""

    def __init__(self, pool: Pool, now: Callable[[], datetime] = lambda: datetime.now(UTC)):
        """Take the pool of the database, and what says the time (UTC)."""
        self._pool = pool
        self.now = now
        self._unwritten: _Rows = {}
        self._writing: _Rows = {}
        self._read: dict[datetime, Spent] = {}
        self._expected = Spent()

    @contextmanager
    def expecting(self, spent: Spent) -> Iterator[None]:
        """Count what a call under way will probably take, until the block is left: by then it is known."""
        self._expected += spent
        try:
            yield
        finally:
            self._expected += Spent(-spent.usd, -spent.tokens)

    def add(self, model: str, tokens: Tokens, cost_usd: float | None) -> None:
        """Count one call; ``cost_usd`` is ``None`` if its price is unknown."""
        unpriced = int(cost_usd is None and tokens.total > 0)
        self._put(model, self.now(), HourOfModel(1, tokens.input, tokens.output, cost_usd or 0.0, unpriced))

    async def write(self) -> None:
        """Add what was counted to the table; what cannot be written waits for the next time.

        Raises:
            psycopg.OperationalError: the database is away.
        """
        rows, self._unwritten = self._unwritten, {}
        if not rows:
            return
        self._writing = rows
        # In one order for all workers, so that no two wait for each other.
        values = [[model, hour, *astuple(row)] for (model, hour), row in sorted(rows.items())]
        try:
            async with self._pool.connection() as connection, connection.transaction(), connection.cursor() as cursor:
                await cursor.executemany(_ADD, values)
        except BaseException:  # if it was written after all it counts twice: too much rather than too little
            for (model, hour), row in rows.items():
                self._put(model, hour, row)
            raise
        else:
            for (_, hour), row in rows.items():  # seen at once, not when the table is read next
                self._read[hour] = self._read.get(hour, Spent()) + row.spent
        finally:
            self._writing = {}

    async def read(self) -> None:
        """Read what all workers wrote.

        Raises:
            psycopg.OperationalError: the database is away.
        """
        async with self._pool.connection() as connection:
            rows = await (await connection.execute(_READ, [self.now() - HISTORY])).fetchall()
        self._read = {_as_hour(hour): Spent(float(str(usd)), int(str(tokens))) for hour, usd, tokens in rows}

    def hours(self) -> Mapping[datetime, Spent]:
        """Return what was spent by the hour: what was read last, and what this worker knows beyond that."""
        hours = dict(self._read)
        hour = _hour_of(self.now())
        hours[hour] = hours.get(hour, Spent()) + self._expected
        for rows in (self._writing, self._unwritten):
            for (_, hour), row in rows.items():
                hours[hour] = hours.get(hour, Spent()) + row.spent
        return hours

    def _put(self, model: str, at: datetime, row: HourOfModel) -> None:
        key = (model, _hour_of(at))
        self._unwritten[key] = self._unwritten.get(key, HourOfModel()) + row


class BudgetKeeper:
    """Says what share is still judged; looks at the table once a second while it runs."""

    def __init__(self, budget: Budget, book: SpendingBook):
        """Take the budget and the book."""
        self._budget = budget
        self._book = book
        self._fresh_until = datetime.min.replace(tzinfo=UTC)
        self._share = 1.0
        self._looking = asyncio.Lock()

    async def run(self) -> None:
        """Write and read until cancelled; then write once more what is left."""
        try:
            while True:
                await self.look()
                await asyncio.sleep(_LOOK_S)
        finally:
            await self.look()

    async def look(self) -> None:
        """Write what this worker spent, and read what all did."""
        try:
            async with self._looking:
                await self._book.write()
                await self._book.read()
        except psycopg.OperationalError as error:
            # What this worker spends is still counted; calls wait for their slots until the database is back.
            log.warning("what judges spent cannot be written or read: the database is away", error=str(error))
        self._fresh_until = self._book.now()

    @property
    def share(self) -> float:
        """Factor in [0, 1] by which the shares of all judges are multiplied now."""
        now = self._book.now()
        if now >= self._fresh_until:  # it is asked for every trace
            self._share = judged_share(self._budget, self._book.hours(), now)
            self._fresh_until = now + _FRESH
        return self._share

    @property
    def used(self) -> float:
        """How much of the present hour's or day's budget is used, of that which is used most; 1 is all of it."""
        return used(self._budget, self._book.hours(), self._book.now())

    async def may_call(self) -> bool:
        """Whether a call may leave: not beyond a budget, whatever was decided before.

        Near the end of a budget it looks at the table for each call, since others may have used the rest by now.
        """
        if self.used >= _NEARLY_USED_UP:
            await self.look()
        return self.used < 1.0


def _hour_of(at: datetime) -> datetime:
    return at.replace(minute=0, second=0, microsecond=0)


def _as_hour(value: object) -> datetime:
    assert isinstance(value, datetime)  # noqa: S101 - the column's type
    return value.astimezone(UTC)


_ADD = """
    INSERT INTO judge_spending AS before
        (model, hour, calls, input_tokens, output_tokens, cost_usd, unpriced_calls)
    VALUES (%s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (model, hour) DO UPDATE SET
        calls = before.calls + excluded.calls,
        input_tokens = before.input_tokens + excluded.input_tokens,
        output_tokens = before.output_tokens + excluded.output_tokens,
        cost_usd = before.cost_usd + excluded.cost_usd,
        unpriced_calls = before.unpriced_calls + excluded.unpriced_calls
"""
_READ = """
    SELECT hour, sum(cost_usd), sum(input_tokens + output_tokens) FROM judge_spending WHERE hour >= %s GROUP BY hour
"""
