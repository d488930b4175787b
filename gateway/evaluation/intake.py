"""From the outbox to MLflow, with scores: the way of every single trace.

The order of the steps decides what a crash can do. A trace leaves the outbox last, in the transaction that also stores
its run's state; before that everything is done again and changes nothing, since all ids are derived. While MLflow is
away nothing is claimed, and everything waits for however long that takes.

Why a trace was kept can change after it was claimed: its tags are compared with the ledger as the trace leaves the
outbox, and written anew if they differ (`gateway.evaluation.promotion`).

A trace whose run was forgotten meanwhile goes no further, and what was written of it to MLflow already is removed once
its claim is over (`gateway.evaluation.erasure`).
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import structlog
from mlflow.entities import Trace as MlflowTrace
from psycopg.types.json import Jsonb

from gateway.crypto import Cipher, Keys, WrongKey
from gateway.evaluation.claims import Claimed, Claims, drop
from gateway.evaluation.datasets.rules import Rules
from gateway.evaluation.export import kept_tags, to_mlflow
from gateway.evaluation.filters import TraceFacts
from gateway.evaluation.records import (
    Connection,
    collect_failed,
    end_run,
    erased,
    finish_runs,
    mark_logged,
    note_skips,
    save_scores,
    unlogged_scores,
)
from gateway.evaluation.scoring import LiveScorer, Score, trace_task
from gateway.evaluation.scorings import enqueue, enqueue_failed
from gateway.evaluation.selection import AMPLE, Room, Selected, scores_of, select
from gateway.evaluation.store import MlflowStore, is_away
from gateway.evaluation.threads import ScorerThreads
from gateway.settings import Settings
from gateway.storage.database import Pool
from gateway.tracing.ledger import State
from gateway.tracing.redaction.redactor import Redactor
from gateway.tracing.spans import Trace, decode, encode

log = structlog.get_logger(__name__)


class _NotStoredError(Exception):
    """MLflow did not take a batch, though it is there."""


class _AwayError(Exception):
    """MLflow is away."""


class _Ended(NamedTuple):
    """The state of a run whose trace goes no further, and why."""

    state: State
    reason: str


@dataclass
class _Work:
    """One claimed trace on its way."""

    claimed: Claimed
    trace: Trace
    entity: MlflowTrace
    scores: list[Score] = field(default_factory=list)
    """What scorers in plain code said."""
    judges: list[Selected] = field(default_factory=list)
    """Who is still to score it."""
    skips: dict[str, str] = field(default_factory=dict)
    """Who does not, and why."""


async def _give_no_way(worked_s: float) -> None:
    """Go on at once."""


@dataclass(frozen=True)
class IntakeParts:
    """What traces are scored with, and what is told of it."""

    scorers: Callable[[], Sequence[LiveScorer]]
    """Those that run live, as they are now."""
    threads: ScorerThreads
    """For scorers in plain code."""
    redactor: Redactor
    room: Callable[[], Room] = lambda: AMPLE
    """How much may be scored now."""
    rules: Callable[[], Rules] = dict
    """Of the datasets."""
    entities: Callable[[Trace], Trace] | None = None
    """Replaces named entities, and raises if it cannot."""
    wake: Callable[[], None] = lambda: None
    """Tells who carries scorings out that there are new ones."""
    give_way: Callable[[float], Awaitable[None]] = _give_no_way
    """Is awaited after so many seconds of work, to let others have the machine."""


class TraceIntake:
    """Empties the outbox."""

    def __init__(
        self, settings: Settings, keys: Keys, pool: Pool, store: MlflowStore, evaluator_id: int, parts: IntakeParts
    ):
        self._settings = settings
        self._cipher: Cipher = keys.outbox
        self._share_key = keys.derive("sampling")
        self._pool = pool
        self._store = store
        self._claims = Claims(pool, evaluator_id, settings.evaluator_batch)
        self._parts = parts
        self._mlflow_is_away = False

    async def drain(self) -> None:
        """Work through the outbox until nothing is left that can be claimed, or MLflow is away."""
        if self._mlflow_is_away and not await asyncio.to_thread(self._store.is_well):
            return
        while claimed := await self._claims.claim():
            began = time.monotonic()
            try:
                await self._take_in_or_singly(claimed)
            except _AwayError as error:
                if not self._mlflow_is_away:
                    log.warning("MLflow is away; traces wait in the outbox", error=str(error))
                self._mlflow_is_away = True
                return
            self._mlflow_is_away = False
            await self._parts.give_way(time.monotonic() - began)

    async def _take_in_or_singly(self, claimed: list[Claimed]) -> None:
        try:
            await self._take_in(claimed)
        except _AwayError:
            await self._claims.give_back(claimed)
            raise
        except Exception:
            log.exception("a batch could not be taken in; trying its traces one by one", traces=len(claimed))
            await self._take_in_singly(claimed)

    async def _take_in_singly(self, claimed: list[Claimed]) -> None:
        """Find out which traces of a batch failed it, so that one does not hold up the others.

        A trace is to blame only where MLflow does not take it and is well: while the database is away, or the key is
        wrong, all wait for however long that takes.
        """
        failed: list[tuple[Claimed, bool]] = []
        for position, each in enumerate(claimed):
            try:
                await self._take_in([each])
            except _AwayError:
                await self._claims.give_back(claimed[position:])
                await self._claims.postpone([(other, False) for other, _ in failed])
                raise
            except Exception as error:  # noqa: BLE001 - counted below, with what became of the trace
                log.error("a trace could not be taken in", trace_id=each.trace_id, error=str(error))
                failed.append((each, isinstance(error, _NotStoredError)))
        is_well = len(failed) < len(claimed) or await asyncio.to_thread(self._store.is_well)
        await self._claims.postpone([(each, is_well and not_stored) for each, not_stored in failed])

    async def _take_in(self, claimed: list[Claimed]) -> None:
        works, ended = await asyncio.to_thread(self._score_batch, claimed)
        async with self._pool.connection() as connection, connection.transaction():
            works = await self._still_wanted(connection, works)
            await self._save_scores(connection, works)
        await asyncio.to_thread(self._write_batch, works)
        async with self._pool.connection() as connection, connection.transaction():
            works = await self._still_wanted(connection, works)
            await self._settle(connection, works)
            for trace_id, (state, reason) in ended.items():
                await end_run(connection, trace_id, state, reason)
            await drop(connection, claimed)
        async with self._pool.connection() as connection:
            await connection.execute(_OVER, [[work.trace.session_id for work in works]])
        if any(work.judges for work in works):
            self._parts.wake()

    async def _still_wanted(self, connection: Connection, works: list[_Work]) -> list[_Work]:
        """Return the works whose runs were not forgotten since they were claimed."""
        gone = await erased(connection, [work.trace.trace_id for work in works])
        return [work for work in works if work.trace.trace_id not in gone]

    def _score_batch(self, claimed: list[Claimed]) -> tuple[list[_Work], dict[str, _Ended]]:
        """Decode and score a batch. Returns what can go on, and by trace id what became of the rest."""
        works: list[_Work] = []
        ended: dict[str, _Ended] = {}
        for each in claimed:
            if not each.payload:
                continue  # forgotten
            read = self._read(each)
            if isinstance(read, _Ended):
                ended[each.trace_id] = read
            else:
                works.append(read)
        for work in works:
            self._score(work)
        return works, ended

    def _read(self, claimed: Claimed) -> _Work | _Ended:
        """Decode a trace, with nothing in it that is not to go further."""
        trace_id = claimed.trace_id
        try:
            trace = decode(self._cipher.decrypt(claimed.payload, trace_id))
        except WrongKey:
            raise  # the evaluator is set up wrongly, the trace is not to blame: it waits
        except Exception as error:
            log.exception("a trace cannot be read", trace_id=trace_id)
            return _Ended("failed", f"unreadable: {type(error).__name__}")
        try:
            trace = self._parts.entities(trace) if self._parts.entities else trace
        except Exception as error:  # noqa: BLE001 - fails closed: whatever it was, the text stays in
            log.error("a trace was withheld", trace_id=trace_id, error=type(error).__name__)
            return _Ended("redaction_blocked", "named entities")
        try:
            entity = to_mlflow(trace, self._store.experiment_id, kept_tags(claimed.probability, claimed.reasons))
        except Exception as error:
            log.exception("a trace cannot be exported", trace_id=trace_id)
            return _Ended("failed", f"unreadable: {type(error).__name__}")
        return _Work(claimed, trace, entity)

    def _score(self, work: _Work) -> None:
        """Have scorers in plain code score a trace, and note who else is to, and who is not."""
        scorers = [live for live in self._parts.scorers() if not live.scores_conversations]
        trace_id, facts = work.trace.trace_id, TraceFacts([work.entity])
        in_code, work.judges, work.skips = select(scorers, self._share_key, facts, trace_id, self._parts.room())
        for each in in_code:
            task = trace_task(each.live, work.entity, work.trace.agent)
            outcome = task.run_within(self._parts.threads, self._settings.scorer_timeout_s)
            work.scores += scores_of(each, outcome, work.skips)

    async def _save_scores(self, connection: Connection, works: list[_Work]) -> None:
        before = await unlogged_scores(connection, [work.trace.trace_id for work in works])
        asked = {(score.trace_id, score.scorer) for score in before}
        said = [
            (work.trace.session_id, [each for each in work.scores if (each.trace_id, each.scorer) not in asked])
            for work in works
        ]
        stored = before + await save_scores(connection, self._parts.redactor, said)
        by_trace: dict[str, list[Score]] = {work.trace.trace_id: [] for work in works}
        for score in stored:
            by_trace[score.trace_id].append(score)
        for work in works:
            work.scores = by_trace[work.trace.trace_id]

    def _write_batch(self, works: list[_Work]) -> None:
        for work in works:
            root = work.entity.data.spans[0].span_id
            work.entity.info.assessments = [score.assessment(root) for score in work.scores]
        try:
            if works:
                self._store.write_traces([work.entity for work in works])
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            if is_away(error):
                raise _AwayError(reason) from error
            raise _NotStoredError(reason) from error

    async def _settle(self, connection: Connection, works: list[_Work]) -> None:
        """Store what follows from traces being in MLflow with their scores."""
        if not works:
            return
        await connection.execute(_HOLD_SESSIONS, [[work.trace.session_id for work in works]])
        await connection.execute(_REPROJECT, _written(works))
        await mark_logged(connection, [score for work in works for score in work.scores])
        scorers, rules = self._parts.scorers(), self._parts.rules()
        for work in works:
            trace_id = work.trace.trace_id
            await collect_failed(connection, work.scores, scorers, trace_id, rules)
            await enqueue(connection, trace_id, 0, trace_id, work.trace.agent, work.judges)
            await enqueue_failed(connection, trace_id, 0, trace_id, work.trace.agent, work.scores)
        await note_skips(connection, "runs", {work.trace.trace_id: work.skips for work in works})
        await connection.execute(_TURNS, _turns([work.trace for work in works], self._settings.quiet_period_s))
        await finish_runs(connection, [work.trace.trace_id for work in works if not work.judges])
        if self._settings.otlp_endpoint is not None:
            payloads = await asyncio.to_thread(lambda: [self._payload(work) for work in works])
            await connection.execute(_TO_OTLP, [[work.trace.trace_id for work in works], payloads])

    def _payload(self, work: _Work) -> bytes:
        """Return the trace as it waits for the second destination: as it came, unless names were taken out of it."""
        if self._parts.entities is None:
            return work.claimed.payload
        return self._cipher.encrypt(encode(work.trace), work.trace.trace_id)

    async def resume_pending(self) -> None:
        """Bring runs that are pending, and that nobody works on, to their end, as a crash can leave them.

        They end as what their scores say, or as lost if MLflow knows nothing of them, and when that was is noted.
        """
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_LEFT)
            left = [str(row[0]) for row in await cursor.fetchall()]
        known = await asyncio.to_thread(self._store.known, left) if left else set()
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(_LOST, [[trace_id for trace_id in left if trace_id not in known]])
            await finish_runs(connection, left)
            await connection.execute(_SWEPT, [left])


def _written(works: Sequence[_Work]) -> dict[str, Any]:
    """Return what MLflow was told of why the traces were kept."""
    return {
        "traces": [work.claimed.trace_id for work in works],
        "probabilities": [work.claimed.probability for work in works],
        "reasons": [Jsonb(work.claimed.reasons) for work in works],
    }


def _turns(traces: Sequence[Trace], quiet_s: float) -> dict[str, Any]:
    """Return the last turn of each session."""
    last: dict[str, Trace] = {}
    for trace in traces:
        known = last.setdefault(trace.session_id, trace)
        last[trace.session_id] = max(known, trace, key=lambda each: each.ended_ns)
    return {
        "sessions": sorted(last),  # two evaluators with turns of the same sessions lock them in one order
        "agents": [last[session].agent for session in sorted(last)],
        "ended": [last[session].ended_ns / 1e9 for session in sorted(last)],
        "quiet": quiet_s,
    }


# A promotion is either committed before the comparison, or finds these traces out of the outbox. In the order in which
# whoever promotes takes them, whatever the database's own order is.
_HOLD_SESSIONS = """
    SELECT FROM sampled_sessions WHERE session_id = ANY(%s) ORDER BY session_id COLLATE "C" FOR NO KEY UPDATE
