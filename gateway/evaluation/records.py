"""What the evaluator keeps in Postgres: scores, and the runs' states that follow from them."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Literal

import msgspec
import psycopg
import structlog
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from gateway.evaluation.datasets.collecting import collect
from gateway.evaluation.datasets.rules import Rules
from gateway.evaluation.entities import redact_score
from gateway.evaluation.scoring import LiveScorer, Score
from gateway.storage.erasure import BESIDE_NO_ERASURE
from gateway.tracing.ledger import State
from gateway.tracing.redaction.redactor import Redactor

log = structlog.get_logger(__name__)

Connection = psycopg.AsyncConnection[Any]
Skips = Mapping[str, Mapping[str, str]]
"""By subject: by scorer that did not score it, why."""

ALL_FAILED = "every scorer failed"
"""Reason of a run's state ``failed``, where a later verdict may still change it."""

_COLUMN_TYPES = {
    "score_id": "text",
    "trace_id": "text",
    "session_id": "text",
    "agent": "text",
    "scorer": "text",
    "scorer_version": "text",
    "name": "text",
    "value": "jsonb",
    "passed": "bool",
    "rationale": "text",
    "error": "text",
    "source_type": "text",
    "source_id": "text",
    "turns": "int",
    "details": "jsonb",
    "inclusion_probability": "float8",
}
_COLUMNS = ", ".join(_COLUMN_TYPES)
_INSERT = f"""
    INSERT INTO scores ({_COLUMNS})
    SELECT * FROM unnest({", ".join(f"%({name})s::{kind}[]" for name, kind in _COLUMN_TYPES.items())})
    ON CONFLICT (score_id) DO NOTHING RETURNING score_id
"""


async def erased(connection: Connection, trace_ids: Sequence[str]) -> set[str]:
    """Return which of the runs were forgotten; until the transaction's end no other is.

    To be asked at the beginning of every transaction that stores what came from traces.
    """
    await connection.execute(BESIDE_NO_ERASURE)
    cursor = await connection.execute(
        "SELECT trace_id FROM runs WHERE trace_id = ANY(%s) AND state = 'erased'", [list(trace_ids)]
    )
    return {str(row[0]) for row in await cursor.fetchall()}


def redacted(redactor: Redactor, session_id: str, scores: Sequence[Score]) -> list[Score]:
    """Return the scores as they may be stored and shown: scorers are anybody's code, and quote what they please.

    A score on which the redactor fails says nothing but that.

    Args:
        redactor: the deployment's.
        session_id: of the trace or conversation, so that placeholders are those that stand in it.
        scores: as the scorers gave them.
    """
    return [_redacted(redactor, session_id, score) for score in scores]


def _redacted(redactor: Redactor, session_id: str, score: Score) -> Score:
    try:
        return redact_score(score, session_id, redactor.value)
    except Exception as error:  # noqa: BLE001 - fails closed: whatever it was, the text stays in
        log.error("a score was withheld", scorer=score.scorer, trace_id=score.trace_id, error=type(error).__name__)
        withheld = "withheld: the redactor failed on it"
        return replace(score, name=score.scorer, value=None, passed=None, rationale=None, error=withheld, details={})


async def save_scores(
    connection: Connection, redactor: Redactor, said: Sequence[tuple[str, Sequence[Score]]]
) -> list[Score]:
    """Store scores, redacted, that are not stored yet, and return all of them as they are stored.

    A score that an earlier attempt stored wins: MLflow must show what our table says, and a judge asked twice may
    answer differently.

    Args:
        connection: to the database.
        redactor: the deployment's; nothing is stored past it (see `redacted`).
        said: what the scorers said, each with the session that it is about.
    """
    # In a thread: scorers may quote at length, and the event loop serves all judges.
    scores = await asyncio.to_thread(lambda: [fit for session, raw in said for fit in redacted(redactor, session, raw)])
    if not scores:
        return []
    rows = [vars(score) | {"value": _json(score.value), "details": Jsonb(score.details)} for score in scores]
    cursor = await connection.execute(_INSERT, {name: [row[name] for row in rows] for name in _COLUMN_TYPES})
    new = {row[0] for row in await cursor.fetchall()}
    earlier = [score.score_id for score in scores if score.score_id not in new]
    async with connection.cursor(row_factory=class_row(Score)) as typed:
        if earlier:
            await typed.execute(f"SELECT {_COLUMNS} FROM scores WHERE score_id = ANY(%s)", [earlier])
        stored = {score.score_id: score for score in (await typed.fetchall() if earlier else [])}
    return [stored.get(score.score_id, score) for score in scores]


