"""How many requests an API key may make a minute, and at once, over all web processes.

The truth is in Postgres: a bucket of tokens a key, refilled all the time, and how many slots each process holds. A
process leases some of both and spends them in memory, so that a request seldom pays a round trip. What nobody uses it
gives back after a second, or at once when another process asks (`SLOTS_WANTED`); a request is refused only after the
others were asked. Slots count while their process lives and renews its lease of them.

A bucket holds a minute's requests, so a key that was silent may send them all at once. Tokens that die with a process
are lost, never spent twice.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from gateway.storage.api_keys import Caller
from gateway.storage.database import Pool
from gateway.storage.leases import Slots, Tokens
from gateway.storage.signals import RECONNECTED, SLOTS_WANTED, Signals

_SWEEP_S = 1.0
_RENEW_S = 15.0  # a quarter of a lease of slots


class Admission:
    """A request that was let in. It counts as under way until `release`."""

    def __init__(self, slots: Slots | None):
        self._slots = slots

    def release(self) -> None:
        """Say that the request has ended; saying it again does nothing."""
        slots, self._slots = self._slots, None
        if slots is not None:
            slots.release()


class Allowances:
    """Lets requests in, or refuses them."""

    def __init__(
        self,
        pool: Pool,
        signals: Signals,
        *,
        requests_per_minute: int | None,
        concurrency: int | None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Take the pool, what processes ask each other by, and the limits of keys that have none of their own.

        Args:
            pool: connections to the database.
            signals: is to be started before, and stopped after this.
            requests_per_minute: of one key; ``None``: no limit.
            concurrency: requests of one key at once; ``None``: no limit.
            clock: seconds that only grow.
        """
        self._pool = pool
        self._signals = signals
        self._requests_per_minute = requests_per_minute
        self._concurrency = concurrency
        self._clock = clock
        self._leases: dict[str, tuple[Tokens, Slots]] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()
        self._renew_at = 0.0
        signals.on(SLOTS_WANTED, self._share)
        signals.on(RECONNECTED, self._renew)

    async def start(self) -> None:
        """Begin to give back what nobody uses."""
        async with self._pool.connection() as connection:
            await connection.execute(_FORGET)
        self._sweeper = asyncio.create_task(self._sweep(), name="allowances")

    async def stop(self) -> None:
        """Give back everything that no request holds."""
        self._stopping.set()
        if self._sweeper is not None:
            await self._sweeper
        await asyncio.gather(*(lease.close() for leases in self._leases.values() for lease in leases))

    async def admit(self, caller: Caller) -> Admission:
        """Let a request of ``caller`` in; the caller's own limits come before the common ones.

        Raises:
            RateLimited: the minute's requests are used up.
            ConcurrencyLimited: as many requests as allowed are under way.
            ServiceUnavailable: the database is away, and what this process has leased is spent.
        """
        rate = caller.requests_per_minute or self._requests_per_minute
        concurrency = caller.concurrency or self._concurrency
        if rate is None and concurrency is None:
            return Admission(None)
        tokens, slots = self._leases_of(caller)
        if rate is not None:
            await tokens.take(rate)
        if concurrency is None:
            return Admission(None)
        try:
            await slots.take(concurrency)
        except BaseException:
            if rate is not None:
                tokens.put(1)
            raise
        return Admission(slots)

    def _leases_of(self, caller: Caller) -> tuple[Tokens, Slots]:
        if (leases := self._leases.get(caller.key_id)) is None:
            parts = (self._pool, self._signals, self._clock, caller)
            leases = self._leases[caller.key_id] = (Tokens(*parts), Slots(*parts))
        return leases

    def _share(self, key_id: str) -> None:
        for lease in self._leases.get(key_id, ()):
            lease.share()

    def _renew(self, _subject: str) -> None:
        self._renew_at = 0.0  # without its connection this process counted as dead

    async def _sweep(self) -> None:
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), _SWEEP_S)
            renewing = self._clock() >= self._renew_at
            if renewing:
                self._renew_at = self._clock() + _RENEW_S
            for tokens, slots in list(self._leases.values()):
                await tokens.give_back(tokens.unused())
                await slots.give_back(slots.unused())
                if renewing:
                    await slots.renew()


_FORGET = "DELETE FROM key_slots WHERE leased_until < now()"
