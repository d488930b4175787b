"""The figures: how good the answers were, and what share of the traffic these figures speak for.

They are read from the tables each time they are asked for, so that they are never older than the last score.
"""

from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import msgspec
import psycopg
from litestar import Request, get
from litestar.datastructures import State as AppState
from psycopg.rows import DictRow, dict_row

from gateway.quality.estimates import Estimate, Sums, estimate_mean, estimate_share
from gateway.quality.links import MlflowLinks, conversation_url, trace_url
from gateway.quality.reading import reading
from gateway.storage.database import Pool
from gateway.tracing.balance import Check, read_check
from gateway.tracing.ledger import Ledger, Waiting, read_ledger, read_waiting

HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
NEWEST_FAILURES = 20  # as many as a person looks through

Level = Literal["trace", "conversation"]
"""What a score judges: one run, or all turns of a session."""


class AgentRuns(msgspec.Struct):
    """Runs of one agent, and by what kind of model they were answered."""

    agent: str
    runs: int
    """Runs in the ledger; those dropped before they had a row are not among them."""
    offline_runs: int
    """Runs that an offline model answered: a stand-in, not a language model."""
    offline_share: float
    """``offline_runs`` of ``runs``, 0 to 1."""


class ScorerRollup(msgspec.Struct):
    """What one scorer said of one agent. A subject that was scored again counts once, with its latest score.

    Counts are plain: what was scored, each for one. Estimates are of all of the traffic (`gateway.quality.estimates`).
    """

    agent: str
    scorer: str
    """Name of the scorer."""
    name: str
    """Name of the assessment; most scorers give one, of their own name."""
    level: Level
    scored: int = 0
    """Scores given: ``passed`` + ``failed`` + ``no_verdict``."""
    passed: int = 0
    failed: int = 0
    no_verdict: int = 0
    """Scores that are neither a pass nor a failure, such as a plain number."""
    scorer_failures: int = 0
    """Times that the scorer itself failed; they are in none of the counts above."""
    not_scored: dict[str, int] = msgspec.field(default_factory=dict)
    """Runs, or conversations, that the scorer passed over, by why, most first: it did not apply, say, or the budget
    was used up. They are in none of the counts above. With the assessment that has the scorer's own name."""
    pass_share: Estimate | None = None
    """Share that would pass, 0 to 1; ``None`` if there was no verdict."""
    mean: Estimate | None = None
    """Mean of the numeric values; ``None`` if no value is a number."""


class Window(msgspec.Struct):
    """The figures of one stretch of time, up to now."""

    since: datetime
    ledger: Ledger
    """Runs that started since."""
    agents: list[AgentRuns]
    """Agents that had runs since, by name."""
    scorers: list[ScorerRollup]
    """Scores given since, by agent, level (traces first), scorer and name."""


class FailedScore(msgspec.Struct):
    """A score that did not pass."""

    name: str
    value: Any
    """What the scorer gave: a boolean, a number, a text."""
    rationale: str | None
    """The scorer's reason; ``None`` if it gave none."""


class Failure(msgspec.Struct):
    """A trace, or a conversation, that at least one scorer failed."""

    trace_id: str
    """For a conversation: its first trace."""
    level: Level
    agent: str
    session_id: str | None
    """``None``: the trace is no longer in the ledger."""
    offline: bool
    """Whether an offline model answered."""
    failed_at: datetime
    """When the newest of the failed scores was given."""
    scores: list[FailedScore]
    """All failed scores, by name."""
    mlflow_url: str | None = None
    """Where MLflow's UI shows it; ``None`` if that is not known."""


class QualityReport(msgspec.Struct):
    """Everything that the page shows."""

    generated_at: datetime
    hour: Window
    day: Window
    waiting: Waiting
    check: Check
    failures: list[Failure]
    """The newest of the last day, newest first, 20 at the most."""
    mlflow_url: str | None
    """The experiment in MLflow's UI; ``None`` if it is not known."""


def _sums(of: Literal["share", "mean"]) -> str:
    """Return the columns of `Sums` over sessions, but for the count of scores."""
    weight, total = f"{of}_weight", f"{of}_total"
    columns = {
        "sessions": f"count({weight})",
        "weight": f"sum({weight})",
        "total": f"sum({total})",
        "weight_squares": f"sum({weight} * {weight})",
        "products": f"sum({weight} * {total})",
        "total_squares": f"sum({total} * {total})",
    }
    return ", ".join(f"{column} AS {of}_{name}" for name, column in columns.items())


