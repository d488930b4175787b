"""The hand-over of finished runs to Postgres: bounded buffers, and two background tasks that empty them.

The way of a run: `begin` counts it, `offer` appends it to a list, and that is all the event loop does. A thread
prepares it (`gateway.tracing.handover.preparing`); as bytes it waits in memory, and every `trace_flush_s` what has
gathered is stored in one transaction. Order: of the runs' ends.

What happens when the database is away: after the first hand-over that fails, everything that waits goes to the spill
file, as does what comes until that is empty again. What does not fit there waits in memory, and what does not fit there
either is dropped and counted.

Guarantees: a run that was begun is stored once, or counted as dropped. ``kill -9`` takes the runs under way and what
the last flush interval brought (what was not stored by a database that has just gone away, for a second or so, too);
SIGTERM takes nothing: what the database does not take in time waits in the spill file for the next start
(`gateway.tracing.handover.recovery`). A commit that was not heard of is repeated, which changes nothing.
"""

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

import psycopg
import structlog
from procrastinate import App

from gateway.crypto import Cipher
from gateway.reloading import LiveSettings
from gateway.storage.database import Pool
from gateway.storage.queue import DRAIN_OUTBOX, enqueue_once
from gateway.tracing.capture.recording import RunCapture
from gateway.tracing.handover.preparing import Preparer
from gateway.tracing.handover.settling import settle, store_counts
from gateway.tracing.handover.spill import Batch, Spill
from gateway.tracing.handover.storing import FinishedRun, store_runs, transaction
from gateway.tracing.handover.tally import SPILL_SUFFIX, Counts, Owner, Tally, stem
from gateway.tracing.sampling import Draw

log = structlog.get_logger(__name__)
T = TypeVar("T")

BATCH_RUNS = 200
"""Runs a transaction at the most: some 50 ms of work for the database."""
BATCH_BYTES = 8_000_000
"""Bytes of payload a transaction at the most, roughly."""

_PREPARED_AT_ONCE = 20  # runs a call into the thread: some 10 ms of work, so that the first need not wait for all
_PAUSE_S = 1e-4  # between two runs in the thread
_RETRY_S, _LONGEST_RETRY_S = 0.05, 1.0  # after a hand-over that failed; doubles each time
_LAST_TRIES = 2  # when the process is to stop
_SETTLE_S = 3.0  # beyond the deadline of `stop`: what it does can be done by the next start as well
_REPORT_S = 1.0  # how often counts are stored while nothing else is
_WAKE_S = 0.2  # between two looks whether evaluators are to be woken: one of theirs takes in what came meanwhile
_FRAME_BYTES = 500  # what a run takes in memory beside its payload
_CAPTURED_BYTES = 100_000  # what a run may take that is not prepared: a long conversation, whole, nobody measures it


class OutboxStatistics(NamedTuple):
    """What the hand-over is at. Everything is of this process, since its start."""

    waiting_runs: int
    """Runs that have ended and are not in the database yet, wherever they wait."""
    waiting_bytes: int
    """Bytes of those that wait in memory, prepared. Those that are not prepared yet have no known size."""
    spilled_runs: int
    """Runs that wait in the spill file."""
    spilled_bytes: int
    """Bytes of the spill file that are not stored yet."""
    dropped_runs: int
    """Runs of which nothing could be kept."""
    handed_over_runs: int
    """Runs that were stored."""
    handed_over_s_ago: float | None
    """Seconds since the last hand-over that was heard of, be it of counts alone; ``None``: there was none."""
    oldest_waiting_s: float
    """Seconds since the end of the run that waits the longest; 0.0 if none waits."""