def _json(value: Any) -> Jsonb | None:
    return None if value is None else Jsonb(value)


async def unlogged_scores(connection: Connection, trace_ids: Sequence[str], turns: int | None = None) -> list[Score]:
    """Return the scores that are stored and may not be in MLflow yet, as a crash or an outage leaves them.

    Args:
        connection: to the database.
        trace_ids: the traces that the scores are on.
        turns: turns of the conversation, for a conversation's scores; ``None`` for the traces' own.
    """
    where = "trace_id = ANY(%s) AND turns IS NOT DISTINCT FROM %s AND logged_at IS NULL"
    return await _read(connection, where, [list(trace_ids), turns])


async def unlogged(connection: Connection, score_ids: Sequence[str]) -> list[Score]:
    """Return those of the scores that may not be in MLflow yet, the oldest first."""
    where = "score_id = ANY(%s) AND logged_at IS NULL ORDER BY created_at"
    return await _read(connection, where, [list(score_ids)])


async def stored_scores(
    connection: Connection, trace_id: str, turns: int | None, scorer: str, version: str
) -> list[Score]:
    """Return the verdicts that an earlier attempt of a scorer has stored: nobody is asked for them again.

    Args:
        connection: to the database.
        trace_id: the trace that the scores are on.
        turns: turns of the conversation, for a conversation's scores; ``None`` for a trace's own.
        scorer: its name.
        version: its version.
    """
    where = "trace_id = %s AND turns IS NOT DISTINCT FROM %s AND scorer = %s AND scorer_version = %s AND error IS NULL"
    return await _read(connection, where, [trace_id, turns, scorer, version])


async def earlier_scores(connection: Connection, session_id: str, scorer: str, turns: int) -> list[Score]:
    """Return a scorer's verdicts on a conversation when it had fewer turns, the newest first."""
    where = "session_id = %s AND scorer = %s AND turns < %s AND error IS NULL ORDER BY turns DESC, created_at DESC"
    return await _read(connection, where, [session_id, scorer, turns])


async def _read(connection: Connection, where: str, values: Sequence[Any]) -> list[Score]:
    async with connection.cursor(row_factory=class_row(Score)) as cursor:
        await cursor.execute(f"SELECT {_COLUMNS} FROM scores WHERE {where}", values)
        return await cursor.fetchall()


async def mark_logged(connection: Connection, scores: Sequence[Score]) -> None:
    """Note that MLflow has these scores."""
    await connection.execute(
        "UPDATE scores SET logged_at = now() WHERE score_id = ANY(%s)", [[score.score_id for score in scores]]
    )


async def finish_runs(connection: Connection, trace_ids: Sequence[str]) -> None:
    """Move runs to the states that their scores say: from ``pending``, or from what fewer scores said before."""
    if not trace_ids:
        return
    cursor = await connection.execute(_VERDICTS, [list(trace_ids)])
    said = [
        (trace_id, verdicts, run_state(verdicts, scores - verdicts, left_out_by))
        for trace_id, verdicts, scores, left_out_by in await cursor.fetchall()
    ]
    columns = {
        "traces": [trace_id for trace_id, _, _ in said],
        "verdicts": [verdicts for _, verdicts, _ in said],
        "states": [state for _, _, (state, _) in said],
        "reasons": [reason for _, _, (_, reason) in said],
    }
    await connection.execute(_FINISH, columns)


