"""Puts the web process together: the only place where its parts meet."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import agents as sdk
import httpx
import structlog
from litestar import Litestar
from litestar.openapi.config import OpenAPIConfig
from litestar.openapi.plugins import JsonRenderPlugin

from gateway import __version__
from gateway.crypto import load_keys
from gateway.http.errors import HANDLERS
from gateway.http.invocations import invoke
from gateway.http.probes import HealthChecker, health, ping, versions
from gateway.plugins import load_agents
from gateway.quality.links import MlflowLinks
from gateway.quality.page import ops_page
from gateway.quality.rollups import quality
from gateway.runs.execution import AgentExecutor
from gateway.runs.runner import AgentRunner
from gateway.runs.sessions import SessionStore
from gateway.settings import Settings
from gateway.storage.database import database_url, open_pool
from gateway.storage.queue import open_queue
from gateway.tracing.capture import SpanCapture
from gateway.tracing.outbox import OutboxWriter
from gateway.tracing.redaction import Redactor

log = structlog.get_logger(__name__)

_HOLD_MARGIN_S = 30.0  # beyond a run's own time limit, for its commit: then its owner must have died
_CANCELLED_RUNS_S = 3.0  # for runs that the server cancelled at the end of the grace period to give their turns back
_HAND_OVER_S = 5.0  # for the last traces; with the above it stays below what the supervisor allows


def create_app(settings: Settings) -> Litestar:
    """Return the ASGI app.

    Raises:
        ConfigurationError: there is no database, an agent cannot be loaded, or it lacks a model.
    """
    web = _WebProcess(settings)
    return Litestar(
        route_handlers=[invoke, ping, health, versions, quality, ops_page],
        lifespan=[web.serving],
        exception_handlers=HANDLERS,
        openapi_config=OpenAPIConfig(
            title="Agent Gateway",
            version=__version__,
            # The document alone: the viewers that Litestar offers load scripts from other people's servers.
            render_plugins=[JsonRenderPlugin(path="/")],
        ),
        # structlog is set up once a process, by the command line.
        logging_config=None,
    )


class _WebProcess:
    """The parts of one web process, and the order in which they start and stop."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._keys = load_keys(settings)
        self._agents = load_agents(settings.agents_dir)
        self._redactor = Redactor(self._keys.derive("redaction"))
        self._capture = SpanCapture()
        self._executor = AgentExecutor(settings, self._agents, self._capture)
        self._pool = open_pool(database_url(settings), max_size=settings.database_pool_size, name="web")

    @asynccontextmanager
    async def serving(self, app: Litestar) -> AsyncIterator[None]:
        """Start the parts and put what the handlers need into the app's state; stop them in the reverse order."""
        settings = self._settings
        async with AsyncExitStack() as stack:
            await self._pool.open(wait=True, timeout=30)
            stack.push_async_callback(self._pool.close)
            client = await stack.enter_async_context(httpx.AsyncClient())
            outbox = await self._outbox()
            outbox.start()
            stack.push_async_callback(outbox.stop, _HAND_OVER_S)
            runner = self._runner(outbox)
            stack.push_async_callback(_await_runs, runner)
            # The SDK's own processor sends traces to OpenAI; ours takes its place.
            sdk.set_trace_processors([self._capture])
            sdk.set_tracing_disabled(False)
            app.state.update({"settings": settings, "agents": self._agents, "executor": self._executor})
            app.state.update({"runner": runner, "pool": self._pool})
            app.state.health = HealthChecker(self._pool, outbox, client, settings.mlflow_ui)
            app.state.mlflow_links = MlflowLinks(client, settings.mlflow_ui, settings.mlflow_experiment)
            yield

    async def _outbox(self) -> OutboxWriter:
        settings = self._settings
        return OutboxWriter(
            self._pool,
            await open_queue(self._pool),
            self._redactor,
            self._keys.outbox,
            flush_s=settings.trace_flush_s,
            buffer_count=settings.trace_buffer_count,
        )

    def _runner(self, outbox: OutboxWriter) -> AgentRunner:
        settings = self._settings
        hold_s = settings.run_timeout_s + _HOLD_MARGIN_S
        sessions = SessionStore(self._pool, self._keys.history, history_turns=settings.history_turns, hold_s=hold_s)
        return AgentRunner(settings, self._keys, self._executor, sessions, self._capture, outbox, self._redactor)


async def _await_runs(runner: AgentRunner) -> None:
    """Wait for the runs that the server has just cancelled: their traces are still to be handed over."""
    try:
        await asyncio.wait_for(runner.idle(), _CANCELLED_RUNS_S)
    except TimeoutError:
        log.error("runs do not end although they were cancelled; their traces are lost")