_AGENTS = """
    SELECT agent, count(*) AS runs, count(*) FILTER (WHERE offline) AS offline_runs,
           avg(offline::int)::float8 AS offline_share
    FROM runs WHERE started_at >= %(since)s GROUP BY agent ORDER BY agent
"""

# A score's weight is one over the probability with which it exists: that its trace was kept, which a later turn may
# still change and the ledger knows, times that it was made then. A number that is too large to be squared is none, as
# it must not break the page. A trace that the ledger does not know is a session of its own.
_SCORES = """
    SELECT scores.agent, scores.scorer, scores.name, scores.session_id IS NULL AS is_trace, passed,
           error IS NULL AS given,
           1 / greatest(scores.inclusion_probability * coalesce(runs.inclusion_probability, 1), 1e-6) AS weight,
           CASE jsonb_typeof(value) WHEN 'number' THEN
               CASE WHEN abs(value::numeric) < 1e100 THEN value::float8 END END AS number,
           hashtextextended(coalesce(scores.session_id, runs.session_id, scores.trace_id), 0) AS session
    FROM scores LEFT JOIN runs USING (trace_id) WHERE latest AND scores.created_at >= %(since)s
"""
# An estimate takes sums over sessions. These come first, as hashes: of a million scores that halves the time.
_BY_SESSION = f"""
    SELECT agent, is_trace, scorer, name, session,
           count(*) FILTER (WHERE given) AS scored,
           count(*) FILTER (WHERE given AND passed) AS passed,
           count(*) FILTER (WHERE given AND NOT passed) AS failed,
           count(*) FILTER (WHERE NOT given) AS scorer_failures,
           count(number) FILTER (WHERE given) AS numbers,
           min(number) FILTER (WHERE given) AS lowest, max(number) FILTER (WHERE given) AS highest,
           sum(weight) FILTER (WHERE given AND passed IS NOT NULL) AS share_weight,
           sum(weight * passed::int) FILTER (WHERE given) AS share_total,
           sum(weight) FILTER (WHERE given AND number IS NOT NULL) AS mean_weight,
           sum(weight * number) FILTER (WHERE given) AS mean_total
    FROM ({_SCORES}) AS score GROUP BY session, agent, is_trace, scorer, name
"""
_SCORERS = f"""
    SELECT agent, CASE WHEN is_trace THEN 'trace' ELSE 'conversation' END AS level, scorer, name,
           sum(scored)::bigint AS scored, sum(passed)::bigint AS passed, sum(failed)::bigint AS failed,
           sum(scorer_failures)::bigint AS scorer_failures, sum(numbers)::bigint AS numbers,
           min(lowest) AS lowest, max(highest) AS highest,
           {_sums("share")}, {_sums("mean")}
    FROM ({_BY_SESSION}) AS by_session GROUP BY agent, is_trace, scorer, name
"""
_NOT_SCORED = """
    SELECT agent, 'trace' AS level, scorer, why, count(*) AS subjects
    FROM runs, jsonb_each_text(skips) AS skip (scorer, why)
    WHERE started_at >= %(since)s AND skips <> '{}' GROUP BY agent, scorer, why
    UNION ALL
    SELECT agent, 'conversation', scorer, why, count(*)
    FROM conversations, jsonb_each_text(skips) AS skip (scorer, why)
    WHERE last_turn_at >= %(since)s AND skips <> '{}' GROUP BY agent, scorer, why
    UNION ALL
    SELECT agent, CASE WHEN turns = 0 THEN 'trace' ELSE 'conversation' END, scorer, coalesce(reason, ''), count(*)
    FROM scorings WHERE state = 'skipped' AND updated_at >= %(since)s GROUP BY agent, turns = 0, scorer, reason
    ORDER BY subjects DESC, why
"""

# Which subjects are the newest comes first, so that long rationales are read for those alone.
_FAILURES = """
    WITH newest AS (
        SELECT trace_id, session_id, max(created_at) AS failed_at
        FROM scores WHERE latest AND NOT passed AND error IS NULL AND created_at >= %(since)s
        GROUP BY trace_id, session_id ORDER BY failed_at DESC, trace_id LIMIT %(limit)s
    )
    SELECT newest.trace_id, newest.failed_at, min(scores.agent) AS agent,
           CASE WHEN newest.session_id IS NULL THEN 'trace' ELSE 'conversation' END AS level,
           coalesce(newest.session_id, min(runs.session_id)) AS session_id,
           coalesce(bool_or(runs.offline), false) AS offline,
           jsonb_agg(
               jsonb_build_object('name', name, 'value', value, 'rationale', rationale) ORDER BY name
           ) AS scores
    FROM newest
    JOIN scores ON scores.trace_id = newest.trace_id AND scores.session_id IS NOT DISTINCT FROM newest.session_id
         AND latest AND NOT passed AND error IS NULL
    LEFT JOIN runs ON runs.trace_id = newest.trace_id
    GROUP BY newest.trace_id, newest.session_id, newest.failed_at
    ORDER BY newest.failed_at DESC, newest.trace_id
"""


