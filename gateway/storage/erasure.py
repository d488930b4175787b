"""Forgetting on request: what a session, or a user, has left in our tables goes in one transaction.

What MLflow has of it is noted in ``erasures``, for an evaluator to remove. The ledger keeps its rows, as ``erased`` and
without session and user, so that the states still add up.

Nothing may come back. Whoever writes what came from a run holds a lock that excludes erasures (`BESIDE_NO_ERASURE`),
and looks then whether the run is ``erased``. A run that ends after its session was forgotten is told by
``erased_sessions`` and ``erasures`` on its way into the ledger. A trace that an evaluator has claimed keeps its row in
the outbox, emptied: as long as it is there, that evaluator may still write the trace to MLflow.
"""

import hashlib
import uuid
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from gateway.storage.database import Pool

Connection = psycopg.AsyncConnection[Any]

_LOCK = 0x6167_7466
BESIDE_NO_ERASURE = f"SELECT pg_advisory_xact_lock_shared({_LOCK})"
"""First statement of a transaction that writes what came from runs: nothing is erased until its end."""
ERASED_KEPT_DAYS = 7
"""Days for which it is known that a session was forgotten: any run that was under way then has ended, or died, by then.
Nothing that is older is taken in any more."""
_ALONE = f"SELECT pg_advisory_xact_lock({_LOCK})"


class Subject(NamedTuple):
    """What is to be forgotten: a session, or all that a user took part in. Ids are as stored."""

    session_id: str | None = None
    user_id: str | None = None
    key_id: str | None = None
    """API key that it must belong to; ``None``: whichever."""


class Erasure(NamedTuple):
    """What became of a request to forget."""

    erasure_id: str
    removed: dict[str, int]
    """How many ``sessions``, ``turns``, ``responses``, ``waiting_traces``, ``scores``, ``mlflow_traces`` and
    ``dataset_rows``. The last two grow until it is done."""
    done: bool
    """Nothing is left in MLflow either."""


class _Scope(NamedTuple):
    """All that one erasure takes in."""

    key_id: str | None
    sessions: list[str]
    """The sessions that are there, those forked from them included."""
    places: list[str]
    """Ids of these, and of sessions of which there is nothing but runs."""
    traces: list[str]
    mlflow_traces: list[str]
    """Those of the traces that MLflow may have, or get."""


def user_hash(user_id: str | None) -> bytes | None:
    """Return the form in which ``erasures`` knows a user; ``None`` for nobody."""
    return hashlib.sha256(user_id.encode()).digest() if user_id else None


async def sessions_of(connection: Connection, subject: Subject) -> list[str]:
    """Return the ids of the sessions that will be forgotten, in the order in which they are to be held."""
    return await _column(connection, _FAMILY, {"named": await _named(connection, subject), "key_id": subject.key_id})


async def forget(pool: Pool, subject: Subject) -> Erasure | None:
    """Forget what is here, and note what is to be removed from MLflow.

    Returns:
        What was removed so far; ``None`` if it was about a session and nothing is known of it.
    """
    async with pool.connection() as connection, connection.transaction():
        await connection.execute(_ALONE)
        scope = await _scope(connection, subject)
        removed = await _remove(connection, scope)
        if subject.session_id and not (scope.sessions or scope.traces or removed["responses"]):
            return None
        return await _note(connection, subject, scope, removed)


async def last_erasure(connection: Connection, subject: Subject) -> Erasure | None:
    """Return the last erasure of a session; ``None`` if there was none, or another key's."""
    return await _erasure(connection, _LAST, subject._asdict())


async def find_erasure(connection: Connection, erasure_id: str) -> Erasure | None:
    """Return an erasure as it stands now."""
    return await _erasure(connection, _FIND, {"erasure_id": erasure_id})


async def _named(connection: Connection, subject: Subject) -> list[str]:
    return await _column(connection, _NAMED, subject._asdict())


