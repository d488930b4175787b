"""Finished runs into Postgres: the ledger's rows, what is decided of their sessions, and the outbox.

A batch is one transaction of a handful of statements, however many runs it has. Written again, after a commit that was
not heard of, it changes nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec
import psycopg
from psycopg.types.json import Jsonb

from gateway.storage.database import Pool
from gateway.storage.erasure import BESIDE_NO_ERASURE, user_hash
from gateway.tracing.sampling import Decision, decide

Connection = psycopg.AsyncConnection[Any]


CONNECTION_S = 1.0
"""Seconds to wait for a connection: meanwhile what waits is in memory only."""
STORE_S = 10.0
"""Seconds that a transaction may take before it counts as failed."""


@asynccontextmanager
async def transaction(pool: Pool, within_s: float = STORE_S) -> AsyncIterator[Connection]:
    """Give a connection in a transaction, for ``within_s`` seconds; raise psycopg's errors, or ``TimeoutError``.

    In pipeline mode: a statement whose result nobody reads is not waited for before the next, and may fail later.
    """
    async with (
        asyncio.timeout(within_s),
        pool.connection(CONNECTION_S) as connection,
        connection.pipeline(),
        connection.transaction(),
    ):
        yield connection


class FinishedRun(msgspec.Struct):
    """A run as it is stored: facts for the ledger, and its trace unless there is none to keep."""

    trace_id: str
    agent: str
    agent_version: str
    session_id: str
    """As stored: ids that are personal are hashes by now."""
    user_id: str | None
    key_id: str
    process_id: int
    """Web process that served it."""
    failed: bool
    """The client got an error."""
    offline: bool
    started_ns: int
    """Nanoseconds since the epoch."""
    duration_ms: float
    rate: float
    """Rate by which its session was drawn, as far as the web process knew: that of the first turn counts."""
    drawn: bool
    """Whether the draw keeps it."""
    rules: list[str]
    """Tail rules that it met."""
    state: Literal["pending", "sampled_out", "redaction_blocked"]
    """``pending``: it has a payload, which is kept or held. ``sampled_out``: nothing was captured."""
    payload: bytes | None
    """The trace: redacted, encoded, encrypted. ``None`` unless it is pending."""


async def store_runs(connection: Connection, runs: Sequence[FinishedRun], *, hold: bool, pin: bool = True) -> bool:
    """Store a batch, within the caller's transaction.

    A run that began before its session or its user was forgotten is counted, and nothing else of it is kept.

    Args:
        connection: in a transaction.
        runs: in the order in which they ended.
        hold: keep the traces of sessions that are not sampled for as long as a later turn may promote them.
        pin: remember what was drawn for a session also where nothing is to be kept of it, so that it stays out when
            the rate rises; not needed while nothing is traced at all.

    Returns:
        Whether there is something for the evaluators to take in.
    """
    if not runs:
        return False
    await connection.execute(BESIDE_NO_ERASURE)
    erased = await _erased(connection, runs)
    asking = [run for run in runs if run.trace_id not in erased and (pin or run.state != "sampled_out" or run.rules)]
    decisions, promoted = await _decide(connection, asking)
    rows = [
        _forgotten(run) if run.trace_id in erased else _row(run, decisions.get(run.session_id), hold=hold)
        for run in runs
    ]
    values: dict[str, Any] = {"runs": msgspec.json.encode(rows).decode()}
    held = {row["trace_id"]: row["held"] for row in rows if row["state"] == "pending"}
    if held:
        values |= {"traces": list(held), "held": list(held.values())}
        values["payloads"] = [run.payload for run in runs if run.trace_id in held]
    await connection.execute(_INSERT_WITH_TRACES if held else _INSERT_RUNS, values)
    if promoted:
        now = {
            "sessions": promoted,
            "probabilities": [decisions[each].probability for each in promoted],
            "reasons": [Jsonb(decisions[each].reasons) for each in promoted],
        }
        await connection.execute(_PROMOTE_RUNS, now)
        await connection.execute(_RELEASE, now)
    return bool(promoted) or not all(held.values())


async def _erased(connection: Connection, runs: Sequence[FinishedRun]) -> set[str]:
    """Return the ids of the runs whose session or user was forgotten after they began."""
    cursor = await connection.execute(
        _ERASED,
        {
            "traces": [run.trace_id for run in runs],
            "sessions": [run.session_id for run in runs],
            "users": [user_hash(run.user_id) for run in runs],
            "keys": [run.key_id for run in runs],
            "started": [_time(run.started_ns) for run in runs],
        },
    )
    return {str(row[0]) for row in await cursor.fetchall()}


async def _decide(connection: Connection, runs: Sequence[FinishedRun]) -> tuple[dict[str, Decision], list[str]]:
    """Return what becomes of the runs' sessions by session id, and the sessions that meet a tail rule."""
    first: dict[str, FinishedRun] = {}
    rules: dict[str, list[str]] = {}
    for run in runs:
        first.setdefault(run.session_id, run)
        rules.setdefault(run.session_id, []).extend(run.rules)
    if not first:
        return {}, []
    ids = sorted(first)  # two processes that write the same sessions lock them in one order
    cursor = await connection.execute(
        _DECIDE,
        {
            "sessions": ids,
            "rates": [first[each].rate for each in ids],
            "kept": [first[each].drawn for each in ids],
            "rules": [Jsonb(sorted(set(rules[each]))) for each in ids],
        },
    )
    decisions = {
        str(session_id): decide(drawn=kept, rate=rate, rules=met)
        for session_id, rate, kept, met in await cursor.fetchall()
    }
    return decisions, [each for each in ids if rules[each]]


