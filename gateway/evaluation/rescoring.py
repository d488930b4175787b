"""Back-fills: what a scorer has not scored of what was served before, what that would cost, and having it done.

The subjects go through the table ``scorings`` like all others, behind what is live. They are drawn with the scorer's
own salt, as live ones are: a share that is higher than it was then takes the ones in between, and every score in the
window exists with the higher probability from then on.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from psycopg.rows import class_row

from gateway.evaluation.records import ALL_FAILED, Connection
from gateway.evaluation.scoring import LiveScorer
from gateway.storage.schema import KEPT
from gateway.tracing.sampling import draw

_AT_ONCE = 5_000
_LAST = 200  # scorings whose cost is averaged


class Window(NamedTuple):
    """Which of what was served is meant."""

    since: datetime
    until: datetime | None
    """``None``: up to now."""
    agents: Sequence[str] | None
    """``None``: all."""


class Subject(NamedTuple):
    """A trace or a conversation that the scorer has not scored."""

    subject: str
    """Trace id or session id."""
    turns: int
    """Of the conversation; 0: a trace."""
    trace_id: str
    """The trace that the scores will be on."""
    agent: str


class Cost(NamedTuple):
    """What one scoring took on average."""

    scorings: int
    """So many were averaged."""
    tokens: float
    usd: float | None
    """``None``: the price of the model is not known."""


async def unscored(
    connection: Connection, live: LiveScorer, window: Window, share: float, key: bytes
) -> tuple[list[Subject], int]:
    """Return the subjects to be scored, and how many there are without the draw.

    Left out are those that this version of the scorer has scored, those that it is about to score, and conversations
    that are not over.

    Args:
        connection: to the database.
        live: the scorer; its filter is applied when a subject is read.
        window: which ones.
        share: of the subjects, 0 to 1.
        key: 32 bytes, by which shares are drawn.
    """
    query = _CONVERSATIONS if live.scores_conversations else _TRACES
    async with connection.cursor(row_factory=class_row(Subject)) as cursor:
        await cursor.execute(query, _values(live, window))
        found = await cursor.fetchall()
    return [each for each in found if draw(key, "scorer", live.name, each.subject) < share], len(found)


async def cost_of_one(connection: Connection, live: LiveScorer) -> Cost | None:
    """Return what one scoring of a judge took on average lately, in any version that asked the same model.

    ``None``: it was not asked yet.
    """
    async with connection.cursor(row_factory=class_row(Cost)) as cursor:
        await cursor.execute(_COST, {"scorer": live.name, "model": live.model, "last": _LAST})
        cost = await cursor.fetchone()
    return cost if cost is not None and cost.scorings else None


async def enqueue_back_fill(
    connection: Connection, live: LiveScorer, window: Window, share: float, subjects: Sequence[Subject]
) -> None:
    """Have the subjects scored; what failed for good or was skipped before gets all its attempts again."""
    values = _values(live, window) | {"share": share}
    subjects_in_window = _OVER if live.scores_conversations else _SERVED
    for raising in (_RAISE_SCORES, _RAISE_PENDING):
        await connection.execute(f"{raising} ({subjects_in_window})", values)
    for begin in range(0, len(subjects), _AT_ONCE):
        given = msgspec.json.encode([each._asdict() for each in subjects[begin : begin + _AT_ONCE]]).decode()
        await connection.execute(_ENQUEUE, values | {"rows": given})


async def left(connection: Connection, live: LiveScorer) -> int:
    """Return how many back-fills of the scorer are still to be done."""
    cursor = await connection.execute(_LEFT, {"scorer": live.name, "version": live.version})
    row = await cursor.fetchone()
    return int(row[0]) if row else 0


def _values(live: LiveScorer, window: Window) -> dict[str, Any]:
    agents = live.rule.agents
    if window.agents is not None:
        agents = [agent for agent in window.agents if agents is None or agent in agents]
    return {
        "scorer": live.name,
        "version": live.version,
        "since": window.since,
        "until": window.until,
        "agents": agents,
    }


_SERVED = """
    SELECT trace_id FROM runs
    WHERE started_at >= %(since)s AND (%(until)s::timestamptz IS NULL OR started_at < %(until)s)
      AND (%(agents)s::text[] IS NULL OR agent = ANY(%(agents)s))
