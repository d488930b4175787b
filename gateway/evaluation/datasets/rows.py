"""The table ``dataset_rows``: what goes into which dataset and why, and what became of it.

It is the truth of which MLflow's datasets are the projection. A row waits while ``merged_at`` is NULL; then it was
taken (``taken_at``), or left out (``skipped`` says why) and counted. Nothing that was forgotten gets in.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from gateway.storage.erasure import BESIDE_NO_ERASURE
from gateway.storage.schema import KEPT

Connection = psycopg.AsyncConnection[Any]

SIMILAR = "similar"
DAILY_CAP = "daily cap"
REFUSED = "refused by MLflow"
_COMPARED = 1000  # newest rows that a new one is compared with: five days of the default cap, some 10 ms


class Wanted(NamedTuple):
    """A trace that a rule wants in a dataset."""

    dataset: str
    trace_id: str
    rule: str
    whole_session: bool
    scorers: dict[str, Any]
    """Value by name of the scores that are the reason; empty where scores are not."""
    provenance: dict[str, dict[str, Any]]
    """Where each reason came from, by name."""


class Row(NamedTuple):
    """A row that waits to be merged."""

    trace_id: str
    rule: str | None
    """``None``: an earlier version put it there."""
    agent: str
    session_id: str
    scorers: dict[str, Any]
    provenance: dict[str, dict[str, Any]]
    whole_session: bool
    session_of: str | None
    """Trace whose whole session it is part of; ``None``: it was meant itself."""
    is_taken: bool
    """It is in the dataset, and has something new to say."""
    probability: float
    """With which the trace was kept."""


class Known(NamedTuple):
    """A row that is in the dataset, to compare others with."""

    trace_id: str
    agent: str
    session_id: str
    signature: bytes


class Counts(NamedTuple):
    """What became of what the rules wanted in a dataset."""

    dataset: str
    waiting: int
    taken: int
    taken_today: int
    similar: int
    capped: int
    refused: int


async def note(connection: Connection, wanted: Sequence[Wanted]) -> None:
    """Note what rules want; said again, nothing changes, and a new reason is added to those that are known.

    The caller's transaction must exclude erasures (`beside_no_erasure`).
    """
    if not wanted:
        return
    columns = {name: [getattr(each, name) for each in wanted] for name in ("dataset", "trace_id", "rule")}
    await connection.execute(
        _NOTE,
        {
            **columns,
            "whole": [each.whole_session for each in wanted],
            "scorers": [Jsonb(each.scorers) for each in wanted],
            "provenance": [Jsonb(each.provenance) for each in wanted],
        },
    )


async def beside_no_erasure(connection: Connection) -> None:
    """Let nothing be forgotten until the end of the transaction."""
    await connection.execute(BESIDE_NO_ERASURE)


async def waiting_datasets(connection: Connection) -> list[str]:
    """Return the datasets that rows wait for."""
    cursor = await connection.execute(f"SELECT DISTINCT dataset FROM dataset_rows AS kept WHERE {_READY}")
    return [str(row[0]) for row in await cursor.fetchall()]


async def lock(connection: Connection, dataset: str) -> None:
    """Wait until nobody else changes the dataset; held until the transaction's end."""
    await connection.execute(_LOCK, [dataset])


async def try_lock(connection: Connection, dataset: str) -> bool:
    """Do what `lock` does if that takes no waiting; return whether it was done."""
    cursor = await connection.execute(_TRY_LOCK, [dataset])
    return bool(await cursor.fetchone() == (True,))


async def waiting(connection: Connection, dataset: str, count: int) -> list[Row]:
    """Return rows that wait, oldest first. The caller holds the dataset's lock."""
    async with connection.cursor(row_factory=class_row(Row)) as cursor:
        await cursor.execute(_WAITING, [dataset, count])
        return await cursor.fetchall()


async def known(connection: Connection, dataset: str) -> list[Known]:
    """Return the newest rows of the dataset, to compare others with."""
    async with connection.cursor(row_factory=class_row(Known)) as cursor:
        await cursor.execute(_KNOWN, [dataset, _COMPARED])
        return await cursor.fetchall()


