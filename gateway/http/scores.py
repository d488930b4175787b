"""``/v1/traces/{id}/scores`` and ``/v1/sessions/{id}/scores``: what scorers said, are still to say, or why they do not.

A client that waits is answered as soon as there is news.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from litestar import Request, get
from litestar.datastructures import State
from litestar.params import Parameter
from psycopg.rows import dict_row

from gateway.errors import SessionNotFound, TraceNotFound
from gateway.http.access import visible_key
from gateway.storage.database import Pool
from gateway.tracing.ledger import State as RunState
from gateway.tracing.redaction.redactor import Redactor

AppRequest = Request[Any, Any, State]

_LOOK_S = 0.1
_LONGEST_LOOK_S = 0.5
_PATIENCE = 1.2  # by which each look comes later: scores in plain code take a second, a judge may take a minute
_LONGEST_WAIT_S = 30.0  # proxies cut connections on which nothing comes for a minute
_ON_ITS_WAY_S = 0.3  # a trace is in the ledger within some 100 ms of its answer; a client may be faster

Wait = Annotated[float, Parameter(query="wait", ge=0, le=_LONGEST_WAIT_S)]


class ScoreState(msgspec.Struct, omit_defaults=True):
    """What became of one scorer, or what it said."""

    scorer: str
    state: Literal["pending", "scored", "skipped", "failed"]
    name: str | None = None
    """Name of the assessment in MLflow; a scorer may give several. Left out if it gave none."""
    value: Any = None
    """A boolean, a number or a text."""
    passed: bool | None = None
    """Left out: no verdict."""
    rationale: str | None = None
    reason: str | None = None
    """Why it was skipped or has failed, or what failed last while it is tried again: ``share``, ``budget``,
    ``status``, ``tag``, ``tool``, ``latency``, or in words what there is nothing to judge of."""
    turns: int | None = None
    """Of a conversation: how many turns it had."""
    superseded: bool = False
    """A newer score has taken its place: it is history."""
    at: datetime | None = None
    """When it was said."""


class TraceScores(msgspec.Struct):
    """The scores of one trace."""

    trace_id: str
    state: RunState
    """What the ledger says of the run."""
    scores: list[ScoreState]
    """By scorer; none if the trace was not kept."""

    @property
    def is_due(self) -> bool:
        """Whether the run is on its way."""
        return self.state == "pending"


class SessionScores(msgspec.Struct):
    """The scores of a conversation as a whole."""

    session_id: str
    """As it was asked for."""
    due_at: datetime | None
    """When it is to be scored next; ``null``: nothing new was said since it was."""
    scores: list[ScoreState]
    """By scorer, the latest first; none while it was not scored yet."""

    @property
    def is_due(self) -> bool:
        """Whether it is to be scored again."""
        return self.due_at is not None


Found = TypeVar("Found", TraceScores, SessionScores)


@get(
    "/v1/traces/{trace_id:str}/scores",
    opt={"scope": "invoke"},
    summary="Get the scores of a trace",
    description="What each scorer said of one run, which are pending, which were skipped or have failed, and why.",
    tags=["Scores"],
)
async def get_trace_scores(request: AppRequest, trace_id: str, wait: Wait = 0.0) -> TraceScores:
    """Answer with the scores of a run; raise `TraceNotFound`."""
    pool: Pool = request.app.state.pool
    values = {"trace": trace_id, "key": visible_key(request)}
    found = await _with_news(lambda: _trace_scores(pool, values), wait, on_its_way_s=_ON_ITS_WAY_S)
    if found is None:
        raise TraceNotFound("There is no such trace, or it belongs to another API key.")
    return found


@get(
    "/v1/sessions/{session_id:str}/scores",
    opt={"scope": "invoke"},
    summary="Get the scores of a session",
    description="What each scorer said of the conversation as a whole, the earlier scores of it included.",
    tags=["Scores"],
)
async def get_session_scores(request: AppRequest, session_id: str, wait: Wait = 0.0) -> SessionScores:
    """Answer with the scores of a conversation; raise `SessionNotFound`."""
    pool: Pool = request.app.state.pool
    redactor: Redactor = request.app.state.redactor
    values = {"session": redactor.identifier(session_id, "session"), "key": visible_key(request)}
    found = await _with_news(lambda: _session_scores(pool, values, session_id), wait)
    if found is None:
        raise SessionNotFound("There is no such session, or it belongs to another API key.")
    return found


async def _with_news(
    look: Callable[[], Awaitable[Found | None]], wait_s: float, on_its_way_s: float = 0.0
) -> Found | None:
    """Look until a score has arrived since the first look, or none will, or ``wait_s`` is over; return what there is.

    ``None``: it is not there, and was not within ``on_its_way_s`` either.
    """
    began, pause_s = time.monotonic(), _LOOK_S
    first: Found | None = None
    while True:
        found, waited_s = await look(), time.monotonic() - began
        first = first or found
        if found is None or first is None:
            if waited_s >= on_its_way_s:
                return None
        elif waited_s >= wait_s or _is_settled(found) or _said(found) != _said(first):
            return found
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * _PATIENCE, _LONGEST_LOOK_S)


def _said(found: Found) -> list[ScoreState]:
    return [score for score in found.scores if score.state in {"scored", "failed"}]


def _is_settled(found: Found) -> bool:
    return not found.is_due and all(score.state != "pending" for score in found.scores)


async def _trace_scores(pool: Pool, values: dict[str, str | None]) -> TraceScores | None:
    async with pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_RUN, values)
        run = await cursor.fetchone()
        if run is None:
            return None
        await cursor.execute(_OF_TRACE, values)
        scores = [ScoreState(**row) for row in await cursor.fetchall()]
    return TraceScores(str(values["trace"]), run["state"], _with_skips(scores, run["skips"]))


async def _session_scores(pool: Pool, values: dict[str, str | None], session_id: str) -> SessionScores | None:
    async with pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_CONVERSATION, values)
        conversation = await cursor.fetchone()
        if conversation is None:
            return None
        await cursor.execute(_OF_SESSION, values)
        scores = [ScoreState(**row) for row in await cursor.fetchall()]
    return SessionScores(session_id, conversation["due_at"], _with_skips(scores, conversation["skips"] or {}))


def _with_skips(scores: list[ScoreState], skips: dict[str, str]) -> list[ScoreState]:
    said = {score.scorer for score in scores if not score.superseded}
    skipped = [ScoreState(scorer, "skipped", reason=why) for scorer, why in skips.items() if scorer not in said]
    return sorted([*scores, *skipped], key=lambda score: (score.scorer, -(score.turns or 0), score.name or ""))


_MINE = "(%(key)s::text IS NULL OR key_id = %(key)s)"
_RUN = f"SELECT state, skips FROM runs WHERE trace_id = %(trace)s AND state <> 'erased' AND {_MINE}"
_SAID = """
    SELECT scorer, CASE WHEN error IS NULL THEN 'scored' ELSE 'failed' END AS state, name, value, passed, rationale,
           error AS reason, turns, NOT latest AS superseded, created_at AS at
    FROM scores
"""
# What was said has its own rows; these are of what was not, or not yet.
_LEFT = """
    SELECT scorer, state, NULL AS name, NULL::jsonb AS value, NULL::bool AS passed, NULL AS rationale,
           reason, nullif(turns, 0) AS turns, false AS superseded, NULL::timestamptz AS at
    FROM scorings
"""
_OF_TRACE = f"""
    {_SAID} WHERE trace_id = %(trace)s AND session_id IS NULL
    UNION ALL {_LEFT} WHERE trace_id = %(trace)s AND turns = 0 AND state IN ('pending', 'skipped')
"""
_CONVERSATION = f"""
    SELECT conversations.due_at, conversations.skips
    FROM sessions LEFT JOIN conversations USING (session_id) WHERE session_id = %(session)s AND {_MINE}
"""
_OF_SESSION = f"""
    {_SAID} WHERE session_id = %(session)s
    UNION ALL {_LEFT} WHERE subject = %(session)s AND turns > 0 AND state IN ('pending', 'skipped')
"""
