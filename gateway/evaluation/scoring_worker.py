"""Carries out what waits in ``scorings``: judges, and whatever is scored again.

The order decides what a crash can do: the scores are stored, then written to MLflow, then the row ends. What was
stored before a crash is not asked for again, since a judge's answer costs money, and MLflow takes an id once.
"""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import structlog
from mlflow.entities import Trace as MlflowTrace
from mlflow.tracing.constant import TraceMetadataKey

from gateway.evaluation.applicability import root_of
from gateway.evaluation.datasets.rules import Rules
from gateway.evaluation.filters import TraceFacts
from gateway.evaluation.judging.binding import calling_under
from gateway.evaluation.judging.leases import Lease
from gateway.evaluation.judging.relay import Relay
from gateway.evaluation.records import (
    Connection,
    collect_failed,
    earlier_scores,
    erased,
    finish_runs,
    mark_logged,
    save_scores,
    stored_scores,
    unlogged,
)
from gateway.evaluation.scoring import (
    Failed,
    LiveScorer,
    NotApplicable,
    Score,
    Scored,
    ScorerOutcome,
    ScorerTask,
    conversation_task,
    trace_task,
)
from gateway.evaluation.scorings import ATTEMPTS, Scoring, Scorings, end, is_over
from gateway.evaluation.selection import AMPLE, BUDGET, Room, affordable
from gateway.evaluation.store import MlflowStore, is_away
from gateway.evaluation.threads import ScorerThreads
from gateway.storage.database import Pool
from gateway.storage.schema import KEPT
from gateway.tracing.redaction.redactor import Redactor

log = structlog.get_logger(__name__)

_LOOK_S = 0.5
_BUDGET_PAUSE_S = 60.0  # the budget is for hours and days


@dataclass(frozen=True)
class WorkerParts:
    """What the worker works with."""

    pool: Pool
    store: MlflowStore
    scorings: Scorings
    scorers: Callable[[], Sequence[LiveScorer]]
    """Those that run live, as they are now."""
    threads: ScorerThreads
    redactor: Redactor
    relay: Relay | None
    """Through which judges ask; ``None``: there are none."""
    rules: Callable[[], Rules]
    """Of the datasets."""
    concurrency: int
    """Scorings at once."""
    timeout_s: float
    """Seconds that one scoring may take."""
    share_key: bytes
    """By which scorers draw their shares."""
    room: Callable[[], Room] = lambda: AMPLE
    """How much may be scored now."""
    is_pressed: Callable[[], bool] = lambda: False
    """Whether others need the machine now."""