"""
# Not only where it is projected by now: who is about to say so holds the row, and is waited for.
_REPROJECT = """
    UPDATE sampled_sessions AS session SET projected_at = NULL
    FROM unnest(%(traces)s::text[], %(probabilities)s::float8[], %(reasons)s::jsonb[])
        AS written (trace_id, probability, reasons) JOIN runs USING (trace_id)
    WHERE session.session_id = runs.session_id
      AND (runs.inclusion_probability <> written.probability OR runs.kept_because <> written.reasons)
"""
# Never as it was: by that, whoever scores the conversation right now sees that a turn was added.
_TURNS = """
    INSERT INTO conversations AS known (session_id, agent, last_turn_at, due_at)
    SELECT session_id, agent, to_timestamp(ended), to_timestamp(ended) + make_interval(secs => %(quiet)s)
    FROM unnest(%(sessions)s::text[], %(agents)s::text[], %(ended)s::float8[]) AS turn (session_id, agent, ended)
    ON CONFLICT (session_id) DO UPDATE SET
        agent = excluded.agent,
        last_turn_at = greatest(known.last_turn_at, excluded.last_turn_at),
        due_at = greatest(
            greatest(known.last_turn_at, excluded.last_turn_at) + make_interval(secs => %(quiet)s), now())
"""
_TO_OTLP = """
    INSERT INTO otlp_outbox (trace_id, payload) SELECT * FROM unnest(%s::text[], %s::bytea[])
    ON CONFLICT (trace_id) DO NOTHING
"""
# Looked at once the turns are committed: who ends a session makes its conversation due, if it is there to be seen.
_OVER = """
    UPDATE conversations SET due_at = now() FROM sessions
    WHERE conversations.session_id = sessions.session_id AND sessions.ended_at IS NOT NULL
      AND conversations.session_id = ANY(%s) AND due_at > now()
"""
_LEFT = """
    SELECT trace_id FROM runs
    WHERE state = 'pending' AND updated_at < now() - interval '30 seconds'
      AND NOT EXISTS (SELECT 1 FROM outbox WHERE outbox.trace_id = runs.trace_id)
      AND NOT EXISTS (SELECT 1 FROM scorings
                      WHERE scorings.trace_id = runs.trace_id AND turns = 0 AND scorings.state = 'pending')
    LIMIT 500
"""
_LOST = """
    UPDATE runs SET state = 'failed', reason = 'lost on the way to MLflow', updated_at = now()
    WHERE trace_id = ANY(%s) AND state = 'pending'
      AND NOT EXISTS (SELECT 1 FROM scores WHERE scores.trace_id = runs.trace_id AND scores.session_id IS NULL)
"""
_SWEPT = "UPDATE runs SET swept_at = now() WHERE trace_id = ANY(%s) AND state <> 'pending'"
