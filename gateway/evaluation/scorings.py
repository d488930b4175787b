"""The table ``scorings``: what is still to be scored, by whom, and what became of it.

A row is one scorer on one subject: a trace, or a conversation of so many turns. Judges get a row each, since they take
their time, cost money and fail for a while; so does what is scored again on request. Scorers in plain code score in
the intake and need none.

A row is claimed as the outbox' are: the claim counts while its evaluator is alive. All rows of one subject are one
evaluator's at a time. What fails for a while is tried again, later each time; what fails for good stays here as
``failed``, to be looked at and to be tried again by hand.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
from psycopg.rows import class_row

from gateway.evaluation.claims import PRESENCE_LOCK
from gateway.evaluation.records import Connection
from gateway.evaluation.scoring import Score
from gateway.evaluation.selection import Selected
from gateway.storage.database import Pool
from gateway.storage.schema import ScoringState

ATTEMPTS = 8
"""Attempts before a scoring has failed: with the pauses between them some 20 minutes."""

_CLAIMING = 0x6167_7463  # advisory lock: who claims sees what the others have claimed
_RETRY_AFTER_S = 5.0
_DOUBLINGS = 6  # so that a pause is 320 s at the longest


class Scoring(NamedTuple):
    """A row that is ours to work on."""

    subject: str
    """Trace id, or session id of a conversation."""
    turns: int
    """Of the conversation; 0: a trace."""
    scorer: str
    scorer_version: str
    trace_id: str
    """The trace that the scores are on."""
    agent: str
    probability: float
    """With which a score of it exists, given that the trace was kept."""
    attempts: int
    """This one included."""
    back_fill: bool = False
    """Whether it is of what was served before the scorer was there."""

    @property
    def key(self) -> tuple[str, int, str, str]:
        """What names the row."""
        return self.subject, self.turns, self.scorer, self.scorer_version


class Scorings:
    """The claims of one evaluator."""

    def __init__(self, pool: Pool, evaluator_id: int):
        self._pool = pool
        self._evaluator_id = evaluator_id

    async def claim(self, count: int, waiting: Collection[str] = (), at_work: Collection[str] = ()) -> list[Scoring]:
        """Claim what has been due for the longest, what is live first; none if nothing is due.

        Args:
            count: rows at the most.
            waiting: scorers whose back-fills are to wait.
            at_work: subjects that this evaluator works on. Its other claims are void: their answer never arrived, or
                they could not be given back.
        """
        values = {"lock": PRESENCE_LOCK, "me": self._evaluator_id, "count": count, "waiting": list(waiting)}
        values["at_work"] = list(at_work)
        async with self._pool.connection() as connection:
            if not await (await connection.execute(_IS_DUE, values)).fetchone():
                return []
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(%s)", [_CLAIMING])
            async with connection.cursor(row_factory=class_row(Scoring)) as cursor:
                await cursor.execute(_CLAIM, values)
                return await cursor.fetchall()

    async def postpone(self, scoring: Scoring, reason: str, retry_after_s: float | None = None) -> None:
        """Give a row back, to be tried again later."""
        pause_s = _RETRY_AFTER_S * 2 ** min(scoring.attempts - 1, _DOUBLINGS)
        async with self._pool.connection() as connection:
            await connection.execute(_POSTPONE, [max(pause_s, retry_after_s or 0.0), reason, *scoring.key])

    async def give_back(self, scorings: Sequence[Scoring], pause_s: float = 0.0) -> None:
        """Undo claims, as if they had not been made; nobody makes them again before the pause is over."""
        async with self._pool.connection() as connection:
            await connection.execute(_GIVE_BACK, {"rows": _keys(scorings), "pause": pause_s})


async def enqueue(
    connection: Connection, subject: str, turns: int, trace_id: str, agent: str, selected: Iterable[Selected]
) -> None:
    """Note what is to be scored; what is noted already stays as it is."""
    rows = [
        {
            "subject": subject,
            "turns": turns,
            "scorer": each.live.name,
            "scorer_version": each.live.version,
            "trace_id": trace_id,
            "agent": agent,
            "probability": each.probability,
        }
        for each in selected
    ]
    if rows:
        await connection.execute(_ENQUEUE, [msgspec.json.encode(rows).decode()])


async def enqueue_failed(
    connection: Connection, subject: str, turns: int, trace_id: str, agent: str, scores: Sequence[Score]
) -> None:
    """Note what scorers in plain code have failed at, so that it is seen and tried again where judges' failures are."""
    with_verdict = {score.scorer for score in scores if score.error is None}
    rows = {
        score.scorer: {
            "subject": subject,
            "turns": turns,
            "scorer": score.scorer,
            "scorer_version": score.scorer_version,
            "trace_id": trace_id,
            "agent": agent,
            "probability": score.inclusion_probability,
            "reason": score.error,
        }
        for score in scores
        if score.scorer not in with_verdict
    }
    if rows:
        await connection.execute(_ENQUEUE_FAILED, [msgspec.json.encode(list(rows.values())).decode()])


