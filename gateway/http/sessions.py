"""``/v1/sessions`` and ``/v1/users``: what is known of a conversation, its end, and its being forgotten."""

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack, suppress
from datetime import datetime
from typing import Any, Literal
from urllib.parse import unquote

import msgspec
from litestar import Request, delete, get, post
from litestar.datastructures import State
from procrastinate import App
from psycopg.rows import dict_row

from gateway.errors import SessionBusy, SessionNotFound
from gateway.http.access import visible_key
from gateway.runs.sessions import SessionStore, StoredTurn
from gateway.storage.database import Pool
from gateway.storage.erasure import Erasure, Subject, find_erasure, forget, last_erasure, sessions_of
from gateway.storage.queue import ERASE, SCORE_CONVERSATION, enqueue_once
from gateway.tracing.ledger import State as RunState
from gateway.tracing.redaction.redactor import Redactor

AppRequest = Request[Any, Any, State]

_HOLD_S = 30.0  # for a run under way to end; it is told at once
_WAIT_S = 10.0  # for MLflow's part: well below what proxies wait for an answer
_LOOK_S = 0.15
_NOT_FOUND = "There is no such session, or it belongs to another API key."
_DONE = "Forgotten: nothing of it is left here or in MLflow. The ledger counts its runs as erased."
_PENDING = (
    "Forgotten here. MLflow's copies go as soon as an evaluator runs and MLflow can be reached; send the same request "
    "again to see whether they are gone."
)


class GivenScore(msgspec.Struct, omit_defaults=True):
    """What a scorer said."""

    name: str
    """Name of the assessment in MLflow; a scorer may give several."""
    value: Any
    """A boolean, a number or a text; ``None`` if the scorer failed."""
    passed: bool | None
    """``None``: no verdict."""
    rationale: str | None
    scorer: str
    error: str | None = None
    """Why the scorer failed; left out if it did not."""


class SessionTurn(msgspec.Struct):
    """One turn of a conversation."""

    turn: int
    """The first is 1."""
    trace_id: str | None
    """Trace of its run in MLflow; ``None`` if an earlier version stored the turn."""
    created_at: datetime
    items: list[Any]
    """Responses items: what the client sent, then what the run produced."""
    state: RunState | None
    """What became of the trace, as the ledger says; ``None`` while it is on its way there."""
    scores: list[GivenScore]
    """Those of this turn, by name; empty until it is scored."""


class Session(msgspec.Struct):
    """A conversation."""

    id: str
    """As it was asked for."""
    object: Literal["session"]
    created_at: datetime
    ended_at: datetime | None
    """When its client ended it; ``None``: it did not, or the conversation went on since."""
    turns: list[SessionTurn]
    """Oldest first."""
    scores: list[GivenScore]
    """The latest ones of the conversation as a whole, by name; empty until it is scored."""


class EndedSession(msgspec.Struct):
    """A conversation that its client has ended."""

    id: str
    """As it was asked for."""
    ended_at: datetime
    status: Literal["scoring", "nothing_to_score"]
    """``nothing_to_score``: it is scored already, or it was not sampled."""


class Removed(msgspec.Struct):
    """How much was removed."""

    sessions: int
    """Those that were forked from the session are among them: they begin with its turns."""
    turns: int
    responses: int
    """Stored responses."""
    waiting_traces: int
    """Traces that were on their way to MLflow."""
    scores: int
    mlflow_traces: int
    """Traces in MLflow, with their spans and assessments."""
    dataset_rows: int
    """Rows of MLflow's datasets that came from these traces alone. A row that others gave too stays, as theirs."""


class Forgotten(msgspec.Struct):
    """What was forgotten."""

    erasure_id: str
    status: Literal["done", "pending"]
    """``pending``: MLflow still has copies; an evaluator removes them as soon as it can."""
    removed: Removed
    """So far."""
    message: str


