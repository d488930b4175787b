"""From the outbox to MLflow, with scores: the way of every single trace.

Evaluators claim batches with ``FOR UPDATE SKIP LOCKED``. A claim counts while its evaluator is alive, which it shows
by an advisory lock that Postgres frees the moment its connection is gone: what a killed evaluator had claimed is free
for the next one at once.

The order of the steps decides what a crash can do. A trace leaves the outbox last, in the transaction that also stores
its run's state; before that everything is done again and changes nothing, since all ids are derived.

A trace whose run was forgotten meanwhile goes no further, and what was written of it to MLflow already is removed once
its claim is over (`gateway.evaluation.erasure`).
"""

import asyncio
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

import structlog
from mlflow.entities import Trace as MlflowTrace
from procrastinate import App
from psycopg.rows import class_row

from gateway.crypto import Cipher, Keys, WrongKey
from gateway.evaluation.export import to_mlflow
from gateway.evaluation.records import (
    Connection,
    collect_failed,
    erased,
    finish_run,
    mark_logged,
    save_scores,
    unlogged_scores,
)
from gateway.evaluation.scoring import LiveScorer, Score, in_thread, score_trace
from gateway.evaluation.store import MlflowStore
from gateway.settings import Settings
from gateway.storage.database import Pool
from gateway.storage.erasure import BESIDE_NO_ERASURE
from gateway.storage.queue import JUDGE_TRACE, enqueue_once
from gateway.tracing.spans import Trace, decode

log = structlog.get_logger(__name__)

PRESENCE_LOCK = 0x6167_7465
"""First key of the advisory lock by which an evaluator shows that it is alive; the second is its id."""

_RETRY_AFTER_S = 5.0  # after the first failure; twice as long after each one that follows
_DOUBLINGS = 4  # so that it is 80 s at the longest
_REFUSALS = 5  # failures of one trace while MLflow is well, after which it is given up
_CLAIM = """
    WITH alive AS (
        SELECT objid::int AS evaluator_id FROM pg_locks
        WHERE locktype = 'advisory' AND classid = %(lock)s AND objsubid = 2 AND granted
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())),
    mine AS (
        SELECT trace_id FROM outbox
        WHERE retry_at <= now()
          AND (claimed_by IS NULL OR claimed_by = %(me)s OR claimed_by NOT IN (SELECT evaluator_id FROM alive))
        ORDER BY position LIMIT %(count)s FOR UPDATE SKIP LOCKED)
    UPDATE outbox SET claimed_by = %(me)s, attempts = attempts + 1 FROM mine
    WHERE outbox.trace_id = mine.trace_id
    RETURNING outbox.trace_id, outbox.payload, outbox.attempts, outbox.refusals
"""
_RELEASE = """
    UPDATE outbox SET claimed_by = NULL, refusals = %s, retry_at = now() + make_interval(secs => %s)
    WHERE trace_id = %s AND claimed_by = %s
"""


class _NotStoredError(Exception):
    """MLflow did not take a batch."""


class _Claimed(NamedTuple):
    """A row of the outbox that is ours to work on."""

    trace_id: str
    payload: bytes
    attempts: int
    """How often it was claimed, this time included."""
    refusals: int
    """How often it failed while MLflow was well."""


@dataclass
class _Work:
    """One claimed trace on its way."""

    trace: Trace
    entity: MlflowTrace
    scores: list[Score]


