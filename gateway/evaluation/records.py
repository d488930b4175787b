"""What the evaluator keeps in Postgres: scores, and the runs' states that follow from them."""

from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from gateway.evaluation.scoring import LiveScorer, Score
from gateway.storage.erasure import BESIDE_NO_ERASURE
from gateway.tracing.ledger import State

Connection = psycopg.AsyncConnection[Any]

_COLUMNS = (
    "score_id, trace_id, session_id, agent, scorer, scorer_version, name, value, passed, rationale, error, "
    "source_type, source_id, turns, details"
)
_INSERT = f"INSERT INTO scores ({_COLUMNS}) VALUES ({', '.join(['%s'] * 15)}) ON CONFLICT (score_id) DO NOTHING"


async def erased(connection: Connection, trace_ids: Sequence[str]) -> set[str]:
    """Return which of the runs were forgotten; until the transaction's end no other is.

    To be asked at the beginning of every transaction that stores what came from traces.
    """
    await connection.execute(BESIDE_NO_ERASURE)
    cursor = await connection.execute(
        "SELECT trace_id FROM runs WHERE trace_id = ANY(%s) AND state = 'erased'", [list(trace_ids)]
    )
    return {str(row[0]) for row in await cursor.fetchall()}


async def save_scores(connection: Connection, scores: Sequence[Score]) -> list[Score]:
    """Store scores that are not stored yet, and return all of them as they are stored.

    A score that an earlier attempt stored wins: MLflow must show what our table says, and a judge asked twice may
    answer differently.
    """
    if not scores:
        return []
    rows = [(*_before_details(score), Jsonb(score.details)) for score in scores]
    async with connection.cursor() as cursor:
        await cursor.executemany(_INSERT, rows)
    async with connection.cursor(row_factory=class_row(Score)) as typed:
        await typed.execute(
            f"SELECT {_COLUMNS} FROM scores WHERE score_id = ANY(%s) ORDER BY name", [[s.score_id for s in scores]]
        )
        return await typed.fetchall()


async def unlogged_scores(connection: Connection, trace_id: str, turns: int | None = None) -> list[Score]:
    """Return the scores that are stored and may not be in MLflow yet, as a crash or an outage leaves them.

    Args:
        connection: to the database.
        trace_id: the trace that the scores are on.
        turns: turns of the conversation, for a conversation's scores; ``None`` for a trace's own.
    """
    async with connection.cursor(row_factory=class_row(Score)) as cursor:
        await cursor.execute(
            f"SELECT {_COLUMNS} FROM scores "
            "WHERE trace_id = %s AND turns IS NOT DISTINCT FROM %s AND logged_at IS NULL",
            [trace_id, turns],
        )
        return await cursor.fetchall()


def _before_details(score: Score) -> tuple[Any, ...]:
    value = None if score.value is None else Jsonb(score.value)
    identity = (score.score_id, score.trace_id, score.session_id, score.agent, score.scorer, score.scorer_version)
    verdict = (score.name, value, score.passed, score.rationale, score.error)
    return (*identity, *verdict, score.source_type, score.source_id, score.turns)


async def mark_logged(connection: Connection, scores: Sequence[Score]) -> None:
    """Note that MLflow has these scores."""
    await connection.execute(
        "UPDATE scores SET logged_at = now() WHERE score_id = ANY(%s)", [[score.score_id for score in scores]]
    )


async def finish_run(connection: Connection, trace_id: str) -> None:
    """Move a run from ``pending`` to the state that its scores say."""
    cursor = await connection.execute(
        "SELECT count(*) FILTER (WHERE error IS NULL), count(*) FROM scores WHERE trace_id = %s AND session_id IS NULL",
        [trace_id],
    )
    verdicts, scores = await cursor.fetchone() or (0, 0)
    state, reason = run_state(verdicts, scores - verdicts)
    await connection.execute(
        "UPDATE runs SET state = %s, reason = %s, scored_by = %s, updated_at = now() "
        "WHERE trace_id = %s AND state = 'pending'",
        [state, reason, verdicts, trace_id],
    )


def run_state(verdicts: int, failures: int) -> tuple[State, str | None]:
    """Return the final state of a run whose scorers are all done, and the reason for ``failed``.

    Args:
        verdicts: scores without an error.
        failures: scorers that failed.
    """
    if verdicts:
        return "scored", None
    return ("failed", "every scorer failed") if failures else ("not_selected", None)


async def collect_failed(
    connection: Connection, scores: Sequence[Score], scorers: Sequence[LiveScorer], trace_id: str
) -> None:
    """Note the trace for the datasets that collect what these scorers fail; `datasets` does the rest."""
    targets = {live.name: live.rule.dataset for live in scorers}
    failed: dict[str, dict[str, Any]] = {}
    for score in scores:
        dataset = targets.get(score.scorer)
        if score.passed is False and dataset is not None:
            failed.setdefault(dataset, {})[score.name] = score.value
    for dataset, values in failed.items():
        await connection.execute(_COLLECT, [dataset, trace_id, Jsonb(values)])


_COLLECT = """
    INSERT INTO dataset_rows AS known (dataset, trace_id, scorers) VALUES (%s, %s, %s)
    ON CONFLICT (dataset, trace_id) DO UPDATE SET
        scorers = known.scorers || excluded.scorers,
        merged_at = CASE WHEN known.scorers @> excluded.scorers THEN known.merged_at END
"""