async def taken_today(connection: Connection, dataset: str) -> int:
    """Return how many rows the dataset has taken since midnight, UTC; turns of whole sessions do not count apart."""
    cursor = await connection.execute(_TAKEN_TODAY, [dataset])
    row = await cursor.fetchone()
    return int(row[0]) if row else 0


async def mark_taken(
    connection: Connection, dataset: str, merged: Sequence[tuple[Row, bytes, datetime | None]]
) -> None:
    """Note that these rows are in MLflow; one that got another reason meanwhile goes on waiting.

    Args:
        connection: to the database.
        dataset: where they are.
        merged: each as it was merged, with its signature, and when a person last said something that is in it.
    """
    await connection.execute(
        _TAKEN,
        {
            "dataset": dataset,
            "traces": [row.trace_id for row, _, _ in merged],
            "provenance": [Jsonb(row.provenance) for row, _, _ in merged],
            "signatures": [stored for _, stored, _ in merged],
            "annotated": [annotated for _, _, annotated in merged],
        },
    )


async def mark_skipped(connection: Connection, dataset: str, left_out: Sequence[tuple[Row, str, str | None]]) -> None:
    """Note that rows were left out: why, and which trace's row they are like. Otherwise as `mark_taken`."""
    await connection.execute(
        _SKIPPED,
        {
            "dataset": dataset,
            "traces": [row.trace_id for row, _, _ in left_out],
            "provenance": [Jsonb(row.provenance) for row, _, _ in left_out],
            "reasons": [why for _, why, _ in left_out],
            "similar": [similar_to for _, _, similar_to in left_out],
        },
    )


async def drop(connection: Connection, dataset: str, trace_ids: Sequence[str]) -> None:
    """Take rows out of the table."""
    await connection.execute(_DROP, [dataset, list(trace_ids)])


async def add_session(connection: Connection, dataset: str, row: Row) -> None:
    """Note the other turns of the row's conversation, as many as are kept."""
    values = {"dataset": dataset, "trace_id": row.trace_id, "rule": row.rule, "session_id": row.session_id}
    await connection.execute(_SESSION, values)


async def merge_again(connection: Connection, dataset: str, trace_ids: Sequence[str]) -> None:
    """Have rows that were taken merged again, with what is new of them."""
    await connection.execute(_AGAIN, [dataset, list(trace_ids)])


async def merge_annotated(connection: Connection, annotated: Sequence[tuple[str, datetime]]) -> None:
    """Have rows that were taken merged again if people have said more of their traces since."""
    values = {"traces": [trace_id for trace_id, _ in annotated], "times": [time for _, time in annotated]}
    await connection.execute(_ANNOTATED, values)


async def forget(connection: Connection, dataset: str, gone: Sequence[str]) -> None:
    """Take rows out for good; what was left out since it is like one of them is looked at again."""
    await connection.execute(_RECONSIDER, [dataset, list(gone)])
    await drop(connection, dataset, gone)


async def datasets_of(connection: Connection, trace_ids: Sequence[str]) -> set[str]:
    """Return the datasets that have rows of any of the traces."""
    cursor = await connection.execute(
        "SELECT DISTINCT dataset FROM dataset_rows WHERE trace_id = ANY(%s)", [list(trace_ids)]
    )
    return {str(row[0]) for row in await cursor.fetchall()}


async def among(connection: Connection, dataset: str, trace_ids: Sequence[str]) -> set[str]:
    """Return which of the traces are noted for the dataset."""
    cursor = await connection.execute(
        "SELECT trace_id FROM dataset_rows WHERE dataset = %s AND trace_id = ANY(%s)", [dataset, list(trace_ids)]
    )
    return {str(row[0]) for row in await cursor.fetchall()}


