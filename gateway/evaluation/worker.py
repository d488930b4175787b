"""The evaluator process.

It is woken by jobs (Procrastinate, LISTEN/NOTIFY) and looks around by itself twice a second, so that a lost wake-up
costs half a second, not a score. Guarantee: at least once, with the effect of once. Any number of evaluators may run.
"""

import asyncio
import gc
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import psycopg
import structlog
from mlflow.store.db.utils import _get_latest_schema_revision
from procrastinate import App, PsycopgConnector, RetryStrategy
from procrastinate.exceptions import ConnectorException, UniqueViolation
from procrastinate.jobs import Status

from gateway.crypto import Keys, load_keys
from gateway.evaluation.catalog import ScorerCatalog
from gateway.evaluation.claims import PRESENCE_LOCK
from gateway.evaluation.datasets.rules import Rules
from gateway.evaluation.otlp import OtlpSender
from gateway.evaluation.parts import Ground, judge_calls, put_together
from gateway.evaluation.store import MlflowStore, configure_mlflow, is_away, tracking_uri
from gateway.reloading import LiveSettings
from gateway.settings import Settings
from gateway.storage.database import Pool, database_url, open_pool
from gateway.storage.queue import (
    DRAIN_OUTBOX,
    ERASE,
    ERASING_QUEUE,
    JUDGING_QUEUE,
    SCORE_CONVERSATION,
    TRACES_QUEUE,
    enqueue_once,
)

log = structlog.get_logger(__name__)

_LOOK_S = 0.5  # how often to look for what nobody told us of
_HEARTBEAT_S = 2.0
_STALLED_AFTER_S = 10.0  # five missed heartbeats: the worker is dead, its jobs are free
_MLFLOW_WAIT_NOTE_S = 15.0
_MLFLOW_PAUSE_S = 2.0
_ERASE_RETRY = RetryStrategy(wait=10)  # for as long as MLflow is away: somebody was promised that it is done
_WAITING = "SELECT EXISTS (SELECT 1 FROM outbox WHERE NOT held AND retry_at <= now())"


class Evaluator:
    """Everything one evaluator process does, from `run` until it is cancelled."""

    def __init__(self, live: LiveSettings, keys: Keys, pool: Pool, store: MlflowStore, catalog: ScorerCatalog):
        self._live = live
        self._settings = live.now
        self._keys = keys
        self._pool = pool
        self._store = store
        self._catalog = catalog
        self._queue = App(connector=PsycopgConnector())

    async def run(self) -> None:
        """Work until cancelled, then finish the running jobs within the grace period."""
        settings = self._settings
        async with self._presence() as (presence, evaluator_id), judge_calls(settings, self._pool) as (relay, budget):
            await self._queue.open_async(self._pool)
            ground = Ground(
                settings,
                self._keys,
                self._pool,
                self._queue,
                self._store,
                evaluator_id,
                lambda: self._catalog.now,
                self._rules,
            )
            self._parts = put_together(ground, relay, budget)
            otlp = OtlpSender(settings, self._keys, self._pool)
            self._register_tasks()
            log.info("evaluator ready", evaluator_id=evaluator_id, scorers=[live.name for live in self._catalog.now])
            async with asyncio.TaskGroup() as group:
                group.create_task(self._beat(presence, evaluator_id), name="heartbeat")
                group.create_task(self._look_around(), name="look-around")
                group.create_task(self._feed_datasets(), name="datasets")
                group.create_task(self._catalog.watch(), name="catalog")
                group.create_task(budget.run(), name="budget")
                group.create_task(self._parts.pressure.run(), name="pressure")
                group.create_task(self._parts.worker.run(), name="scorings")
                group.create_task(otlp.run(), name="otlp")
                group.create_task(self._work(TRACES_QUEUE, concurrency=1), name="traces")
                group.create_task(self._work(JUDGING_QUEUE, settings.judge_concurrency), name="judging")
                group.create_task(self._work(ERASING_QUEUE, concurrency=1), name="erasing")

    def _rules(self) -> Rules:
        """Return the rules of the datasets as they are now."""
        return self._live.now.datasets

    @asynccontextmanager
    async def _presence(self) -> AsyncIterator[tuple[psycopg.AsyncConnection[tuple[object, ...]], int]]:
        """Register this evaluator and hold its advisory lock: Postgres frees it when the process is gone."""
        url = database_url(self._settings)
        async with await psycopg.AsyncConnection.connect(
            url, autocommit=True, application_name="gateway-evaluator", keepalives_idle=5, keepalives_interval=2
        ) as connection:
            cursor = await connection.execute(
                "INSERT INTO evaluators (host, pid) VALUES (%s, %s) RETURNING evaluator_id",
                [socket.gethostname(), os.getpid()],
            )
            row = await cursor.fetchone()
            evaluator_id = int(row[0]) if row else 0
            await connection.execute("SELECT pg_advisory_lock(%s, %s)", [PRESENCE_LOCK, evaluator_id])
            await connection.execute("DELETE FROM evaluators WHERE heartbeat_at < now() - interval '1 day'")
            yield connection, evaluator_id

    async def _beat(self, connection: psycopg.AsyncConnection[tuple[object, ...]], evaluator_id: int) -> None:
        """Show that we are alive. If the connection is lost our claims are void, so the process ends."""
        while True:
            await connection.execute(
                "UPDATE evaluators SET heartbeat_at = now() WHERE evaluator_id = %s", [evaluator_id]
            )
            await asyncio.sleep(_HEARTBEAT_S)

    async def _work(self, queue: str, concurrency: int) -> None:
        await self._queue.run_worker_async(
            queues=[queue],
            name=queue,
            concurrency=concurrency,
            fetch_job_polling_interval=2.0,
            delete_jobs="always",  # the runs' states say what became of the work; finished jobs only pile up
            install_signal_handlers=False,
            shutdown_graceful_timeout=self._settings.shutdown_grace_s,
            update_heartbeat_interval=_HEARTBEAT_S,
            stalled_worker_timeout=_STALLED_AFTER_S,
        )
        # It stops by itself when its listener fails; an evaluator that only looks alive would be worse than none.
        raise RuntimeError(f"the worker of queue {queue} stopped by itself; its log line says why")

    async def _look_around(self) -> None:
        """Find work that nobody told us of. Not by jobs: under load those would wait behind what they are to free."""
        often = (
            self._wake_up,
            self._parts.projection.project,
            self._parts.conversations.enqueue_due,
            self._parts.erasure.enqueue_open,
        )
        seldom = (self._retry_stalled, self._parts.intake.resume_pending)
        looked_after_dead = 0.0
        while True:
            if time.monotonic() - looked_after_dead > _STALLED_AFTER_S:
                looked_after_dead = time.monotonic()
                await self._look_for(*seldom)
            await self._look_for(*often)
            await asyncio.sleep(_LOOK_S)

    async def _feed_datasets(self) -> None:
        """Feed the datasets beside everything else: a merge, or a look at what people said, may take seconds."""
        while True:
            await self._look_for(self._parts.datasets.merge_waiting)
            await asyncio.sleep(_LOOK_S)

    async def _look_for(self, *steps: Callable[[], Awaitable[object]]) -> None:
        """Take the steps, each whatever became of the others: one may want an MLflow that is away, another none."""
        for step in steps:
            try:
                await step()
            except Exception:
                log.exception("looking around failed; trying again", step=step.__name__)

    async def _wake_up(self) -> None:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_WAITING)
            if await cursor.fetchone() == (True,):
                await enqueue_once(self._queue, DRAIN_OUTBOX)

    def _register_tasks(self) -> None:
        """Give the names in `gateway.storage.queue` their code."""
        queue = self._queue

        @queue.task(name=DRAIN_OUTBOX.task, queue=DRAIN_OUTBOX.queue)
        async def drain_outbox() -> None:
            await self._parts.intake.drain()

        @queue.task(name=SCORE_CONVERSATION.task, queue=SCORE_CONVERSATION.queue)
        async def score_conversation(session_id: str) -> None:
            await self._parts.conversations.score(session_id)

        @queue.task(name=ERASE.task, queue=ERASE.queue, retry=_ERASE_RETRY)
        async def erase(erasure_id: str) -> None:
            await self._parts.erasure.erase(erasure_id)

    async def _retry_stalled(self) -> None:
        """Free the jobs of workers that died: Procrastinate notices them, and leaves them to us."""
        manager = self._queue.job_manager
        for job in await manager.get_stalled_jobs(seconds_since_heartbeat=_STALLED_AFTER_S):
            log.warning("taking over a job of a dead worker", job=job.call_string)
            try:
                await manager.retry_job(job)
            except UniqueViolation:  # the same work waits already; this one only stands in its way
                await manager.finish_job(job, Status.FAILED, delete_job=True)
            except ConnectorException as error:  # another evaluator was faster
                log.info("a job of a dead worker was taken over already", job=job.call_string, error=repr(error))


