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
    """What one scorer said of one agent. A subject that was scored again counts once, with its latest score."""

    agent: str
    scorer: str
    """Name of the scorer."""
    name: str
    """Name of the assessment; most scorers give one, of their own name."""
    level: Level
    scored: int
    """Scores given: ``passed`` + ``failed`` + ``no_verdict``."""
    passed: int
    failed: int
    no_verdict: int
    """Scores that are neither a pass nor a failure: a plain number, or the scorer had nothing to judge."""
    pass_share: float | None
    """``passed`` of those with a verdict, 0 to 1; ``None`` if none had one."""
    mean: float | None
    """Mean of the numeric values; ``None`` if no value is a number."""
    scorer_failures: int
    """Times that the scorer itself failed; they are in none of the counts above."""


class Window(msgspec.Struct):
    """The figures of one stretch of time, up to now."""

    since: datetime
    ledger: Ledger
    """Runs that started since."""
    agents: list[AgentRuns]
    """Agents that had runs since, by name."""
    scorers: list[ScorerRollup]
    """Scores given since, by agent, level, scorer and name."""


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


_AGENTS = """
    SELECT agent, count(*) AS runs, count(*) FILTER (WHERE offline) AS offline_runs,
           avg(offline::int)::float8 AS offline_share
    FROM runs WHERE started_at >= %(since)s GROUP BY agent ORDER BY agent
"""

# The mean is taken as `numeric`: an integer too large for a float must not break the page.
_SCORERS = """
    SELECT agent, scorer, name,
           CASE WHEN session_id IS NULL THEN 'trace' ELSE 'conversation' END AS level,
           count(*) FILTER (WHERE error IS NULL) AS scored,
           count(*) FILTER (WHERE error IS NULL AND passed) AS passed,
           count(*) FILTER (WHERE error IS NULL AND NOT passed) AS failed,
           count(*) FILTER (WHERE error IS NULL AND passed IS NULL) AS no_verdict,
           avg(passed::int) FILTER (WHERE error IS NULL)::float8 AS pass_share,
           avg(CASE jsonb_typeof(value) WHEN 'number' THEN value::numeric END) AS mean,
           count(error) AS scorer_failures
    FROM scores WHERE latest AND created_at >= %(since)s
    GROUP BY agent, scorer, name, session_id IS NULL
    ORDER BY agent, session_id IS NULL DESC, scorer, name
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
    await cursor.execute(_SCORERS, parameters)
    scorers = [ScorerRollup(**row) for row in await cursor.fetchall()]
    for rollup in scorers:
        rollup.mean = None if rollup.mean is None else float(rollup.mean)
    return Window(since, ledger, agents, scorers)


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
    description="The last hour and the last day: pass shares and means by agent and scorer, the ledger, failures.",
)
async def quality(request: Request[Any, Any, AppState]) -> QualityReport:
    """Answer with the figures of the last hour and the last day."""
    return await report_of(request)