async def end(connection: Connection, scoring: Scoring, state: ScoringState, reason: str | None = None) -> None:
    """Move a row to a state in which nobody works on it any more."""
    await connection.execute(_END, [state, reason, *scoring.key])


async def is_over(connection: Connection, trace_id: str) -> bool:
    """Whether nothing of the trace's own is to be scored any more.

    Its run is held until the transaction's end: of two that end the last two rows at once, the second one sees both.
    """
    await connection.execute("SELECT 1 FROM runs WHERE trace_id = %s FOR UPDATE", [trace_id])
    cursor = await connection.execute(_LEFT, [trace_id])
    return await cursor.fetchone() is None


def _keys(scorings: Sequence[Scoring]) -> str:
    columns: list[dict[str, Any]] = [
        {"subject": each.subject, "turns": each.turns, "scorer": each.scorer, "scorer_version": each.scorer_version}
        for each in scorings
    ]
    return msgspec.json.encode(columns).decode()


_DUE = "state = 'pending' AND due_at <= now() AND NOT (back_fill AND scorer = ANY(%(waiting)s))"
_IS_DUE = f"SELECT 1 FROM scorings WHERE {_DUE} LIMIT 1"
_CLAIM = f"""
    WITH alive AS (
        SELECT objid::int AS evaluator_id FROM pg_locks
        WHERE locktype = 'advisory' AND classid = %(lock)s AND objsubid = 2 AND granted
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())),
    taken AS (
        SELECT subject FROM scorings WHERE state = 'pending' AND (subject = ANY(%(at_work)s)
            OR (claimed_by <> %(me)s AND claimed_by IN (SELECT evaluator_id FROM alive)))),
    due AS (
        SELECT subject, turns, scorer, scorer_version FROM scorings
        WHERE {_DUE} AND subject NOT IN (SELECT subject FROM taken)
        ORDER BY back_fill, due_at LIMIT %(count)s)
    UPDATE scorings SET claimed_by = %(me)s, attempts = attempts + 1, updated_at = now()
    FROM due
    WHERE (scorings.subject, scorings.turns, scorings.scorer, scorings.scorer_version)
        = (due.subject, due.turns, due.scorer, due.scorer_version)
    RETURNING scorings.subject, scorings.turns, scorings.scorer, scorings.scorer_version, scorings.trace_id,
        scorings.agent, scorings.probability, scorings.attempts, scorings.back_fill
"""
_MINE = "subject = %s AND turns = %s AND scorer = %s AND scorer_version = %s"
_POSTPONE = f"""
    UPDATE scorings SET claimed_by = NULL, due_at = now() + make_interval(secs => %s), reason = %s, updated_at = now()
    WHERE {_MINE} AND state = 'pending'
"""
_GIVE_BACK = """
    UPDATE scorings SET claimed_by = NULL, attempts = attempts - 1,
        due_at = greatest(due_at, now() + make_interval(secs => %(pause)s))
    FROM json_to_recordset(%(rows)s::json) AS given (subject text, turns int, scorer text, scorer_version text)
    WHERE (scorings.subject, scorings.turns, scorings.scorer, scorings.scorer_version)
        = (given.subject, given.turns, given.scorer, given.scorer_version) AND state = 'pending'
"""
_ENQUEUE = """
    INSERT INTO scorings (subject, turns, scorer, scorer_version, trace_id, agent, probability)
    SELECT * FROM json_to_recordset(%s::json) AS wanted (subject text, turns int, scorer text, scorer_version text,
        trace_id text, agent text, probability float8)
    ON CONFLICT DO NOTHING
"""
_ENQUEUE_FAILED = """
    INSERT INTO scorings
        (subject, turns, scorer, scorer_version, trace_id, agent, probability, reason, state, attempts)
    SELECT *, 'failed', 1 FROM json_to_recordset(%s::json) AS failed (subject text, turns int, scorer text,
        scorer_version text, trace_id text, agent text, probability float8, reason text)
    ON CONFLICT DO NOTHING
"""
_END = f"UPDATE scorings SET state = %s, reason = %s, claimed_by = NULL, updated_at = now() WHERE {_MINE}"
_LEFT = "SELECT 1 FROM scorings WHERE trace_id = %s AND turns = 0 AND state = 'pending' LIMIT 1"