async def _scope(connection: Connection, subject: Subject) -> _Scope:
    # Found again under the lock: there may be more than when the sessions were taken hold of.
    found = {"named": await _named(connection, subject), "sessions": await sessions_of(connection, subject)}
    places = await _column(connection, _PLACES, found)
    cursor = await connection.execute(_RUNS, {**found, "key_id": subject.key_id})
    runs = await cursor.fetchall()
    traces, in_mlflow = [row[0] for row in runs], [row[0] for row in runs if row[1]]
    return _Scope(subject.key_id, found["sessions"], places, traces, in_mlflow)


async def _remove(connection: Connection, scope: _Scope) -> dict[str, int]:
    """Delete the rows and return their counts. Sessions first: so does a run's commit, and they cannot deadlock."""
    values = scope._asdict()

    async def rows(statement: str) -> int:
        return (await connection.execute(statement, values)).rowcount

    [turns] = await _column(connection, _COUNT_TURNS, values)
    removed = {
        "sessions": await rows(_SESSIONS),
        "turns": turns,
        "responses": await rows(_RESPONSES),
        "waiting_traces": await rows(_WAITING) + await rows(_CLAIMED),
        "scores": await rows(_SCORES),
        "mlflow_traces": 0,
        "dataset_rows": 0,
    }
    for statement in (_TO_OTLP, _SCORINGS, _ERASED_RUNS, _SAMPLED, _WAITERS, _ANSWERS, _CONVERSATIONS):
        await rows(statement)
    return removed


async def _note(connection: Connection, subject: Subject, scope: _Scope, removed: dict[str, int]) -> Erasure:
    hashed = user_hash(subject.user_id)
    # What an earlier request has left in MLflow is this one's matter too, or it would say that nothing is there.
    traces = {*scope.mlflow_traces, *await _column(connection, _OPEN, {"user_hash": hashed})}
    erasure_id = f"er-{uuid.uuid4().hex}"
    values = {
        "erasure_id": erasure_id,
        "key_id": subject.key_id,
        "user_hash": hashed,
        "sessions": Jsonb(scope.places),
        "traces": Jsonb(sorted(traces)),
        "removed": Jsonb(removed),
        "done": not traces,
    }
    await connection.execute(_NOTE, values)
    await connection.execute(_ERASED_SESSIONS, {"erasure_id": erasure_id, "places": scope.places})
    return Erasure(erasure_id, removed, done=not traces)


async def _column(connection: Connection, statement: str, values: dict[str, Any]) -> list[Any]:
    cursor = await connection.execute(statement, values)
    return [row[0] for row in await cursor.fetchall()]


async def _erasure(connection: Connection, statement: str, values: dict[str, Any]) -> Erasure | None:
    async with connection.cursor(row_factory=class_row(Erasure)) as cursor:
        await cursor.execute(statement, values)
        return await cursor.fetchone()


