"""Failed traces into MLflow datasets: once each, redacted, with where they came from.

MLflow keys a dataset's rows by their inputs and overwrites the tags of equal ones, and two merges at once can lose a
batch. So one evaluator at a time merges into a dataset, and each trace's provenance has a tag of its own.
"""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import structlog
from mlflow.entities import DatasetRecord, SpanType
from mlflow.entities import Trace as MlflowTrace
from mlflow.tracing.constant import TraceMetadataKey

from gateway.evaluation.store import MlflowStore
from gateway.storage.database import Pool

log = structlog.get_logger(__name__)

_BATCH = 100
_FROM = "from."  # tag of a record for each of its traces, with what failed it
_SCORE = "score."


class DatasetFeeder:
    """Merges the rows that wait in ``dataset_rows``, and takes out what was forgotten."""

    def __init__(self, pool: Pool, store: MlflowStore):
        self._pool = pool
        self._store = store

    async def merge_waiting(self) -> None:
        """Merge everything that waits, a dataset at a time."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute("SELECT DISTINCT dataset FROM dataset_rows WHERE merged_at IS NULL")
            waiting = [str(row[0]) for row in await cursor.fetchall()]
        for dataset in waiting:
            try:
                while await self._merge(dataset):
                    pass
            except Exception:
                log.exception("a dataset could not be fed; its rows wait", dataset=dataset)

    async def _merge(self, dataset: str) -> bool:
        """Merge one batch; return whether there may be more."""
        async with self._pool.connection() as connection, connection.transaction():
            lock = await connection.execute(_TRY_LOCK, [dataset])
            if (await lock.fetchone()) != (True,):
                return False  # another evaluator is at it
            cursor = await connection.execute(_PENDING, [dataset, _BATCH])
            failed: dict[str, dict[str, Any]] = dict(await cursor.fetchall())  # type: ignore[arg-type]
            if not failed:
                return False
            traces = await asyncio.to_thread(self._store.read_traces, list(failed))
            records = [record(trace, failed[trace.info.trace_id]) for trace in traces]
            if records:
                await asyncio.to_thread(self._store.merge_records, dataset, records)
            merged = [trace.info.trace_id for trace in traces]
            await connection.execute(_MERGED, [dataset, merged])
            if gone := sorted(set(failed) - set(merged)):
                log.warning("failed traces are not in MLflow any more", dataset=dataset, trace_ids=gone)
                await connection.execute(_FORGET, [dataset, gone])
            return len(failed) == _BATCH

    async def forget(self, trace_ids: Sequence[str]) -> int:
        """Take out what came from these traces; return how many records are gone.

        A record that other traces gave as well stays, as if they alone had given it. In MLflow it is a new one: should
        we crash in between, the traces give it again, but what people wrote into it is lost.
        """
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_NOTED, [list(trace_ids)])
            noted = {str(row[0]) for row in await cursor.fetchall()}
        known = await asyncio.to_thread(self._store.datasets)
        gone = set(trace_ids)
        return sum([await self._forget(name, known.get(name), gone) for name in sorted(noted | known.keys())])

    async def _forget(self, dataset: str, dataset_id: str | None, gone: set[str]) -> int:
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(_LOCK, [dataset])
            dataset_id = dataset_id or await asyncio.to_thread(self._store.dataset_id, dataset)
            records = await asyncio.to_thread(self._store.records, dataset_id) if dataset_id else []
            theirs = [each for each in records if origins(each) & gone]
            shared = [each for each in theirs if origins(each) - gone]
            if dataset_id and theirs:
                others = {trace_id for each in shared for trace_id in origins(each) - gone}
                async with self._pool.connection() as aside:  # so that it counts before anything is deleted
                    await aside.execute(_AGAIN, [dataset, list(others)])
                kept = [without(each, gone) for each in shared]
                await asyncio.to_thread(self._store.replace_records, dataset_id, theirs, kept)
            await connection.execute(_FORGET, [dataset, list(gone)])
            return len(theirs) - len(shared)


def record(trace: MlflowTrace, failed: dict[str, Any]) -> dict[str, Any]:
    """Return the dataset record of a trace.

    Args:
        trace: as it is in MLflow, redacted.
        failed: value by name, of the scorers that failed it.
    """
    metadata = trace.info.trace_metadata
    trace_id = trace.info.trace_id
    session_id = metadata.get(TraceMetadataKey.TRACE_SESSION, "")
    return {
        "inputs": {"messages": conversation_so_far(trace)},
        "outputs": trace.data.spans[0].outputs,
        "source": {"source_type": "TRACE", "source_data": {"trace_id": trace_id, "session_id": session_id}},
        "tags": {
            "trace_id": trace_id,
            "session_id": session_id,
            "agent": metadata.get("gateway.agent", ""),
            "agent_version": metadata.get("gateway.agent_version", ""),
            "scorers": ", ".join(sorted(failed)),
            **{f"{_SCORE}{name}": json.dumps(value) for name, value in failed.items()},
            # Rows with equal inputs are one row in MLflow: this keeps the provenance of each of its traces.
            f"{_FROM}{trace_id}": json.dumps(failed, sort_keys=True),
        },
    }


def conversation_so_far(trace: MlflowTrace) -> list[dict[str, Any]]:
    """Return the chat messages by which this turn can be asked again: the history that the agent saw, and the turn."""
    calls = [span for span in trace.data.spans if span.span_type == SpanType.CHAT_MODEL]
    first = min(calls, key=lambda span: span.start_time_ns, default=trace.data.spans[0])
    messages: list[dict[str, Any]] = (first.inputs or {}).get("messages", [])
    return [message for message in messages if message.get("role") != "system"]


def origins(record: DatasetRecord) -> set[str]:
    """Return the ids of the traces that a record came from; none if a person thought it up."""
    tagged = {tag.removeprefix(_FROM) for tag in record.tags or {} if tag.startswith(_FROM)}
    source = record.source.source_data.get("trace_id") if record.source else None
    return tagged | {source} if source else tagged


def without(record: DatasetRecord, gone: set[str]) -> dict[str, Any]:
    """Return what is left of a record of several traces when those that are ``gone`` are taken out.

    What it tells of the traces themselves (outputs, agent, scores) may be of any: it is merged again from the others.
    """
    told_again = {"trace_id", "session_id", "agent", "agent_version", "scorers"}
    return {
        "inputs": record.inputs,
        "expectations": record.expectations,
        "source": {"source_type": "TRACE", "source_data": {"trace_id": min(origins(record) - gone)}},
        "tags": {
            tag: value
            for tag, value in (record.tags or {}).items()
            if tag not in told_again and not tag.startswith(_SCORE) and tag.removeprefix(_FROM) not in gone
        },
    }


_PENDING = """
    SELECT trace_id, scorers FROM dataset_rows WHERE dataset = %s AND merged_at IS NULL
    ORDER BY created_at LIMIT %s FOR UPDATE
"""
_MERGED = "UPDATE dataset_rows SET merged_at = now() WHERE dataset = %s AND trace_id = ANY(%s)"
_AGAIN = "UPDATE dataset_rows SET merged_at = NULL WHERE dataset = %s AND trace_id = ANY(%s)"
_FORGET = "DELETE FROM dataset_rows WHERE dataset = %s AND trace_id = ANY(%s)"
_NOTED = "SELECT DISTINCT dataset FROM dataset_rows WHERE trace_id = ANY(%s)"
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('dataset/' || %s, 0))"
_TRY_LOCK = "SELECT pg_try_advisory_xact_lock(hashtextextended('dataset/' || %s, 0))"
