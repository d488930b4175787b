"""Lets go of held conversations: what was not sampled, and met no tail rule for as long as it could.

The traces of a conversation that is not sampled are held, since a later turn may meet a tail rule and promote them
(`gateway.tracing.handover.storing`). They are let go, and their runs are ``sampled_out``, when its client has ended it,
when its last turn is longer ago than the hold, or, the oldest first, when more is held than there is room for.

Never between a promotion and its release: a conversation is let go under the lock on its row of ``sampled_sessions``,
and only if nothing has happened to it since it was looked at. Who stores a turn takes the same lock first. If that is
under way, the conversation is left to the next look; if it comes after, it finds the runs gone and promotes only what
comes from then on.
"""

import asyncio
import time
from collections import Counter
from datetime import datetime
from typing import Any, NamedTuple

import psycopg
import structlog
from psycopg.rows import class_row

from gateway.reloading import LiveSettings
from gateway.storage.database import Pool
from gateway.storage.erasure import BESIDE_NO_ERASURE

log = structlog.get_logger(__name__)

_INTERVAL_S = 0.5  # with the time for the last turns to come in, what an ended session held is gone in about a second
_COMING_IN_S = 0.5  # beyond a flush, since an end or a run's: a promotion by the last turns must not come too late
_SHARE = 0.05  # of one core of the database at the most: a look costs the more, the more is held
_AFTER_ERROR_S = 5.0  # when the database was away, what web processes kept meanwhile comes in first
_BATCH = 500  # conversations a transaction: their turns are let go in well under a second

_LOCK = 0x6167_7377
"""Advisory lock of the process that sweeps."""


class _Over(NamedTuple):
    """A held conversation that may be let go."""

    session_id: str
    last_run_at: datetime
    reason: str | None
    """``hold_full``, or ``None``: it is over."""


class Sweeper:
    """Looks from time to time. One a web process; one of them at a time looks."""

    def __init__(self, pool: Pool, live: LiveSettings):
        """Take the pool, and the settings that say for how long and how much is held."""
        self._pool = pool
        self._live = live

    async def run(self) -> None:
        """Sweep until cancelled; errors of the database are logged, the next sweep tries again."""
        pause_s = _INTERVAL_S
        while True:
            await asyncio.sleep(pause_s)
            began = time.monotonic()
            try:
                await self.sweep()
            except psycopg.Error as error:
                log.warning("held traces could not be looked at; trying again", error=str(error))
                pause_s = _AFTER_ERROR_S
            else:
                pause_s = max(_INTERVAL_S, (time.monotonic() - began) / _SHARE)

    async def sweep(self) -> dict[str, int]:
        """Let go of every held conversation that is over, and of the oldest ones if there is no room for all.

        Returns:
            Runs that are ``sampled_out`` by it, by reason: ``over`` or ``hold_full``. Empty if there was none, or
            another process is at it.

        Raises:
            psycopg.Error: the database is away; what was let go so far stays so.
        """
        runs: Counter[str] = Counter()
        while (batch := await self._batch()) is not None:
            runs.update(batch)
        if runs:
            log.info("let go of held runs", **runs)
        return dict(runs)

    async def _batch(self) -> Counter[str] | None:
        """Let go of a batch; ``None`` if nothing was found, or was free."""
        async with self._pool.connection() as connection, connection.transaction():
            if not await _is_true(connection, _ANYTHING_HELD):
                return None
            if not await _is_true(connection, "SELECT pg_try_advisory_xact_lock(%(lock)s)", {"lock": _LOCK}):
                return None
            over = await self._over(connection)
            return await self._let_go(connection, over) if over else None

    async def _over(self, connection: psycopg.AsyncConnection[Any]) -> list[_Over]:
        async with connection.cursor(row_factory=class_row(_Over)) as cursor:
            await cursor.execute(_OVER, self._bounds())
            return await cursor.fetchall()

    def _bounds(self) -> dict[str, float]:
        now = self._live.now
        return {
            "hold_s": now.hold_s,
            "max_bytes": now.hold_max_bytes,
            "coming_in_s": now.trace_flush_s + _COMING_IN_S,
            "batch": _BATCH,
        }

    async def _let_go(self, connection: psycopg.AsyncConnection[Any], over: list[_Over]) -> Counter[str] | None:
        await connection.execute(BESIDE_NO_ERASURE)
        seen = {"sessions": [each.session_id for each in over], "seen": [each.last_run_at for each in over]}
        locked = {row[0] for row in await (await connection.execute(_LOCK_UNCHANGED, seen)).fetchall()}
        free = [each for each in over if each.session_id in locked]
        if not free:
            return None
        given = {"sessions": [each.session_id for each in free], "reasons": [each.reason for each in free]}
        gone = await (await connection.execute(_LET_GO, given)).fetchall()
        return Counter(str(row[0] or "over") for row in gone)