class TraceIntake:
    """Empties the outbox, and judges single traces."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        pool: Pool,
        queue: App,
        store: MlflowStore,
        scorers: list[LiveScorer],
        evaluator_id: int,
        judges: Executor,
    ):
        """Take the parts; ``judges`` has the threads that judges may keep waiting."""
        self._settings = settings
        self._cipher: Cipher = keys.outbox
        self._share_key = keys.derive("sampling")
        self._pool = pool
        self._queue = queue
        self._store = store
        self._scorers = [live for live in scorers if not live.scores_conversations]
        self._evaluator_id = evaluator_id
        self._judges = judges

    async def drain(self) -> None:
        """Work through the outbox until nothing is left that can be claimed."""
        while claimed := await self._claim():
            try:
                await self._take_in(claimed)
            except Exception:
                log.exception("a batch could not be taken in; trying its traces one by one", traces=len(claimed))
                await self._take_in_singly(claimed)

    async def _take_in_singly(self, claimed: list[_Claimed]) -> None:
        """Find out which traces of a batch failed it, so that one does not hold up the others.

        A trace is to blame only where MLflow does not take it and is well: while MLflow or the database is away, or
        the key is wrong, all wait for however long that takes.
        """
        failed: list[tuple[_Claimed, bool]] = []
        for each in claimed:
            try:
                await self._take_in([each])
            except Exception as error:  # noqa: BLE001 - counted below, with what became of the trace
                log.error("a trace could not be taken in", trace_id=each.trace_id, error=str(error))
                failed.append((each, isinstance(error, _NotStoredError)))
        mlflow_is_well = len(failed) < len(claimed) or await asyncio.to_thread(self._store.is_well)
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(BESIDE_NO_ERASURE)
            for each, not_stored in failed:
                refusals = each.refusals + (not_stored and mlflow_is_well)
                if refusals >= _REFUSALS:
                    await connection.execute(_FAIL, ["refused by MLflow", each.trace_id])
                    await connection.execute("DELETE FROM outbox WHERE trace_id = %s", [each.trace_id])
                retry_s = _RETRY_AFTER_S * 2 ** min(each.attempts - 1, _DOUBLINGS)
                await connection.execute(_RELEASE, [refusals, retry_s, each.trace_id, self._evaluator_id])

    async def _claim(self) -> list[_Claimed]:
        parameters = {"lock": PRESENCE_LOCK, "count": self._settings.evaluator_batch, "me": self._evaluator_id}
        async with self._pool.connection() as connection, connection.cursor(row_factory=class_row(_Claimed)) as cursor:
            await cursor.execute(_CLAIM, parameters)
            return await cursor.fetchall()

    async def _take_in(self, claimed: list[_Claimed]) -> None:
        works, broken = await asyncio.to_thread(self._score_batch, claimed)
        async with self._pool.connection() as connection, connection.transaction():
            works = await self._still_wanted(connection, works)
            for work in works:
                work.scores = await save_scores(connection, work.scores)
        try:
            await asyncio.to_thread(self._write_batch, works)
        except Exception as error:
            raise _NotStoredError(f"{type(error).__name__}: {error}") from error
        async with self._pool.connection() as connection, connection.transaction():
            works = await self._still_wanted(connection, works)
            judged = {
                work.trace.trace_id for work in works if self._drawn(work.trace.agent, work.trace.trace_id, judges=True)
            }
            for work in works:
                await self._settle(connection, work, finished=work.trace.trace_id not in judged)
            for trace_id, reason in broken.items():
                await connection.execute(_FAIL, [reason, trace_id])
            ids = [each.trace_id for each in claimed]
            await connection.execute("DELETE FROM outbox WHERE trace_id = ANY(%s)", [ids])
        async with self._pool.connection() as connection:
            await connection.execute(_OVER, [[work.trace.session_id for work in works]])
        for trace_id in judged:
            await enqueue_once(self._queue, JUDGE_TRACE, trace_id, trace_id=trace_id)

    async def _still_wanted(self, connection: Connection, works: list[_Work]) -> list[_Work]:
        """Return the works whose runs were not forgotten since they were claimed."""
        gone = await erased(connection, [work.trace.trace_id for work in works])
        return [work for work in works if work.trace.trace_id not in gone]

    def _score_batch(self, claimed: list[_Claimed]) -> tuple[list[_Work], dict[str, str]]:
        """Decode and score a batch. Returns what can go on, and by trace id why the rest never can."""
        works: list[_Work] = []
        broken: dict[str, str] = {}
        for trace_id, payload, *_ in claimed:
            if not payload:
                continue  # forgotten
            try:
                trace = decode(self._cipher.decrypt(payload, trace_id))
                entity = to_mlflow(trace, self._store.experiment_id)
            except WrongKey:
                raise  # the evaluator is set up wrongly, the trace is not to blame: it waits
            except Exception as error:
                log.exception("a trace cannot be read", trace_id=trace_id)
                broken[trace_id] = f"unreadable: {type(error).__name__}"
                continue
            scores = [
                score
                for live in self._drawn(trace.agent, trace_id, judges=False)
                for score in score_trace(live, entity, trace.agent)
            ]
            works.append(_Work(trace, entity, scores))
        return works, broken

    def _drawn(self, agent: str, trace_id: str, *, judges: bool) -> list[LiveScorer]:
        return [
            live for live in self._scorers if live.is_judge == judges and live.draws(self._share_key, agent, trace_id)
        ]

    def _write_batch(self, works: list[_Work]) -> None:
        for work in works:
            root = work.entity.data.spans[0].span_id
            work.entity.info.assessments = [score.assessment(root) for score in work.scores]
        if works:
            self._store.write_traces([work.entity for work in works])

    async def _settle(self, connection: Connection, work: _Work, *, finished: bool) -> None:
        """Store what follows from a trace being in MLflow with its scores."""
        trace = work.trace
        await mark_logged(connection, work.scores)
        await collect_failed(connection, work.scores, self._scorers, trace.trace_id)
        ended = trace.ended_ns / 1e9
        await connection.execute(
            _TURN,
            {"session": trace.session_id, "agent": trace.agent, "ended": ended, "quiet": self._settings.quiet_period_s},
        )
        if finished:
            await finish_run(connection, trace.trace_id)

    async def judge(self, trace_id: str) -> None:
        """Run the judges that are drawn for a trace which is in MLflow already."""
        traces = await asyncio.to_thread(self._store.read_traces, [trace_id])
        if not traces:  # somebody deleted it there: what the other scorers said stands
            log.warning("a trace to be judged is not in MLflow any more", trace_id=trace_id)
            async with self._pool.connection() as connection:
                await finish_run(connection, trace_id)
            return
        agent = traces[0].info.trace_metadata["gateway.agent"]
        async with self._pool.connection() as connection:
            scores = await unlogged_scores(connection, trace_id)
        # What an earlier attempt has paid for is not asked again.
        asked = {score.scorer for score in scores}
        judges = [live for live in self._drawn(agent, trace_id, judges=True) if live.name not in asked]
        results = await asyncio.gather(
            *(in_thread(self._judges, live, score_trace, traces[0], agent) for live in judges)
        )
        async with self._pool.connection() as connection, connection.transaction():
            if await erased(connection, [trace_id]):
                return
            scores += await save_scores(connection, [score for result in results for score in result])
        root = traces[0].data.spans[0].span_id
        for score in scores:
            await asyncio.to_thread(self._store.write_assessment, score.assessment(root))
        async with self._pool.connection() as connection, connection.transaction():
            if await erased(connection, [trace_id]):
                return
            await mark_logged(connection, scores)
            await collect_failed(connection, scores, self._scorers, trace_id)
            await finish_run(connection, trace_id)

    async def resume_pending(self) -> None:
        """Take up runs that were left between the outbox and their judges, as a crash can leave them."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_LEFT)
            left = await cursor.fetchall()
        for trace_id, agent in left:
            if self._drawn(str(agent), str(trace_id), judges=True):
                await enqueue_once(self._queue, JUDGE_TRACE, str(trace_id), trace_id=str(trace_id))
            else:
                async with self._pool.connection() as connection:
                    await finish_run(connection, str(trace_id))


