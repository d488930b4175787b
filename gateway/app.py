"""Puts the web process together: the only place where its parts meet."""

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


def create_app(settings: Settings) -> Litestar:
    """Return the ASGI app.

    Raises:
        ConfigurationError: an agent cannot be loaded, or lacks a model.
    """
    keys = load_keys(settings)
    agents = load_agents(settings.agents_dir)
    redactor = Redactor(keys.derive("redaction"))
    pool = open_pool(database_url(settings), max_size=settings.database_pool_size, name="web")
    sessions = SessionStore(
        pool,
        keys.history,
        history_turns=settings.history_turns,
        hold_s=settings.run_timeout_s + _HOLD_MARGIN_S,
    )
    capture = SpanCapture()
    executor = AgentExecutor(settings, agents, capture)

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await pool.open(wait=True, timeout=30)
            stack.push_async_callback(pool.close)
            client = await stack.enter_async_context(httpx.AsyncClient())
            outbox = OutboxWriter(
                pool,
                await open_queue(pool),
                redactor,
                keys.outbox,
                flush_s=settings.trace_flush_s,
                buffer_count=settings.trace_buffer_count,
            )
            outbox.start()
            stack.push_async_callback(outbox.stop, settings.shutdown_grace_s)
            # The SDK's own processor sends traces to OpenAI; ours takes its place.
            sdk.set_trace_processors([capture])
            sdk.set_tracing_disabled(False)
            app.state.runner = AgentRunner(settings, keys, executor, sessions, capture, outbox, redactor)
            app.state.health = HealthChecker(pool, outbox, client, settings.mlflow_ui)
            app.state.mlflow_links = MlflowLinks(client, settings.mlflow_ui, settings.mlflow_experiment)
            app.state.update({"agents": agents, "executor": executor, "settings": settings, "pool": pool})
            yield

    return Litestar(
        route_handlers=[invoke, ping, health, versions, quality, ops_page],
        lifespan=[lifespan],
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
