"""What one web process has leased of the limits of one API key, and the requests that wait for more of it.

A lease is a few units at once: tokens, one a request, which come back with time; or slots, one a request under way.
"""

import asyncio
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
import structlog

from gateway.errors import ConcurrencyLimited, RateLimited, ServiceUnavailable
from gateway.storage.api_keys import Caller
from gateway.storage.database import Pool
from gateway.storage.schema import ANONYMOUS
from gateway.storage.signals import LIVING, SLOTS_WANTED, Signals, send

log = structlog.get_logger(__name__)

_KEY_LOCK = 0x6167_746C  # first key of the advisory lock under which the leases of one API key change
_CHUNKS = 20  # leases a limit is made of: at the full rate one lasts three seconds, and a crash loses 5 % of a minute
_LEASE_S = 60.0  # four renewals: a host that is cut off keeps its slots no longer
_TRIES = 6  # 0.2 to 0.3 s with the pauses between them: time for the others to hear that they are asked, and to answer
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.05
_ASK_EVERY = 5  # tries
_GENEROUS_S = 0.5  # who has asked gets what becomes free meanwhile, too
_SHORTEST_REFUSAL_S = 0.1  # a bucket may be refilled every millisecond; ten statements a second are enough
_LONGEST_REFUSAL_S = 1.0  # another process may have given back since what it did not use
_SLOT_RETRY_S = 1.0  # nobody knows when a request will end


class Lease(ABC):
    """What this process has leased of one limit of one key, and the requests that wait for more of it."""

    def __init__(self, pool: Pool, signals: Signals, clock: Callable[[], float], caller: Caller):
        self._pool = pool
        self._signals = signals
        self._clock = clock
        self._caller = caller
        self._limit = 0
        self._free = 0
        self._fewest_free = 0  # since the last sweep
        self._others_may_have_some = True
        self._generous_until = -math.inf
        self._waiters: dict[asyncio.Future[None], int] = {}  # and how often each was tried for in vain
        self._filling = False
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    @abstractmethod
    async def _lease(self, count: int) -> int:
        """Lease up to ``count`` units and return how many it were; raise psycopg's errors."""

    @abstractmethod
    async def _return(self, count: int) -> None:
        """Give leased units back; raise psycopg's errors."""

    @abstractmethod
    def _refusal(self) -> RateLimited:
        """Return the error for a request that gets no unit."""

    async def take(self, limit: int) -> None:
        """Take one of ``limit`` units.

        Raises:
            RateLimited: none is free, here nor elsewhere.
            ServiceUnavailable: the database is away.
        """
        self._limit = limit
        if self._free:
            self._spend(1)
        else:
            await self._wait()
        if self._is_low():
            self._fill_soon()

    def put(self, count: int) -> None:
        """Have more units: they go to those who wait, in order."""
        self._free += count
        while self._free and self._waiters:
            waiter = next(iter(self._waiters))
            del self._waiters[waiter]
            if not waiter.done():
                waiter.set_result(None)
                self._spend(1)

    def share(self) -> None:
        """Give back what is free, and for a moment lease no more than is needed: another process asks."""
        self._generous_until = self._clock() + _GENEROUS_S
        if self._free:
            self._spawn(self.give_back(self._free))

    def unused(self) -> int:
        """Return how many units nobody needed since this was last asked."""
        unused, self._fewest_free = self._fewest_free, self._free
        return unused

    async def give_back(self, count: int) -> None:
        """Give back up to ``count`` free units; if the database is away, tokens are lost and slots time out."""
        async with self._writing:
            count = min(count, self._free)
            if not count:
                return
            self._spend(count)
            try:
                await self._return(count)
            except psycopg.OperationalError as error:
                log.warning("what was leased of a key's limit could not be given back", error=str(error))

    async def close(self) -> None:
        """Give back what is free, after what is under way."""
        await asyncio.gather(*self._tasks)
        await self.give_back(self._free)

    @property
    def _who(self) -> str:
        who = self._caller
        return "Callers without an API key" if who.key_id == ANONYMOUS else f"The API key {who.name!r}"

    @property
    def _is_generous(self) -> bool:
        return self._clock() < self._generous_until

    @property
    def _chunk(self) -> int:
        return max(self._limit // _CHUNKS, 1)

    def _is_low(self) -> bool:
        """Whether more should be leased before it is needed."""
        return False

    def _spend(self, count: int) -> None:
        self._free -= count
        self._fewest_free = min(self._fewest_free, self._free)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="allowances")
        self._tasks.add(task)  # the event loop keeps weak references only
        task.add_done_callback(self._tasks.discard)

    async def _wait(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = 0
        self._fill_soon()
        try:
            await waiter
        except asyncio.CancelledError:
            self._waiters.pop(waiter, None)
            if not waiter.cancelled() and waiter.exception() is None:
                self.put(1)  # it came together with the cancellation
            raise

    def _fill_soon(self) -> None:
        if not self._filling:
            self._filling = True
            self._spawn(self._fill())

    async def _fill(self) -> None:
        """Lease until nobody waits; in a task of its own, so that no statement is cut off by a client who leaves."""
        try:
            for attempt in itertools.count():
                async with self._writing:
                    self.put(await self._lease(max(len(self._waiters), 0 if self._is_generous else self._chunk)))
                if not self._waiters:
                    return
                self._count_try()
                if attempt % _ASK_EVERY == 0 and self._others_may_have_some:
                    await send(self._pool, SLOTS_WANTED, self._caller.key_id)
                await asyncio.sleep(min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S))
                if not self._waiters:
                    return
        except psycopg.OperationalError as error:
            log.warning("the limits of a key cannot be read: the database is away", error=str(error))
        finally:
            self._filling = False
            waiters, self._waiters = self._waiters, {}
            for waiter in waiters:
                self._fail(waiter, ServiceUnavailable("The gateway cannot reach its database. Try again shortly."))

    def _count_try(self) -> None:
        for waiter, tries in list(self._waiters.items()):
            self._waiters[waiter] = tries + 1
            if tries + 1 == _TRIES:
                del self._waiters[waiter]
                self._fail(waiter, self._refusal())

    @staticmethod
    def _fail(waiter: asyncio.Future[None], error: Exception) -> None:
        if not waiter.done():
            waiter.set_exception(error)

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """Begin a transaction that no other process's on this key runs beside."""
        async with self._pool.connection() as connection, connection.pipeline(), connection.transaction():
            await connection.execute(_LOCK, [self._caller.key_id])
            yield connection