class ScoringWorker:
    """Works on scorings, many at once. One an evaluator."""

    def __init__(self, parts: WorkerParts):
        self._parts = parts
        self._under_way = 0
        self._at_work: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._news = asyncio.Event()

    def wake(self) -> None:
        """Say that there may be something to do."""
        self._news.set()

    async def run(self) -> None:
        """Work until cancelled; what is under way then is given back."""
        try:
            while True:
                if not await self._begin_what_is_due():
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._news.wait(), _LOOK_S)
                    self._news.clear()
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def work_off(self) -> None:
        """Carry out all that is due, and return."""
        while await self._begin_what_is_due():
            await asyncio.gather(*self._tasks)

    async def _begin_what_is_due(self) -> bool:
        """Claim as much as may be under way, and begin it; return whether there was any."""
        claimed = await self._claim()
        for _, group in groupby(sorted(claimed, key=_subject), _subject):
            self._begin(list(group))
        return bool(claimed)

    async def _claim(self) -> list[Scoring]:
        free = (1 if self._parts.is_pressed() else self._parts.concurrency) - self._under_way
        if free <= 0:
            return []
        # What was served long ago can wait for as long as the budget is short: there, nothing is left out.
        is_short = self._parts.room().budget < 1
        waiting = [live.name for live in self._parts.scorers() if is_short and live.is_judge]
        try:
            return await self._parts.scorings.claim(free, waiting, self._at_work)
        except Exception as error:  # noqa: BLE001 - the database is away, most likely: it is looked again
            log.warning("nothing to be scored could be claimed; trying again", error=repr(error))
            return []

    def _begin(self, group: list[Scoring]) -> None:
        self._under_way += len(group)
        self._at_work.append(group[0].subject)
        task = asyncio.create_task(self._carry_out(group), name=f"scoring {group[0].subject}")
        self._tasks.add(task)

        def over(done: asyncio.Task[None]) -> None:
            self._tasks.discard(done)
            self._under_way -= len(group)
            self._at_work.remove(group[0].subject)
            self._news.set()

        task.add_done_callback(over)

    async def _carry_out(self, group: list[Scoring]) -> None:
        """Work on all that is claimed of a subject; whatever happens, nothing of it stays claimed."""
        try:
            await self._score_subject(group)
        except asyncio.CancelledError:
            await self._parts.scorings.give_back(group)
            raise
        except Exception as error:
            if not is_away(error):
                log.exception("a subject could not be scored; trying again later", subject=group[0].subject)
            for scoring in group:
                with contextlib.suppress(Exception):
                    await self._parts.scorings.postpone(scoring, f"{type(error).__name__}: {error}")

    async def _score_subject(self, group: list[Scoring]) -> None:
        first = group[0]
        if await self._is_forgotten(first):  # MLflow may have it still: no model is to read it any more
            await self._end_all(group, "forgotten")
            return
        traces = await self._traces(first)
        if traces is None:
            await self._end_all(group, "the conversation went on")
            return
        if not traces:
            await self._end_all(group, "not in MLflow any more")
            return
        known = {live.name: live for live in self._parts.scorers()}
        results = []
        for scoring in group:
            live = known.get(scoring.scorer)
            if live is None or live.version != scoring.scorer_version:
                await self._end_all([scoring], "the scorer was changed" if live else "the scorer is not there any more")
            elif scoring.back_fill and (reason := live.applies(TraceFacts(traces))) is not None:
                await self._end_all([scoring], reason)
            else:
                results.append(self._score(scoring, live, traces))
        await asyncio.gather(*results)

    async def _is_forgotten(self, scoring: Scoring) -> bool:
        """Whether its run was forgotten before a model reads it; it may be so until the scores are stored."""
        async with self._parts.pool.connection() as connection:
            cursor = await connection.execute(_FORGOTTEN, [scoring.trace_id])
            return await cursor.fetchone() is not None

    async def _traces(self, scoring: Scoring) -> list[MlflowTrace] | None:
        """Return the subject's traces, oldest first; ``None``: of a conversation that is longer by now."""
        if not scoring.turns:
            return await asyncio.to_thread(self._parts.store.read_traces, [scoring.trace_id])
        async with self._parts.pool.connection() as connection:
            cursor = await connection.execute(_TURNS, [scoring.subject])
            trace_ids = [str(row[0]) for row in await cursor.fetchall()]
        traces = await asyncio.to_thread(self._parts.store.read_traces, trace_ids)
        return None if len(traces) > scoring.turns else traces

    async def _score(self, claimed: Scoring, live: LiveScorer, traces: list[MlflowTrace]) -> None:
        """Ask one scorer, unless it was asked before, and bring its row to an end, or to its next attempt."""
        scoring = claimed
        metadata = traces[0].info.trace_metadata
        session_id = scoring.subject if scoring.turns else str(metadata.get(TraceMetadataKey.TRACE_SESSION, ""))
        trace_ids = [trace.info.trace_id for trace in traces]
        async with self._parts.pool.connection() as connection:
            known = (scoring.trace_id, scoring.turns or None, scoring.scorer, scoring.scorer_version)
            scores = await stored_scores(connection, *known)
        if not scores:
            afforded = await self._afforded(claimed, live)
            if afforded is None:
                return
            scoring = afforded
            outcome, lease = await self._ask(scoring, live, traces, session_id)
            match outcome:
                case NotApplicable(reason):
                    await self._end_all([scoring], reason)
                    return
                case Failed() as failed:
                    if not await self._is_final(scoring, failed, lease):
                        return
                    said = failed.scores
                case Scored(said):
                    pass
            spent = lease.usage.details() if lease else {}
            said = [
                replace(score, inclusion_probability=scoring.probability, details=score.details | spent)
                for score in said
            ]
            async with self._parts.pool.connection() as connection, connection.transaction():
                if await erased(connection, trace_ids):
                    return  # forgotten while it was scored
                scores = await save_scores(connection, self._parts.redactor, [(session_id, said)])
        await self._settle(scoring, scores, traces, trace_ids)

    async def _afforded(self, scoring: Scoring, live: LiveScorer) -> Scoring | None:
        """Return the scoring with the probability that it has by now; ``None``, and its end, if the budget is lower."""
        if not live.is_judge or scoring.attempts > 1 or scoring.back_fill:
            return scoring
        share = affordable(live, self._parts.share_key, scoring.subject, self._parts.room().budget)
        if share is None:
            await self._end_all([scoring], BUDGET)
            return None
        return scoring._replace(probability=min(scoring.probability, share))

    async def _ask(
        self, scoring: Scoring, live: LiveScorer, traces: list[MlflowTrace], session_id: str
    ) -> tuple[ScorerOutcome, Lease | None]:
        task = await self._task(scoring, live, traces, session_id)
        relay = self._parts.relay
        if not live.is_judge or relay is None:
            return await task.wait_within(self._parts.threads, self._parts.timeout_s), None
        lease = relay.lease("/".join(map(str, scoring.key)), live.name, live.model or "")
        try:
            leased = task.within(lambda: calling_under(lease.lease_id))
            return await leased.wait_within(self._parts.threads, self._parts.timeout_s), lease
        finally:
            relay.close(lease)

    async def _task(self, scoring: Scoring, live: LiveScorer, traces: list[MlflowTrace], session_id: str) -> ScorerTask:
        if not scoring.turns:
            return trace_task(live, traces[0], scoring.agent)
        async with self._parts.pool.connection() as connection:
            before = await earlier_scores(connection, session_id, live.name, scoring.turns)
        return conversation_task(live, traces, session_id, scoring.agent, before[0] if before else None)

    async def _is_final(self, scoring: Scoring, failed: Failed, lease: Lease | None) -> bool:
        """Whether the failure is to be stored; else the row has got its next attempt, or its end."""
        problem = lease.problem if lease else None
        if problem and problem.kind == "budget_used_up":
            if scoring.back_fill:
                await self._parts.scorings.give_back([scoring], _BUDGET_PAUSE_S)
            else:
                await self._end_all([scoring], BUDGET)
            return False
        passes = problem.is_passing if problem else failed.may_pass
        if passes and scoring.attempts < ATTEMPTS:
            retry_after_s = problem.retry_after_s if problem else None
            await self._parts.scorings.postpone(scoring, failed.error, retry_after_s)
            return False
        return True

    async def _settle(
        self, scoring: Scoring, scores: Sequence[Score], traces: Sequence[MlflowTrace], trace_ids: list[str]
    ) -> None:
        """Write the scores to MLflow, each in place of the ones before it, and end the row."""
        root = None if scoring.turns else root_of(traces[0]).span_id
        await project(self._parts.pool, self._parts.store, scores, root)
        async with self._parts.pool.connection() as connection, connection.transaction():
            if await erased(connection, trace_ids):
                return
            await mark_logged(connection, scores)
            await collect_failed(connection, scores, self._parts.scorers(), trace_ids[-1], self._parts.rules())
            has_failed = all(score.error for score in scores)
            await end(connection, scoring, *(("failed", scores[0].error) if has_failed else ("scored", None)))
            await self._finish(connection, scoring)

    async def _end_all(self, group: Sequence[Scoring], reason: str) -> None:
        """End rows of which nothing was scored."""
        async with self._parts.pool.connection() as connection, connection.transaction():
            await erased(connection, [each.trace_id for each in group])
            for scoring in group:
                await end(connection, scoring, "skipped", reason)
            await self._finish(connection, group[0])

    async def _finish(self, connection: Connection, scoring: Scoring) -> None:
        if not scoring.turns and await is_over(connection, scoring.trace_id):
            await finish_runs(connection, [scoring.trace_id])


