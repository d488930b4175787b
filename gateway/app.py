"""Puts the web process together: the only place where its parts meet."""

import asyncio
import math
import socket
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager

import httpx
import structlog
import uvicorn
from litestar import Litestar

from gateway.crypto import load_keys
from gateway.http.access import require_scope
from gateway.http.errors import HANDLERS, add_request_id
from gateway.http.invocations import invoke
from gateway.http.openai import OPENAI_ROUTES
from gateway.http.openapi import describe, openapi_document
from gateway.http.probes import HealthChecker, agent_info, health, ping, versions
from gateway.http.reference import reference, reference_file
from gateway.http.scores import get_session_scores, get_trace_scores
from gateway.http.serving import Service
from gateway.http.sessions import end_session, forget_session, forget_user, get_session
from gateway.plugins import load_agents
from gateway.quality.ledger import ledger
from gateway.quality.links import MlflowLinks
from gateway.quality.page import ops_page
from gateway.quality.rollups import quality
from gateway.reloading import LiveSettings
from gateway.runs.execution import AgentExecutor
from gateway.runs.idempotency import IdempotencyStore
from gateway.runs.pauses import PausedRuns
from gateway.runs.responses import ResponseStore
from gateway.runs.runner import AgentRunner
from gateway.runs.sessions import SessionStore
from gateway.settings import Settings
from gateway.storage.allowances import Allowances
from gateway.storage.api_keys import KeyRing
from gateway.storage.database import database_url, open_pool
from gateway.storage.queue import open_queue
from gateway.storage.retention import Retention
from gateway.storage.signals import Signals
from gateway.tracing.capture import SpanCapture
from gateway.tracing.handover.outbox import OutboxWriter, open_files
from gateway.tracing.handover.preparing import Preparer
from gateway.tracing.handover.recovery import Recovery
from gateway.tracing.handover.settling import database_identity
from gateway.tracing.handover.tally import Owner
from gateway.tracing.redaction.redactor import Redactor
from gateway.tracing.sweeper import Sweeper

log = structlog.get_logger(__name__)

_HOLD_MARGIN_S = 30.0  # beyond a run's own time limit, for its commit: then its owner must have died
_CANCELLED_RUNS_S = 3.0  # for runs that were ended at the end of the grace period to give their turns back
_RECOVERY_S = 2.0  # for what is being stored of earlier processes: the next start goes on where it was
_HAND_OVER_S = 5.0  # for the last traces; with the above it stays below what the supervisor allows
_THREADS = 64  # for tools that are plain functions: with asyncio's own few, slow ones would hold up everyone's


ROUTES = [
    invoke,
    *OPENAI_ROUTES,
    get_session,
    get_session_scores,
    get_trace_scores,
    end_session,
    forget_session,
    forget_user,
    ping,
    agent_info,
    health,
    versions,
    quality,
    ledger,
    ops_page,
    openapi_document,
    reference,
    reference_file,
]
"""Everything that is served."""


def create_app(settings: Settings) -> Litestar:
    """Return the ASGI app.

    Raises:
        ConfigurationError: there is no database, an agent cannot be loaded, or it lacks a model.
    """
    web = _WebProcess(settings)
    app = Litestar(
        route_handlers=ROUTES,
        guards=[require_scope],
        lifespan=[web.serving],
        exception_handlers=HANDLERS,
        before_send=[add_request_id],
        request_max_body_size=settings.max_body_bytes,
        openapi_config=None,  # its generator would know nothing of what the handlers decode themselves
        # structlog is set up once a process, by the command line.
        logging_config=None,
    )
    app.state.openapi = describe(ROUTES)
    return app


