"""``/ping``, ``/health`` and ``/version``: for load balancers, for people in operations, for both."""

import asyncio
import time
from importlib.metadata import version
from typing import Any, Literal

import httpx
import msgspec
import psycopg
from litestar import Request, Response, get
from litestar.datastructures import State

from gateway import __version__
from gateway.plugins import AgentPlugin
from gateway.runs.execution import AgentExecutor
from gateway.runs.runner import AgentRunner
from gateway.storage.database import Pool
from gateway.tracing.handover.outbox import OutboxWriter

_CHECK_TIMEOUT_S = 2.0
_HEARTBEAT_LATE_S = 15.0  # evaluators beat every 2 s; a busy machine may delay some
_MLFLOW_VERSION = version("mlflow-tracing")  # read once: it looks at the disk
_LAG_LATE_S = 60.0  # traces that wait longer than this mean that scoring does not keep up
_MLFLOW_CACHE_S = 5.0  # probes may come every second; MLflow need not answer each

PartStatus = Literal["ok", "degraded", "down"]


class Part(msgspec.Struct, omit_defaults=True):
    """State of one part the gateway stands on."""

    status: PartStatus
    detail: str | None = None
    """What is wrong and where to look; ``None`` when all is well."""


class HealthChecker:
    """Looks at the parts, each with a deadline, all at once."""

    def __init__(self, pool: Pool, outbox: OutboxWriter, client: httpx.AsyncClient, mlflow_url: str | None):
        self._pool = pool
        self._outbox = outbox
        self._client = client
        self._mlflow_url = mlflow_url
        self._mlflow: tuple[float, Part] | None = None

    async def check(self) -> dict[str, Part]:
        """Return the parts by name. Only ``database`` can be ``down``: serving stands on it alone."""
        names = ("database", "mlflow", "evaluator", "outbox")
        parts = await asyncio.gather(self._database(), self._mlflow_cached(), self._evaluator(), self._outbox_lag())
        return dict(zip(names, parts, strict=True))

    async def _query(self, statement: str) -> tuple[Any, ...] | None:
        async with asyncio.timeout(_CHECK_TIMEOUT_S), self._pool.connection() as connection:
            return await (await connection.execute(statement)).fetchone()

    async def _database(self) -> Part:
        try:
            await self._query("SELECT 1")
        except (psycopg.Error, TimeoutError) as error:
            return Part("down", f"no answer from Postgres ({type(error).__name__}); runs cannot keep their sessions")
        return Part("ok")

    async def _evaluator(self) -> Part:
        try:
            row = await self._query("SELECT extract(epoch FROM now() - max(heartbeat_at))::float8 FROM evaluators")
        except (psycopg.Error, TimeoutError):
            return Part("degraded", "unknown while the database is away")
        age_s = row[0] if row else None
        if age_s is None:
            return Part("degraded", "no evaluator has started yet; start one with `gateway worker`")
        if age_s > _HEARTBEAT_LATE_S:
            return Part("degraded", f"last heartbeat {age_s:.0f} s ago; traces wait in the outbox until one runs again")
        return Part("ok")

    async def _outbox_lag(self) -> Part:
        statement = "SELECT count(*), extract(epoch FROM now() - min(created_at))::float8 FROM outbox WHERE NOT held"
        try:
            row = await self._query(statement)
        except (psycopg.Error, TimeoutError):
            return Part("degraded", f"{self._outbox.waiting} traces wait in memory for the database")
        waiting, lag_s = row or (0, None)
        if lag_s is not None and lag_s > _LAG_LATE_S:
            return Part(
                "degraded", f"{waiting} traces wait, the oldest for {lag_s:.0f} s; the evaluator does not keep up"
            )
        return Part("ok", f"{waiting} traces wait" if waiting else None)

    async def _mlflow_cached(self) -> Part:
        if self._mlflow is None or time.monotonic() - self._mlflow[0] > _MLFLOW_CACHE_S:
            self._mlflow = (time.monotonic(), await self._ask_mlflow())
        return self._mlflow[1]

    async def _ask_mlflow(self) -> Part:
        if self._mlflow_url is None:
            return Part("ok", "not checked: GATEWAY_MLFLOW_URL is not set")
        try:
            (await self._client.get(f"{self._mlflow_url}/health", timeout=_CHECK_TIMEOUT_S)).raise_for_status()
        except httpx.HTTPError as error:
            return Part("degraded", f"no answer from MLflow ({type(error).__name__}); its UI is away")
        return Part("ok")


class Ping(msgspec.Struct):
    """Whether this process lives, in the form of Amazon's AgentCore and SageMaker."""

    status: Literal["Healthy", "HealthyBusy"]
    """``HealthyBusy``: a run is under way, so that the process should not be taken away."""
    time_of_last_update: int
    """When ``status`` last changed, seconds since the epoch."""


class AgentInfo(msgspec.Struct):
    """What is served, in the form of MLflow's agent server."""

    name: str
    """Name of the default agent."""
    use_case: str
    mlflow_version: str
    agent_api: str


@get("/ping", summary="Is this process alive?", tags=["Probes"])
async def ping(request: Request[Any, Any, State]) -> Ping:
    """Answer at once, touching nothing."""
    runner: AgentRunner = request.app.state.runner
    return Ping("HealthyBusy" if runner.busy else "Healthy", int(runner.changed_at))


@get("/agent/info", summary="What is served, as MLflow's agent server says it", tags=["Probes"])
async def agent_info(request: Request[Any, Any, State]) -> AgentInfo:
    """Answer with the default agent's name and the API that it speaks."""
    executor: AgentExecutor = request.app.state.executor
    return AgentInfo(executor.plugin(None).name, "agent", _MLFLOW_VERSION, "responses")


@get("/health", summary="State of every part", tags=["Probes"])
async def health(request: Request[Any, Any, State]) -> Response[dict[str, Any]]:
    """Answer 503 when serving itself is broken, else 200 with ``ok``, or ``degraded`` and which part."""
    checker: HealthChecker = request.app.state.health
    parts = await checker.check()
    states = {part.status for part in parts.values()}
    status = "down" if "down" in states else "degraded" if "degraded" in states else "ok"
    culprits = [name for name, part in parts.items() if part.status != "ok"]
    body = {"status": status, "degraded": culprits, "parts": msgspec.to_builtins(parts)}
    return Response(body, status_code=503 if status == "down" else 200)


@get("/version", summary="What is running", tags=["Probes"])
async def versions(request: Request[Any, Any, State]) -> dict[str, Any]:
    """Answer with the gateway's and MLflow's versions, and each agent's content hash and model."""
    executor: AgentExecutor = request.app.state.executor
    plugins: dict[str, AgentPlugin] = request.app.state.agents
    agents = {
        name: {"version": plugin.version, "model": executor.model(name).name, "offline": executor.model(name).offline}
        for name, plugin in plugins.items()
    }
    return {
        "gateway": __version__,
        "mlflow": _MLFLOW_VERSION,
        "agents": agents,
        "model": request.app.state.settings.model or "offline",
    }
