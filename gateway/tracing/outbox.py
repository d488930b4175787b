"""The hand-over of finished runs to Postgres: a bounded buffer, emptied in batches by one background task.

Guarantee: a run that was accepted into the buffer reaches the database, unless the process dies first (``kill -9``
loses what the last flush interval brought) or the database stays away until the buffer overflows; then it is counted
as dropped. Order: of acceptance. The event loop only appends to a list; assembling, redaction and encryption are done
in a thread.
"""

import asyncio
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import structlog
from procrastinate import App

from gateway.crypto import Cipher
from gateway.storage.database import Pool
from gateway.storage.erasure import BESIDE_NO_ERASURE, user_hash
from gateway.storage.queue import DRAIN_OUTBOX, enqueue_once
from gateway.tracing.capture import RunCapture, assemble
from gateway.tracing.ledger import State
from gateway.tracing.redaction import Redactor
from gateway.tracing.spans import Trace, encode

log = structlog.get_logger(__name__)

_BATCH = 200  # runs a transaction: some 10 ms of work in the thread, so that a flush never takes long
_RETRY_S = 1.0  # how soon to try again when the database was away


class Prepared(NamedTuple):
    """A run as it is stored: facts for the ledger, and its trace unless there is none to keep."""

    trace: Trace
    state: State
    payload: bytes | None


