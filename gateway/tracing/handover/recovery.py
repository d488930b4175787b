"""What dead web processes left in this home: their spilled runs are stored, their counts are settled.

A web process looks when it starts and every minute from then on, one process a home at a time. Whatever ends it on the
way, the next look begins anew, and changes nothing of what was done: storing a run twice leaves one, a settled process
has no more missing, and the files go last.

Only what is in this home can be seen. Processes of other homes are settled by those that start there; until then their
counts stay as last reported.
"""

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import psycopg
import structlog
from procrastinate import App

from gateway.crypto import Cipher, WrongKey
from gateway.reloading import LiveSettings
from gateway.storage.database import Pool
from gateway.storage.erasure import ERASED_KEPT_DAYS
from gateway.storage.queue import DRAIN_OUTBOX, enqueue_once
from gateway.tracing.handover.outbox import BATCH_BYTES, BATCH_RUNS
from gateway.tracing.handover.settling import settle
from gateway.tracing.handover.spill import Spill
from gateway.tracing.handover.storing import FinishedRun, store_runs, transaction
from gateway.tracing.handover.tally import Left, find_left

log = structlog.get_logger(__name__)
T = TypeVar("T")

_INTERVAL_S = 60.0
_AGAIN_S = 5.0  # after a look that failed
_LOCK = "recovery.lock"


class Recovered(NamedTuple):
    """What one look has done."""

    processes: int
    """Dead processes whose files were found and settled."""
    runs: int
    """Runs stored from their spill files; some may have been stored before."""
    damaged: int
    """Damaged places in those files."""
    lost: int
    """Runs of theirs that are counted as dropped from now on."""


class _Stopping(Exception):
    """The process is to stop: the next one goes on."""


class Recovery:
    """Looks from time to time. One a web process, from `start` to `stop`."""

    def __init__(self, pool: Pool, queue: App, cipher: Cipher, live: LiveSettings, folder: Path, database: str):
        """Take the parts; ``cipher`` is that of the spill files, ``folder`` where they are, ``database`` ours."""
        self._pool = pool
        self._queue = queue
        self._cipher = cipher
        self._live = live
        self._folder = folder
        self._database = database
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="recovery")
        self._task: asyncio.Task[None] | None = None
        self._stopping = asyncio.Event()

    def start(self) -> None:
        """Start to look in the background."""
        self._task = asyncio.create_task(self._run(), name="recovery")

    async def stop(self, deadline_s: float) -> None:
        """Stop after the batch that is being stored, or wherever it is after ``deadline_s``."""
        self._stopping.set()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=deadline_s)
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        while not self._stopping.is_set():
            pause_s = _INTERVAL_S
            try:
                await self.look()
            except _Stopping:
                return
            except Exception as error:  # noqa: BLE001 - this task must outlive whatever it was
                # Most likely the database is away, which the queue says in errors of its own.
                log.warning("what dead processes left cannot be stored now; trying again later", error=repr(error))
                pause_s = _AGAIN_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()

    async def look(self) -> Recovered | None:
        """Store and settle what is there; ``None`` if another process is at it.

        Raises:
            psycopg.Error, TimeoutError: the database is away.
            OSError: the files cannot be read.
        """
        total = Recovered(0, 0, 0, 0)
        if not await self._in_thread(self._folder.is_dir):
            return total
        async with self._alone() as alone:
            if not alone:
                return None
            remaining = iter(find_left(self._folder, self._database))
            while left := await self._in_thread(lambda: next(remaining, None)):
                try:
                    done = await self._settle(left)
                except WrongKey as error:
                    log.error("the traces that a dead process left cannot be read", path=str(left.path), why=str(error))
                    continue
                total = Recovered(*map(sum, zip(total, done, strict=True)))
        return total

    @contextlib.asynccontextmanager
    async def _alone(self) -> AsyncIterator[bool]:
        lock = contextlib.ExitStack()
        try:
            yield await self._in_thread(lambda: lock.enter_context(_locked(self._folder / _LOCK)))
        finally:
            await self._in_thread(lock.close)

    async def _settle(self, left: Left) -> Recovered:
        settled = False
        spill = await self._in_thread(lambda: Spill(left.spill_path, self._cipher, max_bytes=0))
        try:
            runs, damaged = await self._drain(spill)
            started_ns = left.owner.started_ns if left.owner else None
            async with transaction(self._pool) as connection:
                lost = await settle(connection, left.process_id, left.counts, started_ns=started_ns)
            settled = True
        finally:
            # The spill file first: without its tally nobody would look for it.
            await self._in_thread(partial(spill.close, delete=settled))
            await self._in_thread(partial(left.release, delete=settled))
        log.info("settled a process that is gone", process_id=left.process_id, runs=runs, damaged=damaged, lost=lost)
        return Recovered(1, runs, damaged, sum(lost.values()))

    async def _drain(self, spill: Spill) -> tuple[int, int]:
        """Store what is in a spill file; return the runs, and the damaged places."""
        stored = damaged = 0
        while spill.waiting_bytes:
            if self._stopping.is_set():
                raise _Stopping
            batch = await self._in_thread(lambda: spill.read(BATCH_RUNS, BATCH_BYTES))
            if await self._store(batch.runs):
                await enqueue_once(self._queue, DRAIN_OUTBOX)
            await self._in_thread(partial(spill.advance, batch))
            stored += len(batch.runs)
            damaged += batch.damaged
        return stored, damaged

    async def _store(self, runs: Sequence[FinishedRun]) -> bool:
        """Store a batch; return whether there is work for evaluators. What the database refuses is passed over.

        So is what has lain there for so long that nobody would know if its session was forgotten meanwhile; it counts
        as what the crash took.
        """
        oldest_ns = time.time_ns() - ERASED_KEPT_DAYS * 86_400 * 10**9
        runs = [run for run in runs if run.started_ns > oldest_ns]
        try:
            async with transaction(self._pool) as connection:
                return await store_runs(connection, runs, hold=self._live.now.hold_s > 0, pin=self._live.now.tracing)
        except psycopg.DataError as error:
            if len(runs) <= 1:
                log.error("the database refuses a run", error=type(error).__name__)
                return False
        return any([await self._store([run]) for run in runs])

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the lock of that file, as long as no other process does; yield whether it is ours."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