"""
_OVER = """
    SELECT session_id FROM conversations
    WHERE last_turn_at >= %(since)s AND (%(until)s::timestamptz IS NULL OR last_turn_at < %(until)s)
      AND (%(agents)s::text[] IS NULL OR agent = ANY(%(agents)s)) AND due_at IS NULL
"""
_NOT_YET = """
    SELECT subject, turns, trace_id, agent FROM this
    WHERE NOT EXISTS (
            SELECT 1 FROM scores
            WHERE scores.trace_id = this.trace_id AND coalesce(scores.turns, 0) = this.turns
              AND scorer = %(scorer)s AND scorer_version = %(version)s AND error IS NULL)
      AND NOT EXISTS (
            SELECT 1 FROM scorings AS known
            WHERE known.subject = this.subject AND known.turns = this.turns AND known.scorer = %(scorer)s
              AND known.scorer_version = %(version)s AND known.state = 'pending')
    ORDER BY served_at DESC
"""
_TRACES = f"""
    WITH this AS (
        SELECT trace_id AS subject, 0 AS turns, trace_id, agent, started_at AS served_at FROM runs
        WHERE trace_id IN ({_SERVED}) AND (state IN ('scored', 'not_selected', 'budget_skipped')
                                           OR (state = 'failed' AND reason = '{ALL_FAILED}')))
    {_NOT_YET}
"""
_CONVERSATIONS = f"""
    WITH this AS (
        SELECT session_id AS subject, count(*)::int AS turns,
            (array_agg(runs.trace_id ORDER BY runs.started_at))[1] AS trace_id, conversations.agent,
            last_turn_at AS served_at
        FROM conversations JOIN runs USING (session_id) WHERE session_id IN ({_OVER}) AND {KEPT}
        GROUP BY session_id, conversations.agent, last_turn_at)
    {_NOT_YET}
"""
_RAISE_SCORES = """
    UPDATE scores SET inclusion_probability = %(share)s
    WHERE scorer = %(scorer)s AND scorer_version = %(version)s AND inclusion_probability < %(share)s
      AND coalesce(session_id, trace_id) IN
"""
_RAISE_PENDING = """
    UPDATE scorings SET probability = %(share)s
    WHERE scorer = %(scorer)s AND scorer_version = %(version)s AND probability < %(share)s AND state = 'pending'
      AND subject IN
"""
_COST = """
    SELECT count(*)::int AS scorings, coalesce(avg(tokens), 0)::float8 AS tokens,
        CASE WHEN count(usd) = count(*) THEN avg(usd) END AS usd
    FROM (
        SELECT DISTINCT ON (created_at, trace_id, turns)
            (details->>'mlflow.assessment.judgeInputTokens')::float8
                + (details->>'mlflow.assessment.judgeOutputTokens')::float8 AS tokens,
            (details->>'mlflow.assessment.judgeCost')::float8 AS usd
        FROM scores
        WHERE scorer = %(scorer)s AND source_id = %(model)s AND details ? 'mlflow.assessment.judgeInputTokens'
        ORDER BY created_at DESC, trace_id, turns LIMIT %(last)s) AS lately
"""
_ENQUEUE = """
    INSERT INTO scorings AS known
        (subject, turns, trace_id, agent, scorer, scorer_version, probability, back_fill)
    SELECT subject, turns, trace_id, agent, %(scorer)s, %(version)s, %(share)s, true
    FROM json_to_recordset(%(rows)s::json) AS wanted (subject text, turns int, trace_id text, agent text)
    ON CONFLICT (subject, turns, scorer, scorer_version) DO UPDATE SET
        state = 'pending', reason = NULL, attempts = 0, due_at = now(), updated_at = now(), back_fill = true,
        probability = excluded.probability, trace_id = excluded.trace_id
    WHERE known.state <> 'pending'
"""
_LEFT = """
    SELECT count(*) FROM scorings
    WHERE state = 'pending' AND back_fill AND scorer = %(scorer)s AND scorer_version = %(version)s
"""