@get(
    "/v1/sessions/{session_id:str}",
    opt={"scope": "invoke"},
    summary="Get a session",
    description="Its turns, what became of their traces, and the latest scores.",
    tags=["Sessions"],
)
async def get_session(request: AppRequest, session_id: str) -> Session:
    """Answer with a conversation as it stands; raise `SessionNotFound`."""
    sessions: SessionStore = request.app.state.sessions
    pool: Pool = request.app.state.pool
    subject = _session(request, session_id)
    async with pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_SESSION, subject._asdict())
        session = await cursor.fetchone()
    if session is None:
        raise SessionNotFound(_NOT_FOUND)
    turns = await sessions.turns(str(subject.session_id))
    about = {"session": subject.session_id, "traces": [turn.trace_id for turn in turns]}
    async with pool.connection() as connection, connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(_STATES, about)
        states = {row["trace_id"]: row["state"] for row in await cursor.fetchall()}
        await cursor.execute(_SCORES, about)
        scores = defaultdict(list)
        for row in await cursor.fetchall():
            scores[row.pop("place")].append(GivenScore(**row))
    shown = [_turn(turn, states, scores) for turn in turns]
    return Session(session_id, "session", **session, turns=shown, scores=scores[""])


def _turn(turn: StoredTurn, states: dict[str, RunState], scores: dict[str, list[GivenScore]]) -> SessionTurn:
    trace_id = turn.trace_id or ""
    return SessionTurn(
        turn.number, turn.trace_id, turn.created_at, turn.items, states.get(trace_id), scores.get(trace_id, [])
    )


@post(
    "/v1/sessions/{session_id:str}/end",
    status_code=200,
    opt={"scope": "invoke"},
    summary="End a session",
    description=(
        "Says that the conversation is over, so that it is scored at once and not after the quiet period. The scores "
        "are there some moments later. A later turn takes it back."
    ),
    tags=["Sessions"],
)
async def end_session(request: AppRequest, session_id: str) -> EndedSession:
    """Note that the conversation is over, and have it scored; raise `SessionNotFound`."""
    pool: Pool = request.app.state.pool
    queue: App = request.app.state.queue
    subject = _session(request, session_id)
    async with pool.connection() as connection:
        ended = await (await connection.execute(_END, subject._asdict())).fetchone()
        if ended is None:
            raise SessionNotFound(_NOT_FOUND)
        # After that, so that a turn which gets there in between finds the session ended.
        due = (await connection.execute(_DUE_NOW, subject._asdict())).rowcount
        on_the_way = await (await connection.execute(_ON_THE_WAY, subject._asdict())).fetchone()
    if due:
        stored_id = str(subject.session_id)
        await enqueue_once(queue, SCORE_CONVERSATION, stored_id, session_id=stored_id)
    status = "scoring" if due or on_the_way == (True,) else "nothing_to_score"
    return EndedSession(session_id, ended[0], status)  # type: ignore[arg-type]


@delete(
    "/v1/sessions/{session_id:str}",
    status_code=200,
    opt={"scope": "invoke"},
    summary="Forget a session",
    description=(
        "Removes its history, its stored responses, its traces here and in MLflow, their scores, and the dataset rows "
        "that came from them; so too for sessions that were forked from it. A run under way on it is ended. Sent "
        "again, it says how far MLflow's part is."
    ),
    tags=["Sessions"],
)
async def forget_session(request: AppRequest, session_id: str) -> Forgotten:
    """Forget a session, or say what became of that; raise `SessionNotFound` or `SessionBusy`."""
    return await _forget(request, _session(request, session_id))


@delete(
    "/v1/users/{user_id:path}",
    status_code=200,
    opt={"scope": "invoke"},
    summary="Forget a user",
    description=(
        "Forgets every session in which a request of this API key named the user (with the scope `admin`: of any key). "
        "A user of whom nothing is known is answered in the same way, with zeros. Escape a slash in the id as `%2F`."
    ),
    tags=["Sessions"],
)
async def forget_user(request: AppRequest, user_id: str) -> Forgotten:  # noqa: ARG001 - slashes in it are lost
    """Forget a user; raise `SessionBusy`."""
    redactor: Redactor = request.app.state.redactor
    given = unquote(request.scope["raw_path"].decode().partition("/v1/users/")[2])
    return await _forget(request, Subject(user_id=redactor.identifier(given, "user"), key_id=visible_key(request)))


