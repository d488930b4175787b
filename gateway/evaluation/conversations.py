"""Scoring whole conversations, once they were ended or have been quiet for a while.

A conversation that goes on after it was scored is scored again; the earlier score stays as history, marked as not the
latest one here and as overridden in MLflow. MLflow's place for a conversation's scores is its first trace, with the
session's id in the assessment's metadata.
"""

import asyncio
from dataclasses import dataclass, field

import structlog
from mlflow.entities import Trace as MlflowTrace
from procrastinate import App

from gateway.crypto import Keys
from gateway.evaluation.filters import TraceFacts
from gateway.evaluation.intake import IntakeParts
from gateway.evaluation.records import (
    Connection,
    collect_failed,
    erased,
    mark_logged,
    note_skips,
    save_scores,
    unlogged_scores,
)
from gateway.evaluation.scoring import Score, conversation_task
from gateway.evaluation.scoring_worker import project
from gateway.evaluation.scorings import enqueue, enqueue_failed
from gateway.evaluation.selection import Selected, scores_of, select
from gateway.evaluation.store import MlflowStore
from gateway.storage.database import Pool
from gateway.storage.queue import SCORE_CONVERSATION, enqueue_once
from gateway.storage.schema import KEPT

log = structlog.get_logger(__name__)

_AT_ONCE = 200  # due conversations that one look takes up; the next look takes the rest


@dataclass
class _Work:
    """One conversation on its way."""

    session_id: str
    agent: str
    traces: list[MlflowTrace]
    scores: list[Score]
    """What scorers in plain code said."""
    judges: list[Selected] = field(default_factory=list)
    """Who is still to score it."""
    skips: dict[str, str] = field(default_factory=dict)
    """Who does not, and why."""


class ConversationScoring:
    """Finds the conversations that are due and scores them, one evaluator at a time a conversation.

    What judges are to say of them is left to `gateway.evaluation.scoring_worker`.
    """

    def __init__(self, keys: Keys, pool: Pool, queue: App, store: MlflowStore, parts: IntakeParts, *, timeout_s: float):
        """Take the parts, and the seconds that a scorer in plain code may take."""
        self._share_key = keys.derive("sampling")
        self._pool = pool
        self._queue = queue
        self._store = store
        self._parts = parts
        self._timeout_s = timeout_s

    async def enqueue_due(self) -> None:
        """Enqueue a job for each conversation that is due."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_DUE, [_AT_ONCE])
            due = await cursor.fetchall()
        for (session_id,) in due:
            await enqueue_once(self._queue, SCORE_CONVERSATION, str(session_id), session_id=str(session_id))

    async def score(self, session_id: str) -> None:
        """Score a conversation, if it is still due; if that fails, it is due again later."""
        try:
            await self._score(session_id)
        except Exception:
            log.exception("a conversation could not be scored; trying again later", session_id=session_id)
            async with self._pool.connection() as connection:
                await connection.execute(_POSTPONE, [session_id])

    async def _score(self, session_id: str) -> None:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_LOOK, [session_id])
            row = await cursor.fetchone()
        if row is None:
            return  # it went on in the meantime, or another evaluator was here
        agent, last_turn_at, due_at = str(row[0]), row[1], row[2]
        trace_ids: list[str] = row[3]  # type: ignore[assignment]
        traces = await asyncio.to_thread(self._store.read_traces, trace_ids)
        work = _Work(session_id, agent, traces, [])
        if traces:
            async with self._pool.connection() as connection:
                work.scores = await unlogged_scores(connection, [traces[0].info.trace_id], len(traces))
            said = await self._ask(work)
            async with self._pool.connection() as connection, connection.transaction():
                if await erased(connection, trace_ids):
                    return  # forgotten while it was scored
                work.scores += await save_scores(connection, self._parts.redactor, [(session_id, said)])
            await project(self._pool, self._store, work.scores)
        async with self._pool.connection() as connection, connection.transaction():
            if await erased(connection, trace_ids):
                return
            await mark_logged(connection, work.scores)
            if traces:
                await self._settle(connection, work)
            await connection.execute(_DONE, [session_id, last_turn_at, due_at])
        if work.judges:
            self._parts.wake()

    async def _ask(self, work: _Work) -> list[Score]:
        """Return what scorers in plain code say, and note in ``work`` who else is to, and who is not."""
        scorers = [live for live in self._parts.scorers() if live.scores_conversations]
        facts, room = TraceFacts(work.traces), self._parts.room()
        in_code, work.judges, work.skips = select(scorers, self._share_key, facts, work.session_id, room)
        asked = {score.scorer for score in work.scores}
        said = await asyncio.gather(*[self._run_scorer(work, each) for each in in_code if each.live.name not in asked])
        return [score for scores in said for score in scores]

    async def _run_scorer(self, work: _Work, selected: Selected) -> list[Score]:
        task = conversation_task(selected.live, work.traces, work.session_id, work.agent)
        return scores_of(selected, await task.wait_within(self._parts.threads, self._timeout_s), work.skips)

    async def _settle(self, connection: Connection, work: _Work) -> None:
        """Store what follows from the scores, and who is still to score."""
        first, last, turns = work.traces[0].info.trace_id, work.traces[-1].info.trace_id, len(work.traces)
        await collect_failed(connection, work.scores, self._parts.scorers(), last, self._parts.rules())
        await note_skips(connection, "conversations", {work.session_id: work.skips})
        await enqueue(connection, work.session_id, turns, first, work.agent, work.judges)
        await enqueue_failed(connection, work.session_id, turns, first, work.agent, work.scores)


# A turn whose trace is still in the outbox, or in the memory of a web process, belongs to the conversation: that is
# looked at again when the trace has arrived. One that takes longer than a minute died with its process.
_IS_DUE = """
    due_at <= now()
      AND NOT EXISTS (SELECT 1 FROM outbox JOIN runs USING (trace_id)
                      WHERE runs.session_id = conversations.session_id)
      AND NOT EXISTS (SELECT 1 FROM session_turns AS turn
                      WHERE turn.session_id = conversations.session_id
                        AND turn.created_at > now() - interval '1 minute' AND turn.trace_id IS NOT NULL
                        AND NOT EXISTS (SELECT 1 FROM runs WHERE runs.trace_id = turn.trace_id))
"""
_DUE = f"""
    SELECT session_id FROM conversations
    WHERE {_IS_DUE}
      AND NOT EXISTS (SELECT 1 FROM procrastinate_jobs
                      WHERE lock = 'score_conversation:' || conversations.session_id AND status IN ('todo', 'doing'))
    ORDER BY due_at LIMIT %s
"""
_LOOK = f"""
    SELECT agent, last_turn_at, due_at, ARRAY(
        SELECT trace_id FROM runs WHERE runs.session_id = conversations.session_id
          AND {KEPT} ORDER BY started_at)
    FROM conversations WHERE session_id = %s AND {_IS_DUE}
"""
# A turn that arrived meanwhile has made it due anew, also where it is not the last one.
_DONE = """
    UPDATE conversations SET due_at = NULL, attempts = 0
    WHERE session_id = %s AND last_turn_at = %s AND due_at = %s
"""
_POSTPONE = """
    UPDATE conversations SET attempts = attempts + 1, due_at = now() + make_interval(secs => 2 ^ least(attempts, 6))
    WHERE session_id = %s
"""