class OutboxWriter:
    """Owns the buffer and the task that empties it. One a web process, from `start` to `stop`."""

    def __init__(
        self, pool: Pool, queue: App, redactor: Redactor, cipher: Cipher, *, flush_s: float, buffer_count: int
    ):
        self._pool = pool
        self._queue = queue
        self._redactor = redactor
        self._cipher = cipher
        self._flush_s = flush_s
        self._buffer_count = buffer_count
        self._buffer: deque[RunCapture] = deque()
        self._drops: Counter[tuple[str, str]] = Counter()
        self._wake = asyncio.Event()
        self._stopping = False
        self._stopped = False
        # Of its own: tools that hang in the event loop's threads must not hold up the ledger.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outbox")
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Finished runs that are not in the database yet."""
        return len(self._buffer)

    def offer(self, run: RunCapture) -> bool:
        """Take a finished run without waiting; ``False``, and counted or logged, if it cannot be kept."""
        if self._stopped:
            log.error("a trace was lost: its run ended after the hand-over had stopped", trace_id=run.trace.trace_id)
            return False
        if len(self._buffer) >= self._buffer_count:
            self._drops[run.trace.agent, "buffer_full"] += 1
            return False
        self._buffer.append(run)
        self._wake.set()
        return True

    def start(self) -> None:
        """Start to flush in the background."""
        self._task = asyncio.create_task(self._run(), name="outbox-writer")

    async def stop(self, deadline_s: float) -> None:
        """Hand over what is left; what cannot be within ``deadline_s`` is logged with its count and lost."""
        self._stopping = True
        self._wake.set()
        if self._task is None:
            return
        try:
            await asyncio.wait_for(self._task, deadline_s)
        except TimeoutError:
            log.error("traces lost at shutdown: the database did not take them in time", lost=len(self._buffer))
        finally:
            self._stopped = True
            self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        while True:
            await self._wake.wait()
            if not self._stopping:
                await asyncio.sleep(self._flush_s)  # lets a batch gather, and bounds what a crash can lose
            self._wake.clear()
            try:
                while self._buffer or self._drops:
                    await self._flush()
            except Exception as error:  # noqa: BLE001 - see below
                # Whatever it was, most likely the database is away: this task must outlive it. The runs are still in
                # the buffer, since nothing is taken out before it is committed.
                log.warning("hand-over failed, traces wait in memory", waiting=len(self._buffer), error=repr(error))
                self._wake.set()
                await asyncio.sleep(_RETRY_S)
            if self._stopping and not self._buffer:
                return

    async def _flush(self) -> None:
        batch = [self._buffer[index] for index in range(min(_BATCH, len(self._buffer)))]
        drops = dict(self._drops)
        prepared = await asyncio.get_running_loop().run_in_executor(self._thread, self._prepare, batch)
        await self._store(prepared, drops)
        for _ in batch:
            self._buffer.popleft()
        self._drops.subtract(drops)
        self._drops = +self._drops
        if any(item.payload for item in prepared):
            await enqueue_once(self._queue, DRAIN_OUTBOX)

    def _prepare(self, batch: list[RunCapture]) -> list[Prepared]:
        """Assemble, redact and encrypt; what the redactor fails on is withheld. Runs in a thread."""
        prepared = []
        for run in batch:
            trace = run.trace
            if not run.sampled:
                prepared.append(Prepared(trace, "sampled_out", None))
                continue
            try:
                encoded = encode(self._redactor.trace(assemble(run)))
                payload = self._cipher.encrypt(encoded, trace.trace_id)
                prepared.append(Prepared(trace, "pending", payload))
            except Exception as error:  # noqa: BLE001 - fails closed: whatever it was, the text stays in
                log.error("a trace was withheld", trace_id=trace.trace_id, error=type(error).__name__)
                prepared.append(Prepared(trace, "redaction_blocked", None))
        return prepared

    async def _store(self, prepared: list[Prepared], drops: dict[tuple[str, str], int]) -> None:
        """Write a batch in one transaction. A batch that was written before its commit was heard of stays single."""
        async with self._pool.connection() as connection, connection.transaction(), connection.cursor() as cursor:
            if prepared:
                await cursor.execute(BESIDE_NO_ERASURE)
                await cursor.executemany(_INSERT_RUN, [_run_row(item) for item in prepared])
                traces = [(item.payload, item.trace.trace_id) for item in prepared if item.payload]
                await cursor.executemany(_INSERT_OUTBOX, traces)
            if drops:
                rows = [(agent, reason, count) for (agent, reason), count in drops.items()]
                await cursor.executemany("INSERT INTO run_drops (agent, reason, count) VALUES (%s, %s, %s)", rows)


# A run that began before its session or its user was forgotten is counted, and nothing else of it is kept.
_INSERT_RUN = """
    INSERT INTO runs (trace_id, agent, agent_version, status, offline, inclusion_probability, started_at, duration_ms,
                      key_id, session_id, user_id, state)
    SELECT %(trace)s, %(agent)s, %(version)s, %(status)s, %(offline)s, %(probability)s, started_at, %(duration_ms)s,
           %(key)s, CASE WHEN erased THEN '' ELSE %(session)s END, CASE WHEN NOT erased THEN %(user)s END,
           CASE WHEN erased THEN 'erased' ELSE %(state)s END
    FROM to_timestamp(%(started_s)s) AS started_at, LATERAL (
        SELECT EXISTS (SELECT 1 FROM erased_sessions WHERE session_id = %(session)s AND erased_at > started_at)
            OR EXISTS (SELECT 1 FROM erasures WHERE user_hash = %(user_hash)s AND requested_at > started_at
                         AND (key_id IS NULL OR key_id = %(key)s)) AS erased) AS forgotten
    ON CONFLICT (trace_id) DO NOTHING
"""
_INSERT_OUTBOX = """
    INSERT INTO outbox (payload, trace_id) SELECT %s, trace_id FROM runs WHERE trace_id = %s AND state = 'pending'
    ON CONFLICT (trace_id) DO NOTHING
"""


def _run_row(item: Prepared) -> dict[str, object]:
    trace = item.trace
    return {
        "trace": trace.trace_id,
        "agent": trace.agent,
        "version": trace.agent_version,
        "status": "error" if trace.error else "ok",
        "offline": trace.offline,
        "probability": trace.inclusion_probability,
        "started_s": trace.started_ns / 1e9,
        "duration_ms": trace.duration_ms,
        "key": trace.key_id,
        "session": trace.session_id,
        "user": trace.user_id,
        "user_hash": user_hash(trace.user_id),
        "state": item.state,
    }