async def _is_true(connection: psycopg.AsyncConnection[Any], statement: Any, values: Any = None) -> bool:
    return await (await connection.execute(statement, values)).fetchone() == (True,)


_ANYTHING_HELD = "SELECT EXISTS (SELECT 1 FROM outbox WHERE held)"
# The state is that of all that is held: it has an index, and the whole ledger need not be read. The newest
# conversations have the room. While a run is under way, or its trace may be on the way here, a conversation is not
# over, whatever else is so; a run that began after the end, and left no turn, takes the end back for here as a turn
# does for everyone.
_OVER = """
    WITH held AS (
        SELECT session_id, sum(octet_length(payload)) AS bytes
        FROM outbox JOIN runs USING (trace_id) WHERE held AND state = 'pending' GROUP BY session_id),
    waiting AS (
        SELECT session_id, last_run_at, sum(bytes) OVER (ORDER BY last_run_at DESC, session_id) AS bytes_up_to_here
        FROM held JOIN sampled_sessions USING (session_id)),
    looked_at AS (
        SELECT session_id, last_run_at, bytes_up_to_here > %(max_bytes)s AS no_room,
            (turn_owner IS NULL OR turn_until < now()) IS NOT FALSE
            AND (used_at < now() - make_interval(secs => %(coming_in_s)s)) IS NOT FALSE AND (
                last_run_at < now() - make_interval(secs => %(hold_s)s)
                OR ended_at < now() - make_interval(secs => %(coming_in_s)s) AND NOT EXISTS (
                    SELECT 1 FROM runs WHERE runs.session_id = waiting.session_id AND started_at > ended_at)) AS over
        FROM waiting LEFT JOIN sessions USING (session_id))
    SELECT session_id, last_run_at, CASE WHEN over THEN NULL ELSE 'hold_full' END AS reason
    FROM looked_at WHERE over OR no_room ORDER BY last_run_at LIMIT %(batch)s
"""
# Every turn that is stored moves the time: it tells what has come since the look, a promotion too.
_LOCK_UNCHANGED = """
    SELECT session_id FROM sampled_sessions AS session
    JOIN unnest(%(sessions)s::text[], %(seen)s::timestamptz[]) AS look (session_id, last_run_at)
        USING (session_id, last_run_at)
    FOR UPDATE OF session SKIP LOCKED
"""
_LET_GO = """
    WITH over AS (
        SELECT * FROM unnest(%(sessions)s::text[], %(reasons)s::text[]) AS over (session_id, reason)),
    gone AS (
        DELETE FROM outbox USING runs, over
        WHERE held AND runs.trace_id = outbox.trace_id AND runs.session_id = over.session_id
        RETURNING outbox.trace_id, over.reason)
    UPDATE runs SET state = 'sampled_out', reason = gone.reason, updated_at = now(), swept_at = now()
    FROM gone WHERE runs.trace_id = gone.trace_id AND state = 'pending' RETURNING runs.reason
"""