def _row(run: FinishedRun, decision: Decision | None, *, hold: bool) -> dict[str, Any]:
    """Return the row of a run; ``None`` as decision: nothing of it was captured."""
    row: dict[str, Any] = {name: getattr(run, name, None) for name in _RUN_COLUMNS}
    row |= {"started_at": _time(run.started_ns), "status": "error" if run.failed else "ok", "held": False}
    if decision is None:
        return row | {"kept_because": [], "inclusion_probability": run.rate}
    row |= {"kept_because": decision.reasons, "inclusion_probability": decision.probability}
    if run.state == "pending" and not decision.kept:
        row |= {"held": True} if hold else {"state": "sampled_out"}
    return row


def _forgotten(run: FinishedRun) -> dict[str, Any]:
    """Return the row of a run that was forgotten before it came here."""
    return _row(run, None, hold=False) | {"session_id": "", "user_id": None, "state": "erased"}


def _time(ns: int) -> datetime:
    return datetime.fromtimestamp(ns / 1e9, UTC)


_RUN_COLUMNS = {
    "trace_id": "text",
    "agent": "text",
    "agent_version": "text",
    "session_id": "text",
    "user_id": "text",
    "key_id": "text",
    "process_id": "int",
    "status": "text",
    "offline": "bool",
    "state": "text",
    "kept_because": "jsonb",
    "inclusion_probability": "float8",
    "started_at": "timestamptz",
    "duration_ms": "float8",
}
# As JSON: a parameter of arrays costs this process ten times as much.
_INSERT_RUNS = f"""
    INSERT INTO runs ({", ".join(_RUN_COLUMNS)})
    SELECT * FROM json_to_recordset(%(runs)s::json)
        AS run ({", ".join(f"{name} {kind}" for name, kind in _RUN_COLUMNS.items())})
    ON CONFLICT (trace_id) DO NOTHING
"""
# Of a batch that was stored before and not heard of, some may have been taken in already.
_INSERT_WITH_TRACES = f"""
    WITH new AS ({_INSERT_RUNS} RETURNING trace_id)
    INSERT INTO outbox (trace_id, payload, held)
    SELECT trace_id, payload, held
    FROM unnest(%(traces)s::text[], %(payloads)b::bytea[], %(held)s::bool[]) AS waiting (trace_id, payload, held)
    JOIN new USING (trace_id)
    ON CONFLICT (trace_id) DO NOTHING
"""
_ERASED = """
    SELECT trace_id
    FROM unnest(%(traces)s::text[], %(sessions)s::text[], %(users)s::bytea[], %(keys)s::text[],
                %(started)s::timestamptz[]) AS run (trace_id, session_id, user_hash, key_id, started_at)
    WHERE EXISTS (SELECT 1 FROM erased_sessions AS erased
                  WHERE erased.session_id = run.session_id AND erased_at > started_at)
       OR EXISTS (SELECT 1 FROM erasures
                  WHERE erasures.user_hash = run.user_hash AND requested_at > started_at
                    AND (erasures.key_id IS NULL OR erasures.key_id = run.key_id))
"""
# What the first turn brought stays; later turns only add rules. Who adds one has MLflow's tags written anew.
_DECIDE = """
    INSERT INTO sampled_sessions AS known (session_id, rate, kept, rules, promoted_at)
    SELECT session_id, rate, kept, rules, CASE WHEN rules <> '[]' THEN now() END
    FROM unnest(%(sessions)s::text[], %(rates)s::float8[], %(kept)s::bool[], %(rules)s::jsonb[])
        AS turn (session_id, rate, kept, rules)
    ON CONFLICT (session_id) DO UPDATE SET
        last_run_at = now(),
        rules = CASE WHEN known.rules @> excluded.rules THEN known.rules ELSE (
            SELECT jsonb_agg(DISTINCT rule) FROM jsonb_array_elements(known.rules || excluded.rules) AS rule) END,
        promoted_at = coalesce(known.promoted_at, excluded.promoted_at),
        projected_at = CASE WHEN known.rules @> excluded.rules THEN known.projected_at END
    RETURNING session_id, rate, kept, rules
"""
# Only those that it changes: each turn that meets a rule comes here, and a conversation may have many.
_PROMOTE_RUNS = """
    UPDATE runs SET inclusion_probability = decided.probability, kept_because = decided.reasons
    FROM unnest(%(sessions)s::text[], %(probabilities)s::float8[], %(reasons)s::jsonb[])
        AS decided (session_id, probability, reasons)
    WHERE runs.session_id = decided.session_id AND state NOT IN ('sampled_out', 'erased')
      AND (inclusion_probability, kept_because) IS DISTINCT FROM (decided.probability, decided.reasons)
"""
_RELEASE = """
    UPDATE outbox SET held = false, retry_at = now(), created_at = now() FROM runs
    WHERE held AND runs.trace_id = outbox.trace_id AND runs.session_id = ANY(%(sessions)s)
"""