async def project(pool: Pool, store: MlflowStore, scores: Sequence[Score], span_id: str | None = None) -> None:
    """Write scores to MLflow, each in place of those that it takes the place of, which stay as history.

    Args:
        pool: connections to the database.
        store: MLflow.
        scores: as they are stored.
        span_id: root of the trace that they are on; ``None`` for those of a conversation.
    """
    ids = [score.score_id for score in scores]
    for score in scores:
        async with pool.connection() as connection:
            cursor = await connection.execute(_REPLACED, {**_replaced_by(score), "ids": ids})
            found = [(str(score_id), trace_id) for score_id, trace_id in await cursor.fetchall()]
        replaced = [score_id for score_id, _ in found]
        # MLflow knows this within a trace only, and a turn that came late may have become the conversation's first.
        overrides = next((score_id for score_id, trace_id in found if trace_id == score.trace_id), None)
        missing: list[Score] = []
        if replaced:
            async with pool.connection() as connection:
                missing = [each for each in await unlogged(connection, replaced) if each.trace_id == score.trace_id]
        for each in missing:  # as a crash has left them: they come first, to be overridden
            await asyncio.to_thread(store.write_assessment, each.assessment(span_id))
        await asyncio.to_thread(store.write_assessment, score.assessment(span_id, overrides))
        if replaced:
            async with pool.connection() as connection:
                await connection.execute("UPDATE scores SET latest = false WHERE score_id = ANY(%s)", [replaced])
                await mark_logged(connection, missing)


def _replaced_by(score: Score) -> dict[str, object]:
    return {
        "trace": score.trace_id,
        "session": score.session_id,
        "scorer": score.scorer,
        "name": score.name,
        "turns": score.turns,
        "id": score.score_id,
    }


def _subject(scoring: Scoring) -> tuple[str, int]:
    return scoring.subject, scoring.turns


_FORGOTTEN = "SELECT 1 FROM runs WHERE trace_id = %s AND state = 'erased'"
_TURNS = f"SELECT trace_id FROM runs WHERE session_id = %s AND {KEPT} ORDER BY started_at"
# Of a conversation: what was said when it was shorter. Of any subject: that the scorer failed, or what an earlier
# version of it said.
_REPLACED = """
    SELECT score_id, trace_id FROM scores
    WHERE score_id <> ALL(%(ids)s) AND latest AND scorer = %(scorer)s AND created_at <= (
            SELECT created_at FROM scores WHERE score_id = %(id)s)
      AND CASE WHEN %(session)s::text IS NULL THEN
              trace_id = %(trace)s AND session_id IS NULL AND (name = %(name)s OR error IS NOT NULL)
          ELSE session_id = %(session)s AND (name = %(name)s OR error IS NOT NULL) AND turns <= %(turns)s END
    ORDER BY turns DESC NULLS LAST, created_at DESC
"""