async def end_run(connection: Connection, trace_id: str, state: State, reason: str) -> None:
    """Move a run from ``pending`` to a state that no score has a say in."""
    await connection.execute(
        "UPDATE runs SET state = %s, reason = %s, updated_at = now() WHERE trace_id = %s AND state = 'pending'",
        [state, reason, trace_id],
    )


def run_state(verdicts: int, failures: int, left_out_by: str | None = None) -> tuple[State, str | None]:
    """Return the final state of a run whose scorers are all done, and the reason for it if it is not ``scored``.

    Args:
        verdicts: scores without an error.
        failures: scorers that failed.
        left_out_by: what kept a scorer from it that would have scored it: ``budget`` or ``pressure``; ``None``: none.
    """
    if verdicts:
        return "scored", None
    if failures:
        return "failed", ALL_FAILED
    return ("budget_skipped", left_out_by) if left_out_by else ("not_selected", None)


async def note_skips(connection: Connection, table: Literal["runs", "conversations"], skips: Skips) -> None:
    """Note why scorers did not score: by trace id for ``runs``, by session id for ``conversations``."""
    rows = [{"subject": subject, "skips": reasons} for subject, reasons in skips.items() if reasons]
    if rows:
        await connection.execute(_NOTE_SKIPS[table], [msgspec.json.encode(rows).decode()])


async def collect_failed(
    connection: Connection,
    scores: Sequence[Score],
    scorers: Sequence[LiveScorer],
    trace_id: str,
    rules: Rules = MappingProxyType({}),
) -> None:
    """Note the trace for the datasets that these scores put it into; `datasets` does the rest.

    Args:
        connection: within a transaction that began with `erased`.
        scores: new ones of the trace, or of the conversation that it is the last trace of; as they are stored.
        scorers: with their rules, for the short form ``[scorers.<name>] dataset``: where goes what it fails.
        trace_id: the trace.
        rules: ``[datasets.<name>]`` of the settings.
    """
    await collect(connection, scores, {live.name: live.rule.dataset for live in scorers}, rules, trace_id)


_VERDICTS = """
    SELECT runs.trace_id, count(score_id) FILTER (WHERE error IS NULL), count(score_id),
        CASE WHEN runs.skips @? '$.* ? (@ == "budget")' OR EXISTS (
                  SELECT 1 FROM scorings
                  WHERE scorings.trace_id = runs.trace_id AND turns = 0 AND scorings.state = 'skipped'
                    AND scorings.reason = 'budget') THEN 'budget'
             WHEN runs.skips @? '$.* ? (@ == "pressure")' THEN 'pressure' END
    FROM runs LEFT JOIN scores ON scores.trace_id = runs.trace_id AND scores.session_id IS NULL AND scores.latest
    WHERE runs.trace_id = ANY(%s)
    GROUP BY runs.trace_id
"""
_NOTE_SKIPS = {
    table: f"""
        UPDATE {table} SET skips = given.skips
        FROM json_to_recordset(%s::json) AS given (subject text, skips jsonb) WHERE {key} = given.subject
    """
    for table, key in (("runs", "trace_id"), ("conversations", "session_id"))
}
_FINISH = f"""
    UPDATE runs SET state = said.state, reason = said.reason, scored_by = said.verdicts, updated_at = now()
    FROM unnest(%(traces)s::text[], %(states)s::text[], %(reasons)s::text[], %(verdicts)s::int[])
        AS said (trace_id, state, reason, verdicts)
    WHERE runs.trace_id = said.trace_id
      AND (runs.state IN ('pending', 'scored', 'not_selected', 'budget_skipped')
           OR (runs.state = 'failed' AND runs.reason = '{ALL_FAILED}'))
"""