async def read_quality(pool: Pool, links: MlflowLinks, now: datetime) -> QualityReport:
    """Return the figures of the hour and the day before ``now``.

    Raises:
        ServiceUnavailable: the database is away, or takes too long.
    """
    # One connection, one statement after the other: the others are for the runs.
    async with reading(pool) as connection, connection.cursor(row_factory=dict_row) as cursor:
        hour = await _read_window(cursor, now - HOUR)
        day = await _read_window(cursor, now - DAY)
        await cursor.execute(_FAILURES, {"since": now - DAY, "limit": NEWEST_FAILURES})
        failures = msgspec.convert(await cursor.fetchall(), list[Failure])
        waiting, checked = await read_waiting(cursor), await read_check(connection)
    experiment_url = await links.experiment_url()
    for failure in failures:
        failure.mlflow_url = _failure_url(failure, experiment_url)
    return QualityReport(now, hour, day, waiting, checked, failures, experiment_url)


async def _read_window(cursor: psycopg.AsyncCursor[DictRow], since: datetime) -> Window:
    parameters = {"since": since}
    ledger, _ = await read_ledger(cursor, since)
    await cursor.execute(_AGENTS, parameters)
    agents = [AgentRuns(**row) for row in await cursor.fetchall()]
    return Window(since, ledger, agents, await _read_scorers(cursor, since))


async def _read_scorers(cursor: psycopg.AsyncCursor[DictRow], since: datetime) -> list[ScorerRollup]:
    await cursor.execute(_SCORERS, {"since": since})
    rollups = [_rollup(row) for row in await cursor.fetchall()]
    known = {(each.agent, each.level, each.scorer, each.name): each for each in rollups}
    await cursor.execute(_NOT_SCORED, {"since": since})
    for row in await cursor.fetchall():
        agent, level, scorer = row["agent"], row["level"], row["scorer"]
        rollup = known.setdefault((agent, level, scorer, scorer), ScorerRollup(agent, scorer, scorer, level))
        rollup.not_scored[row["why"]] = rollup.not_scored.get(row["why"], 0) + row["subjects"]
    return sorted(known.values(), key=lambda each: (each.agent, each.level != "trace", each.scorer, each.name))


def _rollup(row: DictRow) -> ScorerRollup:
    verdicts = row["passed"] + row["failed"]
    return ScorerRollup(
        **{name: row[name] for name in ("agent", "scorer", "name", "level", "scored", "passed", "failed")},
        no_verdict=row["scored"] - verdicts,
        scorer_failures=row["scorer_failures"],
        pass_share=estimate_share(_sums_of(row, "share", verdicts)) if verdicts else None,
        mean=_mean(row) if row["numbers"] else None,
    )


def _mean(row: DictRow) -> Estimate:
    return estimate_mean(_sums_of(row, "mean", row["numbers"]), row["lowest"], row["highest"])


def _sums_of(row: DictRow, of: Literal["share", "mean"], count: int) -> Sums:
    return Sums(count, *(row[f"{of}_{name}"] for name in Sums._fields[1:]))


def _failure_url(failure: Failure, experiment_url: str | None) -> str | None:
    if experiment_url is None:
        return None
    if failure.level == "conversation" and failure.session_id is not None:
        return conversation_url(experiment_url, failure.session_id)
    return trace_url(experiment_url, failure.trace_id)


async def report_of(request: Request[Any, Any, AppState]) -> QualityReport:
    """Return the figures as of now, from the parts that the app holds; raise `ServiceUnavailable`."""
    state = request.app.state
    return await read_quality(state.pool, state.mlflow_links, datetime.now(UTC))


@get(
    "/v1/quality",
    opt={"scope": "ops"},
    tags=["Operations"],
    summary="How good the answers are",
    description=(
        "The last hour and the last day: pass shares and means of all of the traffic, estimated with their intervals "
        "by agent and scorer, the ledger, failures."
    ),
)
async def quality(request: Request[Any, Any, AppState]) -> QualityReport:
    """Answer with the figures of the last hour and the last day."""
    return await report_of(request)
