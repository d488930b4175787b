"""Removing from MLflow what was forgotten here: traces, and the dataset records that came from them.

`gateway.storage.erasure` has noted which traces. While a row of one of them is in the outbox, an evaluator may still
write it to MLflow: its end is waited for. All steps can be repeated; while MLflow is away, so is the end.
"""

import asyncio

import structlog
from procrastinate import App

from gateway.evaluation.datasets import DatasetFeeder
from gateway.evaluation.store import MlflowStore
from gateway.storage.database import Pool
from gateway.storage.queue import ERASE, enqueue_once

log = structlog.get_logger(__name__)

_AT_ONCE = 200  # erasures that one look takes up; the next look takes the rest


class MlflowErasure:
    """Carries out the erasures that are not done."""

    def __init__(self, pool: Pool, queue: App, store: MlflowStore, datasets: DatasetFeeder):
        self._pool = pool
        self._queue = queue
        self._store = store
        self._datasets = datasets

    async def enqueue_open(self) -> None:
        """Enqueue a job for each erasure that is not done and could be."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_OPEN, [_AT_ONCE])
            erasures = [str(row[0]) for row in await cursor.fetchall()]
        for erasure_id in erasures:
            await enqueue_once(self._queue, ERASE, erasure_id, erasure_id=erasure_id)

    async def erase(self, erasure_id: str) -> None:
        """Carry out an erasure, unless one of its traces is on its way to MLflow: then it is enqueued again.

        Raises whatever MLflow does while it is away.
        """
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_READY, [erasure_id])
            row = await cursor.fetchone()
        if row is None:
            return
        trace_ids: list[str] = row[0]  # type: ignore[assignment]
        traces = await asyncio.to_thread(self._store.delete_traces, trace_ids)
        await self._note(_COUNT, "mlflow_traces", traces, erasure_id)
        records = await self._datasets.forget(trace_ids)
        await self._note(_DONE, "dataset_rows", records, erasure_id)
        log.info("forgotten in MLflow", erasure_id=erasure_id, traces=traces, dataset_rows=records)

    async def _note(self, statement: str, kind: str, count: int, erasure_id: str) -> None:
        async with self._pool.connection() as connection:
            await connection.execute(statement, {"kind": kind, "count": count, "erasure_id": erasure_id})


_IN_FLIGHT = """
    EXISTS (SELECT 1 FROM jsonb_array_elements_text(trace_ids) AS gone JOIN outbox ON outbox.trace_id = gone)
"""
_OPEN = f"""
    SELECT erasure_id FROM erasures
    WHERE done_at IS NULL AND NOT {_IN_FLIGHT}
      AND NOT EXISTS (SELECT 1 FROM procrastinate_jobs
                      WHERE lock = 'erase:' || erasure_id AND status IN ('todo', 'doing'))
    ORDER BY requested_at LIMIT %s
"""
_READY = f"SELECT trace_ids FROM erasures WHERE erasure_id = %s AND done_at IS NULL AND NOT {_IN_FLIGHT}"
_ADD = "removed = jsonb_set(removed, ARRAY[%(kind)s], to_jsonb((removed ->> %(kind)s)::int + %(count)s))"
_COUNT = f"UPDATE erasures SET {_ADD} WHERE erasure_id = %(erasure_id)s"
_DONE = f"UPDATE erasures SET {_ADD}, done_at = now() WHERE erasure_id = %(erasure_id)s"
