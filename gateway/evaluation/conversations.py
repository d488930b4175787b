"""Scoring whole conversations, once they were ended or have been quiet for a while.

A conversation that goes on after it was scored is scored again; the earlier score stays as history, marked as not the
latest one here and as overridden in MLflow. MLflow's place for a conversation's scores is its first trace, with the
session's id in the assessment's metadata.
"""

import asyncio
from concurrent.futures import Executor

import structlog
from procrastinate import App

from gateway.crypto import Keys
from gateway.evaluation.records import (
    Connection,
    collect_failed,
    erased,
    mark_logged,
    save_scores,
    unlogged_scores,
)
from gateway.evaluation.scoring import LiveScorer, Score, in_thread, score_conversation
from gateway.evaluation.store import MlflowStore
from gateway.storage.database import Pool
from gateway.storage.queue import SCORE_CONVERSATION, enqueue_once
from gateway.tracing.redaction.redactor import Redactor

log = structlog.get_logger(__name__)

_AT_ONCE = 200  # due conversations that one look takes up; the next look takes the rest


class ConversationScoring:
    """Finds the conversations that are due and scores them, one evaluator at a time a conversation."""

    def __init__(
        self,
        keys: Keys,
        pool: Pool,
        queue: App,
        store: MlflowStore,
        scorers: list[LiveScorer],
        judges: Executor,
        redactor: Redactor,
    ):
        """Take the parts; ``judges`` has the threads that judges may keep waiting."""
        self._share_key = keys.derive("sampling")
        self._pool = pool
        self._queue = queue
        self._store = store
        self._scorers = [live for live in scorers if live.scores_conversations]
        self._judges = judges
        self._redactor = redactor

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
        drawn = [live for live in self._scorers if live.draws(self._share_key, agent, session_id)]
        scores: list[Score] = []
        if traces:
            async with self._pool.connection() as connection:
                scores = await unlogged_scores(connection, traces[0].info.trace_id, len(traces))
            asked = {score.scorer for score in scores}  # what an earlier attempt has paid for is not asked again
            results = await asyncio.gather(
                *(
                    in_thread(self._judges, live, score_conversation, traces, session_id, agent)
                    for live in drawn
                    if live.name not in asked
                )
            )
            said = [score for result in results for score in result]
            async with self._pool.connection() as connection, connection.transaction():
                if await erased(connection, trace_ids):
                    return  # forgotten while it was scored
                scores += await save_scores(connection, self._redactor, [(session_id, said)])
            async with self._pool.connection() as connection:
                await self._project(connection, scores)
        async with self._pool.connection() as connection, connection.transaction():
            if await erased(connection, trace_ids):
                return
            await mark_logged(connection, scores)
            if traces:
                await collect_failed(connection, scores, self._scorers, traces[-1].info.trace_id)
            await connection.execute(_DONE, [session_id, last_turn_at, due_at])

    async def _project(self, connection: Connection, scores: list[Score]) -> None:
        """Write the scores to MLflow, each in place of the one before it."""
        for score in scores:
            cursor = await connection.execute(_EARLIER, [score.session_id, score.scorer, score.name, score.turns])
            earlier = [str(row[0]) for row in await cursor.fetchall()]
            overrides = earlier[0] if earlier else None
            await asyncio.to_thread(self._store.write_assessment, score.assessment(overrides=overrides))
            await connection.execute("UPDATE scores SET latest = false WHERE score_id = ANY(%s)", [earlier])


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
          AND state NOT IN ('sampled_out', 'redaction_blocked', 'dropped', 'erased') ORDER BY started_at)
    FROM conversations WHERE session_id = %s AND {_IS_DUE}
"""
_EARLIER = """
    SELECT score_id FROM scores WHERE session_id = %s AND scorer = %s AND name = %s AND turns < %s
    ORDER BY turns DESC, created_at DESC
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