class Tokens(Lease):
    """Requests of this minute: a token is spent for good, and comes back with time."""

    _short = False
    _next_at = -math.inf  # when there is a token again
    _refused_until = -math.inf

    async def take(self, limit: int) -> None:
        """Take one, as `Lease.take`; a flood of refused requests does not reach the database."""
        if not self._free and self._clock() < self._refused_until:
            raise self._used_up()
        await super().take(limit)

    def _is_low(self) -> bool:
        return self._free < self._chunk // 4 and not self._short and not self._is_generous

    async def _lease(self, count: int) -> int:
        values = {"key": self._caller.key_id, "count": count, "limit": self._limit}
        async with self._locked() as connection:
            row: Any = await (await connection.execute(_LEASE_TOKENS, values)).fetchone()
        leased, left = int(row[0]), float(row[1])
        self._short = leased < count
        self._next_at = self._clock() + (1.0 - left) * 60.0 / self._limit
        return leased

    async def _return(self, count: int) -> None:
        await self._lease(-count)

    def _refusal(self) -> RateLimited:
        pause_s = min(max(self._next_at - self._clock(), _SHORTEST_REFUSAL_S), _LONGEST_REFUSAL_S)
        self._refused_until = self._clock() + pause_s
        return self._used_up()

    def _used_up(self) -> RateLimited:
        wait_s = max(self._next_at - self._clock(), _SHORTEST_REFUSAL_S)
        return RateLimited(
            f"{self._who} may make {self._limit} requests a minute, and these are used up. Send the request again in "
            f"{math.ceil(wait_s)} s.",
            wait_s,
        )


class Slots(Lease):
    """Requests under way: a slot is free again when its request has ended."""

    _held = 0  # those in use, those that are free, and those on their way back

    def release(self) -> None:
        """Have the unit of a request that has ended."""
        self.put(1)
        if self._free and self._is_generous:
            self._spawn(self.give_back(self._free))

    async def renew(self) -> None:
        """Say that what is held is still held; also puts right what a lost connection left undone."""
        async with self._writing:
            if self._held:
                with suppress(psycopg.OperationalError):  # the next one is soon
                    await self._lease(0)

    async def _lease(self, count: int) -> int:
        values = {"key": self._caller.key_id, "process": self._signals.process_id, "held": self._held}
        values |= {"count": count, "limit": self._limit, "lease_s": _LEASE_S}
        async with self._locked() as connection:
            row: Any = await (await connection.execute(_LEASE_SLOTS, values)).fetchone()
        held, others = row
        leased, self._held = held - self._held, held
        self._others_may_have_some = others > 0
        return int(leased)

    async def _return(self, count: int) -> None:
        self._held -= count
        await self._lease(0)

    def _refusal(self) -> RateLimited:
        return ConcurrencyLimited(
            f"{self._who} may have {self._limit} requests under way at once, and these are. Send the request again "
            "when one of them has ended.",
            _SLOT_RETRY_S,
        )


# Its own transaction sees what those before it have written, since the lock was waited for by a statement of its own.
_LOCK = f"SELECT pg_advisory_xact_lock({_KEY_LOCK}, hashtext(%s))"
_LEASE_TOKENS = """
    WITH bucket AS (
        SELECT at, coalesce(tokens + %(limit)s * greatest(extract(epoch FROM at - refilled_at) / 60, 0), %(limit)s)
            AS tokens
        FROM (SELECT clock_timestamp() AS at) AS now LEFT JOIN key_budgets ON key_id = %(key)s),
    budget AS (SELECT at, least(tokens, %(limit)s) AS tokens FROM bucket),
    lease AS (SELECT at, tokens, least(%(count)s, floor(tokens)) AS leased FROM budget)
    INSERT INTO key_budgets (key_id, tokens, refilled_at)
    SELECT %(key)s, least(tokens - leased, %(limit)s), at FROM lease
    ON CONFLICT (key_id) DO UPDATE SET tokens = excluded.tokens, refilled_at = excluded.refilled_at
    RETURNING (SELECT leased FROM lease), tokens
"""
# What is held is written as a whole, not as a difference: a write that was lost is made good by the next.
_LEASE_SLOTS = f"""
    WITH others AS (
        SELECT coalesce(sum(slots), 0)::int AS slots FROM key_slots
        WHERE key_id = %(key)s AND process_id <> %(process)s AND leased_until > now() AND process_id IN ({LIVING}))
    INSERT INTO key_slots (key_id, process_id, slots, leased_until)
    SELECT %(key)s, %(process)s, greatest(%(held)s, least(%(held)s + %(count)s, %(limit)s - slots)),
        now() + make_interval(secs => %(lease_s)s)
    FROM others
    ON CONFLICT (key_id, process_id) DO UPDATE SET slots = excluded.slots, leased_until = excluded.leased_until
    RETURNING slots, (SELECT slots FROM others)
"""