class _WebProcess:
    """The parts of one web process, and the order in which they start and stop."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._live = LiveSettings(settings)
        self._keys = load_keys(settings)
        self._agents = load_agents(settings.agents_dir)
        self._redactor = Redactor(self._keys.derive("redaction"), settings.redact_patterns)
        self._capture = SpanCapture()
        self._executor = AgentExecutor(settings, self._agents, self._capture)
        url = database_url(settings)
        self._pool = open_pool(url, max_size=settings.database_pool_size, name="web")
        self._signals = Signals(url)

    @asynccontextmanager
    async def serving(self, app: Litestar) -> AsyncIterator[None]:
        """Start the parts and put what the handlers need into the app's state; stop them in the reverse order."""
        settings, pool, signals = self._settings, self._pool, self._signals
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="tools"))
        async with AsyncExitStack() as stack:
            await pool.open(wait=True, timeout=30)
            stack.push_async_callback(pool.close)
            await signals.start()
            stack.push_async_callback(signals.stop)
            client = await stack.enter_async_context(httpx.AsyncClient())
            outbox, recovery = await self._outbox()
            outbox.start()
            stack.push_async_callback(outbox.stop, _HAND_OVER_S)
            recovery.start()
            stack.push_async_callback(recovery.stop, _RECOVERY_S)
            allowances = Allowances(
                pool,
                signals,
                requests_per_minute=settings.key_requests_per_minute,
                concurrency=settings.key_concurrency,
            )
            await allowances.start()
            stack.push_async_callback(allowances.stop)
            sessions = self._sessions()
            responses = ResponseStore(pool, self._keys.responses, signals.process_id)
            app.state.runner = runner = self._runner(sessions, responses, outbox)
            stack.push_async_callback(_end_runs, app)
            retention = asyncio.create_task(Retention(pool, days=settings.retention_days).run(), name="retention")
            stack.callback(retention.cancel)
            sweeping = asyncio.create_task(Sweeper(pool, self._live).run(), name="sweeper")
            stack.callback(sweeping.cancel)
            watching = asyncio.create_task(self._live.watch(), name="settings")
            stack.callback(watching.cancel)
            self._capture.install()
            stack.callback(self._capture.uninstall)
            app.state.update({"settings": settings, "agents": self._agents, "executor": self._executor})
            app.state.update({"pool": pool, "responses": responses, "sessions": sessions})
            app.state.update({"redactor": self._redactor, "queue": self._queue})
            app.state.key_ring = KeyRing(pool, signals, allow_anonymous=settings.allow_anonymous)
            app.state.service = Service(settings, self._executor, runner, allowances, self._idempotency())
            app.state.health = HealthChecker(pool, outbox, client, settings.mlflow_ui)
            app.state.mlflow_links = MlflowLinks(client, settings.mlflow_ui, settings.mlflow_experiment)
            yield

    async def _outbox(self) -> tuple[OutboxWriter, Recovery]:
        pool, live, cipher = self._pool, self._live, self._keys.outbox
        self._queue = queue = await open_queue(pool)
        folder = self._settings.home / "web"
        owner = Owner(
            process_id=self._signals.process_id,
            database=await database_identity(pool),
            host=socket.gethostname(),
            started_ns=time.time_ns(),
            agents=tuple(self._agents),
        )
        max_bytes = self._settings.spill_max_bytes
        tally, spill = await asyncio.to_thread(open_files, folder, owner, cipher, spill_max_bytes=max_bytes)
        preparer = Preparer(self._redactor, cipher, live, process_id=owner.process_id)
        outbox = OutboxWriter(pool, queue, preparer, tally, spill, live)
        return outbox, Recovery(pool, queue, cipher, live, folder, owner.database)

    def _sessions(self) -> SessionStore:
        settings = self._settings
        hold_s = settings.run_timeout_s + _HOLD_MARGIN_S
        return SessionStore(
            self._pool, self._keys.history, self._signals, history_turns=settings.history_turns, hold_s=hold_s
        )

    def _runner(self, sessions: SessionStore, responses: ResponseStore, outbox: OutboxWriter) -> AgentRunner:
        return AgentRunner(
            self._live,
            self._keys,
            self._executor,
            sessions,
            responses,
            PausedRuns(self._pool, self._keys.paused),
            self._signals,
            self._capture,
            outbox,
            self._redactor,
        )

    def _idempotency(self) -> IdempotencyStore:
        settings = self._settings
        return IdempotencyStore(
            self._pool,
            self._keys.answers,
            self._keys.derive("idempotency"),
            self._signals.process_id,
            keep_s=settings.idempotency_hours * 3600,
            wait_s=settings.run_timeout_s,
        )


class Server(uvicorn.Server):
    """Uvicorn, that ends the runs in time: they are told before their connections are cut."""

    def __init__(self, config: uvicorn.Config, app: Litestar, *, grace_s: float):
        """Take the configuration, the app, and the seconds that runs have to finish once the server is to stop."""
        super().__init__(config)
        # Not sooner: clients whose runs were ended are still to be told.
        config.timeout_graceful_shutdown = math.ceil(grace_s + _CANCELLED_RUNS_S) + 1
        self._app = app
        self._grace_s = grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, let runs finish until the grace period is over, then end them."""
        self._app.state.stop_at = time.monotonic() + self._grace_s
        ending = asyncio.create_task(_end_runs(self._app), name="end-runs")
        await super().shutdown(sockets)
        await ending


async def _end_runs(app: Litestar) -> None:
    """Wait for the runs under way while there is time, then end them: their traces are still to be handed over."""
    runner: AgentRunner = app.state.runner
    left_s = max(0.0, app.state.get("stop_at", 0.0) - time.monotonic())
    try:
        await asyncio.wait_for(runner.end(left_s), left_s + _CANCELLED_RUNS_S)
    except TimeoutError:
        log.error("runs do not end although they were cancelled; their traces are lost")
