"""Deletes what is past its time: sessions that nobody used for long, and what crashed processes left behind.

One process deletes at a time, in batches that are a transaction each: however much has piled up, nobody waits for it
for long. What is past its time is not given out any more by those who read it; this only frees the space.
"""

import asyncio
import random
from collections import Counter
from datetime import timedelta

import psycopg
import structlog

from gateway.storage.database import Pool
from gateway.storage.erasure import ERASED_KEPT_DAYS
from gateway.storage.signals import LIVING

log = structlog.get_logger(__name__)

_FIRST_S = 20.0  # a start has other things to do, and processes that often start anew must sweep as well
_INTERVAL_S = 600.0  # nobody waits for the space, and what ten minutes bring is deleted in a moment
_JITTER = 0.5  # share by which a pause is shorter or longer, so that processes started at once part
_BATCH = 1000  # rows a statement: with the turns that go with a session, well under a second

_LOCK = 0x6167_7472
"""Advisory lock of the process that deletes."""

_ERASURES_KEPT = "30 days"  # a month is what the law gives for an answer to whoever asked to be forgotten


class Retention:
    """Sweeps from time to time. One a web process."""

    def __init__(self, pool: Pool, *, days: float):
        """Take the pool, and the days after which a session that was not used is deleted."""
        self._pool = pool
        self._keep = timedelta(days=days)

    async def run(self) -> None:
        """Sweep until cancelled; errors of the database are logged, the next sweep tries again."""
        pause_s = _FIRST_S
        while True:
            await asyncio.sleep(pause_s * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311 - no secret
            try:
                await self.sweep()
            except psycopg.Error as error:
                log.warning("what is past its time could not be deleted; trying again later", error=str(error))
            pause_s = _INTERVAL_S

    async def sweep(self) -> dict[str, int]:
        """Delete all that is past its time.

        Returns:
            Rows deleted by table, without those that went with their session by a foreign key. Empty if there was
            nothing to delete, or another process is at it.

        Raises:
            psycopg.Error: the database is away; what was deleted so far stays deleted.
        """
        deleted: Counter[str] = Counter()
        for statement in _STATEMENTS:
            while counts := await self._delete_batch(statement):
                deleted.update(counts)
            if counts is None:
                break  # whoever is at it now has found nothing in the tables before, and does the rest
        if deleted:
            log.info("deleted what is past its time", **deleted)
        return dict(deleted)

    async def _delete_batch(self, statement: str) -> dict[str, int] | None:
        """Return the rows deleted by table, empty if nothing was left; ``None`` if another process is at it."""
        async with self._pool.connection() as connection, connection.transaction():
            cursor = await connection.execute("SELECT pg_try_advisory_xact_lock(%s)", [_LOCK])
            if await cursor.fetchone() != (True,):
                return None
            cursor = await connection.execute(statement, {"keep": self._keep, "batch": _BATCH})
            return {str(table): int(count) for table, count in await cursor.fetchall() if count}  # type: ignore[call-overload]


# Rows that are locked are in use: they are left to the next sweep.
_SESSIONS = """
    WITH gone AS (
        DELETE FROM sessions WHERE session_id = ANY(ARRAY(
            SELECT session_id FROM sessions
            WHERE used_at < now() - %(keep)s AND (turn_owner IS NULL OR turn_until < now())
            LIMIT %(batch)s FOR UPDATE SKIP LOCKED))
        RETURNING session_id
    ), answers AS (
        DELETE FROM responses USING gone WHERE responses.session_id = gone.session_id RETURNING response_id)
    SELECT 'sessions', count(*) FROM gone UNION ALL SELECT 'responses', count(*) FROM answers
"""


def _delete(table: str, condition: str) -> str:
    return f"""
        WITH gone AS (
            DELETE FROM {table} WHERE ctid = ANY(ARRAY(
                SELECT ctid FROM {table} WHERE {condition} LIMIT %(batch)s FOR UPDATE SKIP LOCKED))
            RETURNING 1)
        SELECT '{table}', count(*) FROM gone
    """


# What MLflow's tags are still to say of a session, and what may become of the turns that are held, is yet to be read.
_SETTLED = """(promoted_at IS NULL OR projected_at IS NOT NULL) AND NOT EXISTS (
    SELECT 1 FROM runs JOIN outbox USING (trace_id) WHERE held AND runs.session_id = sampled_sessions.session_id)"""

_STATEMENTS = (
    _SESSIONS,
    _delete("responses", "created_at < now() - %(keep)s"),
    _delete("paused_runs", "created_at < now() - %(keep)s"),
    _delete("sampled_sessions", f"last_run_at < now() - %(keep)s AND {_SETTLED}"),
    _delete("scorings", "state <> 'pending' AND updated_at < now() - %(keep)s"),
    _delete("dataset_rows", "skipped IS NOT NULL AND merged_at < now() - interval '30 days'"),
    _delete("judge_spending", "hour < now() - interval '90 days'"),
    _delete("idempotency_keys", "expires_at < now()"),
    _delete("erased_sessions", f"erased_at < now() - interval '{ERASED_KEPT_DAYS} days'"),
    _delete("erasures", f"done_at < now() - interval '{_ERASURES_KEPT}'"),
    _delete("session_waiters", "waiting_until < now() - interval '1 minute'"),
    _delete("key_slots", f"process_id NOT IN ({LIVING})"),
    # Not at once: a process registers a moment before it takes the lock by which it shows that it lives. Nor before its
    # counters are settled: the ledger names the host that is to do it.
    _delete(
        "web_processes",
        f"started_at < now() - interval '1 day' AND process_id NOT IN ({LIVING})"
        "AND process_id NOT IN (SELECT process_id FROM run_counts WHERE closed_at IS NULL)",
    ),
)
