"""How many calls of a judge model are under way at once, and how many leave in a minute, over all workers.

Slots are Postgres advisory locks on a connection that stays open: the slots of a worker that dies are free the moment
its connection is gone. The rate is a row that says how many calls were promised beyond what the present allows: a
call takes the next free moment and waits for it, so that calls of all workers leave evenly, in the order they came.

If the database is away nothing leaves: spending that nobody could count would be no limit.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psycopg

from gateway.storage.database import Connection, Pool

_SLOT_LOCK = 0x6167_746A  # first key of the advisory locks; the second is a hash of the model and the slot's number
_SHORTEST_LOOK_S = 0.02  # for a free slot: short beside a judge's call, and seldom enough for the database
_LONGEST_LOOK_S = 0.1
_CLOSE_S = 2.0
_BURST = 20  # part of a minute's calls that may leave at once


@dataclass(frozen=True)
class ModelLimits:
    """Limits of one judge model over all workers; ``None``: no limit."""

    concurrency: int | None = 16
    """Calls under way at once. 16 keeps well below what providers allow, and some hundred scorings a minute going."""
    requests_per_minute: int | None = None


@dataclass(frozen=True)
class JudgeLimits:
    """What bounds the calls of judges; every value is a setting."""

    base_url: str = "https://api.openai.com/v1"
    """Base URL of the OpenAI-compatible API that ``openai:/`` judges are sent to, ``/v1`` included."""
    api_key: str | None = None
    """Key for it. ``None``: none is sent, as local servers take it."""
    call_timeout_s: float = 60.0
    """Seconds that one attempt may take; a judge's answer is short."""
    scoring_timeout_s: float = 180.0
    """Seconds that all calls of one scoring may take together, waiting included."""
    calls_per_scoring: int = 40
    """Attempts that one scoring may make. A judge that reads a trace by tools makes up to 30."""
    tokens_per_scoring: int = 400_000
    """Tokens that one scoring may use: three prompts that fill a usual context window."""
    attempts: int = 4
    """Attempts of one call before it fails."""
    backoff_s: float = 0.5
    """Seconds before the second attempt, twice as long before each one that follows, a part of it by chance; 20 s at
    the most, or what the provider asks for."""
    breaker_failures: int = 5
    """Failed attempts in a row after which a model is left alone."""
    breaker_open_s: float = 15.0
    """Seconds for which it is left alone at first; twice as long after each failed probe, ten minutes at the most."""
    default: ModelLimits = field(default_factory=ModelLimits)
    """Limits of a model that has none of its own."""
    models: Mapping[str, ModelLimits] = field(default_factory=dict)
    """Limits by model, in MLflow's form (``openai:/gpt-4o-mini``)."""

    def of(self, model: str) -> ModelLimits:
        """Return the limits of a model."""
        return self.models.get(model, self.default)