class OutboxWriter:
    """Owns the buffers and the tasks that empty them. One a web process, from `start` to `stop`."""

    def __init__(self, pool: Pool, queue: App, preparer: Preparer, tally: Tally, spill: Spill, live: LiveSettings):
        """Take the parts; ``tally`` and ``spill`` are this process' own, and closed by `stop`."""
        self._pool = pool
        self._queue = queue
        self._preparer = preparer
        self._tally = tally
        self._spill = spill
        self._live = live
        self._captured: deque[tuple[RunCapture, Draw]] = deque()
        self._preparing: list[tuple[RunCapture, Draw]] = []
        self._memory: deque[FinishedRun] = deque()
        self._memory_bytes = 0
        self._recorded: Counter[str] = Counter()
        self._reported: dict[str, Counts] = {}
        self._heard_at: float | None = None
        self._spill_ended_s = 0.0
        self._work_for_evaluators = False
        self._woken_at = 0.0
        self._offered = asyncio.Event()
        self._prepared = asyncio.Event()
        self._stopping = False
        self._is_prepared = False
        self._stopped = False
        # Of its own: tools that hang in the event loop's threads must not hold up the ledger.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def waiting(self) -> int:
        """Finished runs that are not in the database yet."""
        return len(self._captured) + len(self._preparing) + len(self._memory) + self._spill.waiting_runs

    def begin(self, agent: str) -> None:
        """Count a run of that agent as served, from here on."""
        self._tally.begin(agent)

    def offer(self, run: RunCapture, draw: Draw) -> None:
        """Take a run that was begun and has ended, without waiting; what cannot be kept is counted."""
        if self._stopped:
            log.error("a trace was lost: its run ended after the hand-over had stopped", trace_id=run.trace.trace_id)
        elif len(self._captured) >= self._captured_count():
            self._tally.drop(run.trace.agent, "buffer_full")
        else:
            self._captured.append((run, draw))
            self._offered.set()

    def _captured_count(self) -> int:
        """Return how many runs may wait to be prepared: of these the bytes are not known, so that few must do."""
        return min(self._live.now.trace_buffer_count, max(1, self._live.now.trace_buffer_bytes // _CAPTURED_BYTES))

    def statistics(self) -> OutboxStatistics:
        """Return what the hand-over is at."""
        ended = [run.trace.ended_ns / 1e9 for run, _ in [*self._preparing[:1], *list(self._captured)[:1]]]
        ended += [_ended_s(run) for run in list(self._memory)[:1]]
        ended += [self._spill_ended_s] if self._spill.waiting_bytes else []
        return OutboxStatistics(
            waiting_runs=self.waiting,
            waiting_bytes=self._memory_bytes,
            spilled_runs=self._spill.waiting_runs,
            spilled_bytes=self._spill.waiting_bytes,
            dropped_runs=sum(each.dropped for each in self._tally.counts().values()),
            handed_over_runs=self._recorded.total(),
            handed_over_s_ago=None if self._heard_at is None else time.monotonic() - self._heard_at,
            oldest_waiting_s=max(0.0, time.time() - min(ended)) if ended else 0.0,
        )

    def start(self) -> None:
        """Start to prepare and to store in the background."""
        self._tasks = [
            asyncio.create_task(self._prepare_all(), name="outbox-prepare"),
            asyncio.create_task(self._store_all(), name="outbox-store"),
        ]

    async def stop(self, deadline_s: float) -> None:
        """Hand over what is left; what the database does not take within ``deadline_s`` goes to the spill file."""
        self._stopping = True
        self._offered.set()
        self._prepared.set()
        _, late = await asyncio.wait(self._tasks, timeout=deadline_s) if self._tasks else (None, set())
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        self._stopped = True
        settled = await self._settle() if not self.waiting else await self._save()
        await self._in_thread(lambda: self._spill.close(delete=settled))
        await self._in_thread(lambda: self._tally.close(delete=settled))
        self._thread.shutdown(wait=False)

    # Preparing

    async def _prepare_all(self) -> None:
        while True:
            await self._offered.wait()
            if not self._stopping:
                await asyncio.sleep(self._live.now.trace_flush_s)  # lets a batch gather, bounds what a crash can lose
            self._offered.clear()
            while self._captured:
                self._preparing = [self._captured.popleft() for _ in range(min(_PREPARED_AT_ONCE, len(self._captured)))]
                try:
                    await self._keep(await self._in_thread(lambda: self._prepare(self._preparing)))
                except Exception as error:  # noqa: BLE001 - a mistake of ours, which the counters show the cost of
                    log.error(
                        "runs were lost before they were stored", lost=len(self._preparing), error=repr(type(error))
                    )
                self._preparing = []
                self._prepared.set()
            if self._stopping:
                self._is_prepared = True
                self._prepared.set()
                return

    def _prepare(self, captured: Sequence[tuple[RunCapture, Draw]]) -> list[FinishedRun]:
        prepared = []
        for run, draw in captured:
            prepared.append(self._preparer.prepare(run, draw))
            # Gives the event loop its turn: else it would have to ask for the interpreter lock, for 5 ms each time.
            time.sleep(_PAUSE_S)
        return prepared

    async def _keep(self, runs: Sequence[FinishedRun]) -> None:
        """Have prepared runs wait: in memory, in the spill file if others wait there or memory is full, or nowhere."""
        waiting = deque(runs)
        while waiting and not self._spill.waiting_bytes and self._fits(waiting[0]):
            self._remember(waiting.popleft())
        if not waiting:
            return
        spilled = await self._append(list(waiting))
        for run in list(waiting)[spilled:]:
            if self._fits(run):
                self._remember(run)  # ahead of what is in the spill file: rather out of order than lost
            else:
                self._tally.drop(run.agent, "buffer_full")

    def _fits(self, run: FinishedRun) -> bool:
        now = self._live.now
        in_bytes = self._memory_bytes + _size(run) <= now.trace_buffer_bytes
        return in_bytes and len(self._memory) < now.trace_buffer_count

    def _remember(self, run: FinishedRun) -> None:
        self._memory.append(run)
        self._memory_bytes += _size(run)

    def _forget(self, count: int) -> None:
        """Take the first runs out of memory."""
        for _ in range(count):
            self._memory_bytes -= _size(self._memory.popleft())

    async def _append(self, runs: Sequence[FinishedRun]) -> int:
        if not self._spill.waiting_bytes:
            self._spill_ended_s = _ended_s(runs[0])
        return await self._in_thread(lambda: self._spill.append(runs))

    async def _spill_memory(self) -> None:
        """Move what waits in memory to the spill file, as much as fits there."""
        while batch := self._first_in_memory():
            spilled = await self._append(batch)
            self._forget(spilled)
            if spilled < len(batch):
                return

    # Storing

    async def _store_all(self) -> None:
        failures = 0
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_WAKE_S if self._work_for_evaluators else _REPORT_S):
                    await self._prepared.wait()
            self._prepared.clear()
            try:
                while self._memory or self._spill.waiting_bytes or self._is_report_due():
                    await self._store_some()
                failures = 0
            except Exception as error:  # noqa: BLE001 - see below
                # Whatever it was, most likely the database is away: this task must outlive it. Nothing is taken out
                # of where it waits before it is committed.
                failures += 1
                await self._spill_memory()
                log.warning("hand-over failed; traces wait", waiting=self.waiting, error=repr(error))
                if self._stopping and failures >= _LAST_TRIES:
                    return
                await asyncio.sleep(min(_RETRY_S * 2 ** (failures - 1), _LONGEST_RETRY_S))
                self._prepared.set()
                continue
            await self._wake_evaluators()
            if self._is_prepared and not self._memory:
                return

    def _first_in_memory(self) -> list[FinishedRun]:
        """Return the next batch that waits in memory, which stays there."""
        batch: list[FinishedRun] = []
        size = 0
        for run in self._memory:
            size += _size(run)
            if batch and (size > BATCH_BYTES or len(batch) == BATCH_RUNS):
                break
            batch.append(run)
        return batch

    async def _store_some(self) -> None:
        """Store the next batch, or the counts alone if nothing waits."""
        if batch := self._first_in_memory():
            await self._store(batch)
            self._forget(len(batch))
        elif self._spill.waiting_bytes:
            spilled: Batch = await self._in_thread(lambda: self._spill.read(BATCH_RUNS, BATCH_BYTES))
            await self._store(spilled.runs)
            await self._in_thread(lambda: self._spill.advance(spilled))
            if spilled.runs:
                self._spill_ended_s = _ended_s(spilled.runs[-1])
        else:
            await self._store([])

    async def _store(self, runs: Sequence[FinishedRun]) -> None:
        """Store a batch and the counts, in one transaction; what the database refuses does not hold up the others."""
        try:
            await self._commit(runs)
        except psycopg.DataError as error:
            if len(runs) == 1:
                log.error("the database refuses a run", trace_id=runs[0].trace_id, error=type(error).__name__)
                self._tally.drop(runs[0].agent, "refused")
            elif not runs:
                raise
            for run in runs if len(runs) > 1 else ():
                await self._store([run])

    async def _commit(self, runs: Sequence[FinishedRun]) -> None:
        recorded = self._recorded + Counter(run.agent for run in runs)
        counts = self._tally.counts()
        touched = {run.agent for run in runs}
        changed = {name: each for name, each in counts.items() if name in touched or each != self._reported.get(name)}
        async with transaction(self._pool) as connection:
            wanted = await store_runs(connection, runs, hold=self._live.now.hold_s > 0, pin=self._live.now.tracing)
            await store_counts(connection, self._tally.owner.process_id, changed, recorded)
        self._recorded, self._reported, self._heard_at = recorded, counts, time.monotonic()
        self._work_for_evaluators |= wanted

    def _is_report_due(self) -> bool:
        heard_s_ago = time.monotonic() - (self._heard_at or 0.0)
        return heard_s_ago >= _REPORT_S and self._tally.counts() != self._reported

    async def _wake_evaluators(self) -> None:
        woken_s_ago = time.monotonic() - self._woken_at
        if self._work_for_evaluators and (woken_s_ago >= _WAKE_S or self._stopping):
            self._woken_at = time.monotonic()
            try:
                await enqueue_once(self._queue, DRAIN_OUTBOX)
            except Exception as error:  # noqa: BLE001 - the runs are stored; the next round tries again
                log.warning("evaluators could not be told of new traces", error=repr(error))
            else:
                self._work_for_evaluators = False

    # Stopping

    async def _settle(self) -> bool:
        """Store the final counts, once everything else is stored; return whether that worked."""
        owner = self._tally.owner
        try:
            async with transaction(self._pool, _SETTLE_S) as connection:
                counts = self._tally.counts()
                lost = await settle(connection, owner.process_id, counts, started_ns=owner.started_ns)
        except Exception as error:  # noqa: BLE001 - the next start does it
            log.warning("the final counts could not be stored; the next start does it", error=repr(error))
            return False
        if lost:
            log.error("runs were lost: they did not end before the process", lost=lost)
        return True

    async def _save(self) -> bool:
        """Write everything that waits to the spill file; ``False``: there is something left to be settled."""
        captured, self._captured = [*self._preparing, *self._captured], deque()
        self._preparing = []
        await self._keep(await self._in_thread(lambda: self._prepare(captured)))
        await self._spill_memory()
        await self._in_thread(self._spill.sync)
        if self._memory:
            log.error("traces lost at shutdown: neither the database nor the disk took them", lost=len(self._memory))
        log.warning("traces wait in the spill file for the next start", waiting=self._spill.waiting_runs)
        return False

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def open_files(folder: Path, owner: Owner, cipher: Cipher, *, spill_max_bytes: int) -> tuple[Tally, Spill]:
    """Return counters and spill file of a process that starts; where there is no disk to have them, it runs without."""
    try:
        tally = Tally.create(folder, owner)
    except OSError as error:
        log.warning("no counts nor traces outlive this process: its folder cannot be written", error=repr(error))
        tally = Tally.in_memory(owner)
        spill_max_bytes = 0  # by its tally a spill file is found: nobody would ever store what is in this one
    path = folder / f"{stem(owner.database, owner.process_id)}{SPILL_SUFFIX}"
    return tally, Spill(path, cipher, max_bytes=spill_max_bytes)


def _size(run: FinishedRun) -> int:
    return len(run.payload or b"") + _FRAME_BYTES


def _ended_s(run: FinishedRun) -> float:
    """Return when a run ended, seconds since the epoch."""
    return run.started_ns / 1e9 + run.duration_ms / 1e3