_MINE = "(%(key_id)s::text IS NULL OR key_id = %(key_id)s)"
_NAMED = f"""
    SELECT %(session_id)s::text WHERE %(session_id)s IS NOT NULL
    UNION SELECT session_id FROM sessions WHERE user_id = %(user_id)s AND {_MINE}
    UNION SELECT session_id FROM runs WHERE user_id = %(user_id)s AND {_MINE}
    UNION SELECT session_id FROM responses WHERE user_id = %(user_id)s AND {_MINE}
"""
_FAMILY = f"""
    WITH RECURSIVE family AS (
        SELECT session_id FROM sessions
        WHERE (session_id = ANY(%(named)s) OR forked_from = ANY(%(named)s)) AND {_MINE}
        UNION
        SELECT fork.session_id FROM sessions AS fork JOIN family ON fork.forked_from = family.session_id)
    SELECT session_id FROM family ORDER BY session_id
"""
_RUNS = f"""
    SELECT trace_id, state NOT IN ('sampled_out', 'redaction_blocked', 'dropped')
           AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.trace_id = runs.trace_id AND held) FROM runs
    WHERE state <> 'erased' AND (session_id = ANY(%(sessions)s) OR session_id = ANY(%(named)s) AND {_MINE})
"""
_COUNT_TURNS = "SELECT count(*) FROM session_turns WHERE session_id = ANY(%(sessions)s)"
_SESSIONS = "DELETE FROM sessions WHERE session_id = ANY(%(sessions)s)"
# A session that is there and not to be forgotten is another key's: nothing of it goes but the runs of this key.
_PLACES = """
    SELECT DISTINCT place FROM unnest(%(named)s::text[] || %(sessions)s::text[]) AS place
    WHERE place = ANY(%(sessions)s) OR NOT EXISTS (SELECT 1 FROM sessions WHERE session_id = place)
"""
_ERASED_RUNS = """
    UPDATE runs SET state = 'erased', reason = NULL, session_id = '', user_id = NULL, updated_at = now()
    WHERE trace_id = ANY(%(traces)s)
"""
_SCORINGS = "DELETE FROM scorings WHERE trace_id = ANY(%(traces)s) OR subject = ANY(%(places)s)"
_RESPONSES = f"DELETE FROM responses WHERE session_id = ANY(%(places)s) AND {_MINE}"
_WAITING = "DELETE FROM outbox WHERE trace_id = ANY(%(traces)s) AND claimed_by IS NULL"
# What was sent to the second destination cannot be called back.
_TO_OTLP = "DELETE FROM otlp_outbox WHERE trace_id = ANY(%(traces)s)"
_CLAIMED = "UPDATE outbox SET payload = '', retry_at = now() WHERE trace_id = ANY(%(traces)s)"
# Once the runs have no session any more; another key's runs of that id may have decided it too.
_SAMPLED = """
    DELETE FROM sampled_sessions AS sampled WHERE session_id = ANY(%(places)s)
      AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.session_id = sampled.session_id)
"""
_SCORES = "DELETE FROM scores WHERE trace_id = ANY(%(traces)s) OR session_id = ANY(%(places)s)"
_WAITERS = "DELETE FROM session_waiters WHERE session_id = ANY(%(sessions)s)"
# The answer to a batch tells of many sessions and names none: all batches of the keys that took part go.
_ANSWERS = f"""
    DELETE FROM idempotency_keys AS kept
    WHERE (session_id = ANY(%(places)s) OR session_id IS NULL AND answer IS NOT NULL
           AND EXISTS (SELECT 1 FROM runs WHERE trace_id = ANY(%(traces)s) AND runs.key_id = kept.key_id)) AND {_MINE}
"""
_CONVERSATIONS = "DELETE FROM conversations WHERE session_id = ANY(%(places)s)"
_OPEN = """
    SELECT DISTINCT jsonb_array_elements_text(trace_ids) FROM erasures
    WHERE user_hash = %(user_hash)s AND done_at IS NULL
"""
_NOTE = """
    INSERT INTO erasures (erasure_id, key_id, user_hash, sessions, trace_ids, removed, done_at)
    VALUES (%(erasure_id)s, %(key_id)s, %(user_hash)s, %(sessions)s, %(traces)s, %(removed)s,
            CASE WHEN %(done)s THEN now() END)
"""
_ERASED_SESSIONS = """
    INSERT INTO erased_sessions (session_id, erasure_id) SELECT unnest(%(places)s::text[]), %(erasure_id)s
    ON CONFLICT (session_id) DO UPDATE SET erasure_id = excluded.erasure_id, erased_at = excluded.erased_at
"""
_ERASURE = "SELECT erasure_id, removed, done_at IS NOT NULL AS done FROM erasures"
_FIND = f"{_ERASURE} WHERE erasure_id = %(erasure_id)s"
_LAST = f"{_ERASURE} JOIN erased_sessions USING (erasure_id) WHERE session_id = %(session_id)s AND {_MINE}"