_FAIL = "UPDATE runs SET state = 'failed', reason = %s, updated_at = now() WHERE trace_id = %s AND state = 'pending'"
_TURN = """
    INSERT INTO conversations AS known (session_id, agent, last_turn_at, due_at)
    VALUES (%(session)s, %(agent)s, to_timestamp(%(ended)s),
            to_timestamp(%(ended)s) + make_interval(secs => %(quiet)s))
    ON CONFLICT (session_id) DO UPDATE SET
        agent = excluded.agent,
        last_turn_at = greatest(known.last_turn_at, excluded.last_turn_at),
        due_at = greatest(known.last_turn_at, excluded.last_turn_at) + make_interval(secs => %(quiet)s)
"""
# Looked at once the turns are committed: who ends a session makes its conversation due, if it is there to be seen.
_OVER = """
    UPDATE conversations SET due_at = now() FROM sessions
    WHERE conversations.session_id = sessions.session_id AND sessions.ended_at IS NOT NULL
      AND conversations.session_id = ANY(%s) AND due_at > now()
"""
_LEFT = """
    SELECT trace_id, agent FROM runs
    WHERE state = 'pending' AND updated_at < now() - interval '30 seconds'
      AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.trace_id = runs.trace_id)
      AND NOT EXISTS (SELECT 1 FROM procrastinate_jobs
                      WHERE queueing_lock = 'judge_trace:' || runs.trace_id AND status IN ('todo', 'doing'))
    LIMIT 500
"""