class SlotKeeper:
    """The slots that this worker holds, of all models, on a connection of its own."""

    def __init__(self, url: str):
        """Take the URL of the database, reached directly: advisory locks do not survive a pooler of transactions."""
        self._url = url
        self._connection: Connection | None = None
        self._connecting = asyncio.Lock()
        self._held: dict[str, set[int]] = {}
        self._turns: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def slot(self, model: str, concurrency: int | None) -> AsyncIterator[None]:
        """Hold one of the model's slots, waiting for it as long as the caller lets it.

        Raises:
            psycopg.OperationalError: the database is away.
        """
        if concurrency is None:
            yield
            return
        # In order within this worker; among workers chance decides, since all look equally often.
        async with self._turns.setdefault(model, asyncio.Lock()):
            number, connection = await self._wait(model, concurrency)
        try:
            yield
        finally:
            self._spawn(self._give_back(model, number, connection))

    async def close(self) -> None:
        """Free everything."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSE_S)  # what is left goes with the connection
        if self._connection is not None:
            await self._connection.close()

    async def _wait(self, model: str, concurrency: int) -> tuple[int, Connection]:
        while True:
            if (taken := await self._uncut(model, concurrency)) is not None:
                return taken
            await asyncio.sleep(random.uniform(_SHORTEST_LOOK_S, _LONGEST_LOOK_S))  # noqa: S311 - no secret

    async def _uncut(self, model: str, concurrency: int) -> tuple[int, Connection] | None:
        """Try once. A caller that leaves meanwhile does not cut the statement off: its slot would be lost."""
        taking = asyncio.create_task(self._take(model, concurrency), name="judge-slot")
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            self._spawn(self._undo(model, taking))
            raise

    async def _undo(self, model: str, taking: asyncio.Task[tuple[int, Connection] | None]) -> None:
        with suppress(psycopg.OperationalError):
            if (taken := await taking) is not None:
                await self._give_back(model, *taken)

    async def _take(self, model: str, concurrency: int) -> tuple[int, Connection] | None:
        connection = await self._connected()
        held = self._held.setdefault(model, set())
        # Those of our own are left out: Postgres gives a session a lock that it holds already once more.
        free = [number for number in range(concurrency) if number not in held]
        random.shuffle(free)
        cursor = await connection.execute(_TAKE, {"free": free, "lock": _SLOT_LOCK, "model": model})
        if (row := await cursor.fetchone()) is None:
            return None
        number = int(str(row[0]))
        held.add(number)
        return number, connection

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work, name="judge-slot")
        self._tasks.add(task)  # the event loop keeps weak references only
        task.add_done_callback(self._tasks.discard)

    async def _give_back(self, model: str, number: int, connection: Connection) -> None:
        if connection is not self._connection:
            return  # the lock went with its connection
        with suppress(psycopg.OperationalError):  # then it goes with its connection, too
            await connection.execute(_GIVE_BACK, {"lock": _SLOT_LOCK, "model": model, "number": number})
        if connection is self._connection:
            self._held[model].discard(number)

    async def _connected(self) -> Connection:
        async with self._connecting:
            if self._connection is None or self._connection.closed:
                self._connection = None  # what it held is free
                self._held.clear()
                self._connection = await psycopg.AsyncConnection.connect(
                    self._url,
                    autocommit=True,
                    application_name="gateway-judge-slots",
                    connect_timeout=5,
                    keepalives_idle=5,
                    keepalives_interval=2,
                )
            return self._connection


class RequestRate:
    """Spreads the calls of a model over the minute, those of all workers together."""

    def __init__(self, pool: Pool):
        """Take the pool of the database."""
        self._pool = pool

    async def reserve(self, model: str, requests_per_minute: int | None, within_s: float) -> float | None:
        """Take the next free moment for a call; return the seconds until then, ``None`` if it is later than that.

        In no minute more calls leave than allowed: a twentieth of them may leave at once, the others one by one. Of a
        limit below twenty one call a minute is left unused for that.

        Raises:
            psycopg.OperationalError: the database is away.
        """
        if requests_per_minute is None:
            return 0.0
        burst = max(requests_per_minute // _BURST, 1)
        per_s = max(requests_per_minute - burst, 1) / 60.0
        values = {"key": f"judge:{model}", "burst": burst, "per_s": per_s, "owed": -within_s * per_s}
        async with self._pool.connection() as connection:
            row = await (await connection.execute(_RESERVE, values)).fetchone()
        return None if row is None else max(-float(str(row[0])), 0.0) / per_s


# No ORDER BY: the rows are tried one by one, and the first lock that is free ends it.
_TAKE = """
    SELECT number FROM unnest(%(free)s::int[]) AS number
    WHERE pg_try_advisory_lock(%(lock)s, hashtext(%(model)s || '/' || number)) LIMIT 1
"""
_GIVE_BACK = "SELECT pg_advisory_unlock(%(lock)s, hashtext(%(model)s || '/' || %(number)s::int))"
# The bucket of an API key, but its tokens may fall below zero: then they are calls that wait for their moment.
_RESERVE = """
    INSERT INTO key_budgets AS bucket (key_id, tokens, refilled_at)
    VALUES (%(key)s, %(burst)s - 1, clock_timestamp())
    ON CONFLICT (key_id) DO UPDATE SET
        tokens = least(bucket.tokens + %(per_s)s * greatest(
            extract(epoch FROM excluded.refilled_at - bucket.refilled_at), 0), %(burst)s) - 1,
        refilled_at = greatest(bucket.refilled_at, excluded.refilled_at)
    WHERE least(bucket.tokens + %(per_s)s * greatest(
        extract(epoch FROM excluded.refilled_at - bucket.refilled_at), 0), %(burst)s) - 1 >= %(owed)s
    RETURNING tokens
"""