async def erased(connection: Connection, trace_ids: Sequence[str]) -> set[str]:
    """Return which of the traces were forgotten."""
    cursor = await connection.execute(
        "SELECT trace_id FROM runs WHERE trace_id = ANY(%s) AND state = 'erased'", [list(trace_ids)]
    )
    return {str(row[0]) for row in await cursor.fetchall()}


async def taken(connection: Connection, dataset: str) -> list[str]:
    """Return the ids of the traces that are in the dataset by a rule."""
    cursor = await connection.execute(
        "SELECT trace_id FROM dataset_rows WHERE dataset = %s AND taken_at IS NOT NULL ORDER BY taken_at", [dataset]
    )
    return [str(row[0]) for row in await cursor.fetchall()]


async def newest_taken(connection: Connection, count: int) -> list[str]:
    """Return the ids of the traces that were taken last, into whichever dataset."""
    cursor = await connection.execute(
        "SELECT trace_id FROM dataset_rows WHERE taken_at IS NOT NULL ORDER BY taken_at DESC LIMIT %s", [count]
    )
    return [str(row[0]) for row in await cursor.fetchall()]


async def counts(connection: Connection) -> list[Counts]:
    """Return what became of the rows of each dataset."""
    async with connection.cursor(row_factory=class_row(Counts)) as cursor:
        await cursor.execute(_COUNTS)
        return await cursor.fetchall()


async def seen_until(connection: Connection, mark: str) -> datetime | None:
    """Return until when a kind of news was looked at; ``None`` if never."""
    cursor = await connection.execute("SELECT seen_until FROM dataset_marks WHERE name = %s", [mark])
    row = await cursor.fetchone()
    return row[0] if row else None


async def mark_seen(connection: Connection, mark: str, until: datetime) -> None:
    """Note until when a kind of news was looked at."""
    await connection.execute(_SEEN, [mark, until])