def _session(request: AppRequest, session_id: str) -> Subject:
    redactor: Redactor = request.app.state.redactor
    return Subject(session_id=redactor.identifier(session_id, "session"), key_id=visible_key(request))


async def _forget(request: AppRequest, subject: Subject) -> Forgotten:
    pool: Pool = request.app.state.pool
    async with AsyncExitStack() as held:
        await _hold(held, request.app.state.sessions, pool, subject)
        erasure = await forget(pool, subject)
    if erasure is None:
        async with pool.connection() as connection:
            erasure = await last_erasure(connection, subject)
    if erasure is None:
        raise SessionNotFound(_NOT_FOUND)
    if not erasure.done:
        await enqueue_once(request.app.state.queue, ERASE, erasure.erasure_id, erasure_id=erasure.erasure_id)
        erasure = await _wait(pool, erasure)
    return Forgotten(
        erasure.erasure_id,
        "done" if erasure.done else "pending",
        msgspec.convert(erasure.removed, Removed),
        _DONE if erasure.done else _PENDING,
    )


async def _hold(held: AsyncExitStack, sessions: SessionStore, pool: Pool, subject: Subject) -> None:
    """End the runs under way on what is to be forgotten, and keep others off until ``held`` is left."""
    async with pool.connection() as connection:
        found = await sessions_of(connection, subject)
    try:
        async with asyncio.timeout(_HOLD_S):
            for session_id in found:  # in the same order everywhere, or two would wait for each other
                with suppress(SessionNotFound):  # somebody else has just forgotten it
                    await held.enter_async_context(sessions.hold(session_id))
    except TimeoutError:
        raise SessionBusy(
            "A run that is under way does not end, so nothing was forgotten. Send the request again."
        ) from None


async def _wait(pool: Pool, erasure: Erasure) -> Erasure:
    """Wait for MLflow's part while an evaluator is there; return the erasure as it stands then."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_WAIT_S):
            while not erasure.done:
                await asyncio.sleep(_LOOK_S)
                async with pool.connection() as connection:
                    erasure = await find_erasure(connection, erasure.erasure_id) or erasure
                    if await (await connection.execute(_NO_EVALUATOR)).fetchone() == (True,):
                        break
    return erasure


_SESSION = """
    SELECT created_at, ended_at FROM sessions
    WHERE session_id = %(session_id)s AND (%(key_id)s::text IS NULL OR key_id = %(key_id)s)
"""
_STATES = "SELECT trace_id, state FROM runs WHERE trace_id = ANY(%(traces)s)"
# By turns, since a conversation's new score stands beside the earlier one for a moment.
_SCORES = """
    SELECT DISTINCT ON (place, name, scorer)
           CASE WHEN session_id IS NULL THEN trace_id ELSE '' END AS place,
           name, value, passed, rationale, scorer, error
    FROM scores
    WHERE latest AND (session_id = %(session)s OR trace_id = ANY(%(traces)s) AND session_id IS NULL)
    ORDER BY place, name, scorer, turns DESC
"""
_END = """
    UPDATE sessions SET ended_at = coalesce(ended_at, now())
    WHERE session_id = %(session_id)s AND (%(key_id)s::text IS NULL OR key_id = %(key_id)s) RETURNING ended_at
"""
_DUE_NOW = (
    "UPDATE conversations SET due_at = least(due_at, now()) WHERE session_id = %(session_id)s AND due_at IS NOT NULL"
)
# The last turn's trace may still be in the memory of a web process.
_ON_THE_WAY = """
    SELECT EXISTS (SELECT 1 FROM outbox JOIN runs USING (trace_id) WHERE session_id = %(session_id)s AND NOT held)
        OR EXISTS (SELECT 1 FROM session_turns LEFT JOIN runs USING (trace_id)
                   WHERE session_turns.session_id = %(session_id)s AND runs.trace_id IS NULL
                     AND session_turns.created_at > now() - interval '1 minute')
"""
_NO_EVALUATOR = "SELECT coalesce(max(heartbeat_at) < now() - interval '15 seconds', true) FROM evaluators"
