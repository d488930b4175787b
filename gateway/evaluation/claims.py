"""The evaluator's claims on rows of the outbox.

Evaluators claim batches with ``FOR UPDATE SKIP LOCKED``. A claim counts while its evaluator is alive, which it shows
by an advisory lock that Postgres frees the moment its connection is gone: what a killed evaluator had claimed is free
for the next one at once. Traces that are held are nobody's to claim.
"""

from collections.abc import Sequence
from typing import NamedTuple

from psycopg.rows import class_row

from gateway.evaluation.records import Connection, end_run
from gateway.storage.database import Pool
from gateway.storage.erasure import BESIDE_NO_ERASURE

PRESENCE_LOCK = 0x6167_7465
"""First key of the advisory lock by which an evaluator shows that it is alive; the second is its id."""

_RETRY_AFTER_S = 5.0  # after the first failure; twice as long after each one that follows
_DOUBLINGS = 4  # so that it is 80 s at the longest
_REFUSALS = 5  # failures of one trace while MLflow is well, after which it is given up


class Claimed(NamedTuple):
    """A row of the outbox that is ours to work on."""

    trace_id: str
    payload: bytes
    """Empty: its run was forgotten."""
    attempts: int
    """How often it was claimed, this time included."""
    refusals: int
    """How often it failed while MLflow was well."""
    probability: float
    """Inclusion probability, as the ledger says."""
    reasons: list[str]
    """Why it is kept, as the ledger says."""


class Claims:
    """The claims of one evaluator."""

    def __init__(self, pool: Pool, evaluator_id: int, batch: int):
        """Take the pool, the evaluator's id, and how many traces it claims at once."""
        self._pool = pool
        self._evaluator_id = evaluator_id
        self._batch = batch

    async def claim(self) -> list[Claimed]:
        """Claim the traces that wait longest; none if nothing is left that can be claimed."""
        parameters = {"lock": PRESENCE_LOCK, "count": self._batch, "me": self._evaluator_id}
        async with self._pool.connection() as connection, connection.cursor(row_factory=class_row(Claimed)) as cursor:
            await cursor.execute(_CLAIM, parameters)
            return await cursor.fetchall()

    async def give_back(self, claimed: Sequence[Claimed]) -> None:
        """Undo claims, as if they had not been made."""
        async with self._pool.connection() as connection:
            await connection.execute(_GIVE_BACK, [[each.trace_id for each in claimed], self._evaluator_id])

    async def postpone(self, failed: Sequence[tuple[Claimed, bool]]) -> None:
        """Give back what failed, to be claimed again later.

        Args:
            failed: each with whether it is to blame for that itself; after some such failures its run has failed.
        """
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(BESIDE_NO_ERASURE)
            for each, is_refused in failed:
                refusals = each.refusals + is_refused
                if refusals >= _REFUSALS:
                    await end_run(connection, each.trace_id, "failed", "refused by MLflow")
                    await drop(connection, [each])
                retry_s = _RETRY_AFTER_S * 2 ** min(each.attempts - 1, _DOUBLINGS)
                await connection.execute(_POSTPONE, [refusals, retry_s, each.trace_id, self._evaluator_id])


async def drop(connection: Connection, claimed: Sequence[Claimed]) -> None:
    """Take rows out of the outbox for good."""
    await connection.execute("DELETE FROM outbox WHERE trace_id = ANY(%s)", [[each.trace_id for each in claimed]])


_CLAIM = """
    WITH alive AS (
        SELECT objid::int AS evaluator_id FROM pg_locks
        WHERE locktype = 'advisory' AND classid = %(lock)s AND objsubid = 2 AND granted
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())),
    mine AS (
        SELECT trace_id FROM outbox
        WHERE NOT held AND retry_at <= now()
          AND (claimed_by IS NULL OR claimed_by = %(me)s OR claimed_by NOT IN (SELECT evaluator_id FROM alive))
        ORDER BY position LIMIT %(count)s FOR UPDATE SKIP LOCKED)
    UPDATE outbox SET claimed_by = %(me)s, attempts = attempts + 1
    FROM mine JOIN runs USING (trace_id)
    WHERE outbox.trace_id = mine.trace_id
    RETURNING outbox.trace_id, outbox.payload, outbox.attempts, outbox.refusals,
              runs.inclusion_probability AS probability, runs.kept_because AS reasons
"""
_POSTPONE = """
    UPDATE outbox SET claimed_by = NULL, refusals = %s, retry_at = now() + make_interval(secs => %s)
    WHERE trace_id = %s AND claimed_by = %s
"""
_GIVE_BACK = """
    UPDATE outbox SET claimed_by = NULL, attempts = attempts - 1 WHERE trace_id = ANY(%s) AND claimed_by = %s
"""