async def run_evaluator(settings: Settings) -> None:
    """Run the evaluator until SIGTERM or SIGINT."""
    url = database_url(settings)
    uri = tracking_uri(settings, url)
    configure_mlflow(settings, uri)
    live = LiveSettings(settings)
    catalog = ScorerCatalog(live)
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, task.cancel if task else loop.stop)
    _settle_memory()
    os.nice(settings.evaluator_niceness)
    try:
        if settings.runs_own_mlflow:
            await _await_mlflow_schema(uri)
        store = await _open_store(uri, settings.mlflow_experiment)
        # Beside its own work the pool serves three listeners, and each judge a moment.
        pool = open_pool(url, max_size=settings.database_pool_size + settings.judge_concurrency, name="evaluator")
        async with pool:
            await Evaluator(live, load_keys(settings), pool, store, catalog).run()
    except asyncio.CancelledError:
        log.info("evaluator stopped")


def _settle_memory() -> None:
    """Let the garbage collector leave alone what was imported: MLflow is most of a million objects."""
    gc.collect()
    gc.freeze()


async def _await_mlflow_schema(uri: str) -> None:
    """Wait until the MLflow server has made its tables: two processes that make them at once break each other."""
    newest = _get_latest_schema_revision()
    waited_s = 0.0
    while not await _schema_is(uri, newest):
        if waited_s and waited_s % _MLFLOW_WAIT_NOTE_S == 0:
            log.warning("waiting for MLflow's database; `gateway serve` makes it, or set GATEWAY_MLFLOW_TRACKING_URI")
        await asyncio.sleep(_LOOK_S)
        waited_s += _LOOK_S


async def _open_store(uri: str, experiment: str) -> MlflowStore:
    """Open MLflow as soon as it is there; traces wait in the outbox meanwhile."""
    while True:
        try:
            return await asyncio.to_thread(MlflowStore, uri, experiment)
        except Exception as error:
            if not is_away(error):
                raise
            log.warning("waiting for MLflow", error=str(error).splitlines()[0])
        await asyncio.sleep(_MLFLOW_PAUSE_S)


async def _schema_is(uri: str, revision: str) -> bool:
    try:
        async with await psycopg.AsyncConnection.connect(uri.replace("+psycopg", "", 1), autocommit=True) as connection:
            cursor = await connection.execute("SELECT version_num FROM alembic_version")
            return await cursor.fetchone() == (revision,)
    except psycopg.Error:
        return False