# A whole session is taken when it is over, which it is once its scoring has made it due no more.
_READY = """
    merged_at IS NULL AND (NOT whole_session OR taken_at IS NOT NULL OR NOT EXISTS (
        SELECT 1 FROM runs JOIN conversations USING (session_id)
        WHERE runs.trace_id = kept.trace_id AND due_at IS NOT NULL))
"""
_NOTE = """
    INSERT INTO dataset_rows AS known (dataset, trace_id, rule, agent, whole_session, scorers, provenance)
    SELECT wanted.dataset, trace_id, wanted.rule, runs.agent, wanted.whole, wanted.scorers, wanted.provenance
    FROM unnest(%(dataset)s::text[], %(trace_id)s::text[], %(rule)s::text[], %(whole)s::bool[], %(scorers)s::jsonb[],
                %(provenance)s::jsonb[]) AS wanted (dataset, trace_id, rule, whole, scorers, provenance)
    JOIN runs USING (trace_id) WHERE runs.state <> 'erased'
    ON CONFLICT (dataset, trace_id) DO UPDATE SET
        rule = CASE WHEN known.taken_at IS NULL THEN excluded.rule ELSE known.rule END,
        whole_session = known.whole_session OR excluded.whole_session,
        scorers = known.scorers || excluded.scorers,
        provenance = known.provenance || excluded.provenance,
        skipped = NULL, similar_to = NULL, merged_at = NULL
    WHERE NOT known.provenance @> excluded.provenance OR excluded.whole_session AND NOT known.whole_session
"""
_WAITING = f"""
    SELECT kept.trace_id, rule, coalesce(kept.agent, runs.agent, '') AS agent,
           coalesce(runs.session_id, '') AS session_id, scorers, provenance, whole_session, session_of,
           taken_at IS NOT NULL AS is_taken, coalesce(runs.inclusion_probability, 1) AS probability
    FROM dataset_rows AS kept LEFT JOIN runs USING (trace_id)
    WHERE dataset = %s AND {_READY} ORDER BY kept.created_at, kept.trace_id LIMIT %s
"""
_KNOWN = """
    SELECT kept.trace_id, coalesce(kept.agent, '') AS agent, coalesce(runs.session_id, '') AS session_id, signature
    FROM dataset_rows AS kept LEFT JOIN runs USING (trace_id)
    WHERE dataset = %s AND taken_at IS NOT NULL AND signature IS NOT NULL ORDER BY taken_at DESC LIMIT %s
"""
_TAKEN_TODAY = """
    SELECT count(*) FROM dataset_rows
    WHERE dataset = %s AND session_of IS NULL AND taken_at >= date_trunc('day', now(), 'UTC')
"""
_TAKEN = """
    UPDATE dataset_rows AS kept SET
        merged_at = CASE WHEN kept.provenance = merged.provenance THEN now() END,
        taken_at = coalesce(taken_at, now()), skipped = NULL, similar_to = NULL,
        signature = merged.signature, annotated_at = greatest(kept.annotated_at, merged.annotated)
    FROM unnest(%(traces)s::text[], %(provenance)s::jsonb[], %(signatures)s::bytea[], %(annotated)s::timestamptz[])
        AS merged (trace_id, provenance, signature, annotated)
    WHERE dataset = %(dataset)s AND kept.trace_id = merged.trace_id
"""
_SKIPPED = """
    UPDATE dataset_rows AS kept SET merged_at = now(), skipped = out.why, similar_to = out.similar_to
    FROM unnest(%(traces)s::text[], %(provenance)s::jsonb[], %(reasons)s::text[], %(similar)s::text[])
        AS out (trace_id, provenance, why, similar_to)
    WHERE dataset = %(dataset)s AND kept.trace_id = out.trace_id AND kept.provenance = out.provenance
"""
_DROP = "DELETE FROM dataset_rows WHERE dataset = %s AND trace_id = ANY(%s)"
_SESSION = f"""
    INSERT INTO dataset_rows AS known (dataset, trace_id, rule, agent, scorers, session_of)
    SELECT %(dataset)s, trace_id, %(rule)s, agent, '{{}}', %(trace_id)s FROM runs
    WHERE session_id = %(session_id)s AND session_id <> '' AND trace_id <> %(trace_id)s
      AND {KEPT}
    ON CONFLICT (dataset, trace_id) DO UPDATE SET
        session_of = excluded.session_of, skipped = NULL, similar_to = NULL, merged_at = NULL
    WHERE known.taken_at IS NULL
"""
_AGAIN = """
    UPDATE dataset_rows SET merged_at = NULL WHERE dataset = %s AND trace_id = ANY(%s) AND skipped IS NULL
"""
_ANNOTATED = """
    UPDATE dataset_rows AS kept SET merged_at = NULL
    FROM unnest(%(traces)s::text[], %(times)s::timestamptz[]) AS said (trace_id, annotated)
    WHERE kept.trace_id = said.trace_id AND taken_at IS NOT NULL
      AND (annotated_at IS NULL OR annotated_at < said.annotated)
"""
_RECONSIDER = """
    UPDATE dataset_rows SET merged_at = NULL, skipped = NULL, similar_to = NULL
    WHERE dataset = %s AND similar_to = ANY(%s)
"""
_COUNTS = f"""
    SELECT dataset, count(*) FILTER (WHERE merged_at IS NULL) AS waiting,
           count(*) FILTER (WHERE taken_at IS NOT NULL) AS taken,
           count(*) FILTER (WHERE taken_at >= date_trunc('day', now(), 'UTC')) AS taken_today,
           count(*) FILTER (WHERE skipped = '{SIMILAR}') AS similar,
           count(*) FILTER (WHERE skipped = '{DAILY_CAP}') AS capped,
           count(*) FILTER (WHERE skipped = '{REFUSED}') AS refused
    FROM dataset_rows GROUP BY dataset ORDER BY dataset
"""
_SEEN = """
    INSERT INTO dataset_marks (name, seen_until) VALUES (%s, %s)
    ON CONFLICT (name) DO UPDATE SET seen_until = excluded.seen_until
"""
_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('dataset/' || %s, 0))"
_TRY_LOCK = "SELECT pg_try_advisory_xact_lock(hashtextextended('dataset/' || %s, 0))"
