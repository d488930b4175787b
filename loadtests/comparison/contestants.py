"""How each contestant is started and asked."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import psycopg

from gateway.settings import MLFLOW_DEFAULTS, Settings

from .load import Bodies, Load, Outcome, over_http
from .processes import SERVING, Child, Shared, answers, free_port, listens
from .serving.common import AGENTS_DIR, ANSWER, MODEL_NAME, question

ModelKind = Literal["in-process", "http"]

EVALUATOR_NICENESS = 10
"""The evaluator shares its core with the load generator and the database, and gives way to them: it works in the
background, maybe on another machine. The MLflow server, to which AgentServer exports, does not give way."""


class Running(Protocol):
    """A contestant that runs."""

    child: Child
    """The process that serves."""

    def load(self, load: Load, bodies: Bodies | None = None) -> Outcome:
        """Put it under load; ``bodies`` instead of a plain question each."""
        ...


@dataclass
class Server:
    """A contestant that is asked over HTTP."""

    child: Child
    url: str

    def load(self, load: Load, bodies: Bodies | None = None) -> Outcome:
        """Put it under load and return what the clients saw."""
        plain = body(thinking_ms=load.thinking_ms)
        outcome = asyncio.run(over_http(load, self.url, bodies or (lambda _: plain), ANSWER))
        self.child.check()
        return outcome


@dataclass
class Bare:
    """The bare loop, which is told what to do line by line."""

    child: Child

    def load(self, load: Load, bodies: Bodies | None = None) -> Outcome:
        """Let it run and return what it says; it knows no bodies but the plain question."""
        if bodies is not None:
            raise ValueError("the bare loop has no HTTP")
        self.child.input.write(json.dumps(asdict(load)).encode() + b"\n")
        self.child.input.flush()
        line = self.child.output.readline()
        if not line:
            self.child.check()
        return Outcome(**json.loads(line))


def body(*, session_id: str | None = None, thinking_ms: int = 0) -> bytes:
    """Return a request's body, which all contestants understand."""
    asked = {"input": [{"role": "user", "content": question(thinking_ms)}]}
    return json.dumps(asked | ({"session_id": session_id} if session_id else {})).encode()


@dataclass(frozen=True)
class Contestant:
    """One way to serve the agent."""

    name: str
    title: str
    start: Callable[[ExitStack, Shared, dict[str, str]], Running]
    """Starts it; the stack ends it again. The variables name the model."""
    stores_traces: bool = False

    @contextmanager
    def running(self, shared: Shared, model: ModelKind, **settings: str) -> Iterator[Running]:
        """Run it; ``settings`` are more environment variables for the process that serves."""
        environment = {"OPENAI_BASE_URL": shared.model_url, "OPENAI_API_KEY": "scripted"} if model == "http" else {}
        with ExitStack() as stack:
            yield self.start(stack, shared, environment | settings)


def _agent_server(*options: str) -> Callable[[ExitStack, Shared, dict[str, str]], Running]:
    def start(stack: ExitStack, shared: Shared, environment: dict[str, str]) -> Running:
        settings = {**MLFLOW_DEFAULTS, "MLFLOW_TRACKING_URI": shared.mlflow_url}
        return _server(stack, shared, "agent_server", settings | environment, *options)

    return start


def _litestar(stack: ExitStack, shared: Shared, environment: dict[str, str]) -> Running:
    return _server(stack, shared, "litestar_server", environment)


def _server(stack: ExitStack, shared: Shared, module: str, environment: dict[str, str], *options: str) -> Running:
    port = free_port()
    arguments = ["-m", f"{SERVING}.{module}", str(port), *options]
    name = "-".join([module, *options])
    child = Child(name, arguments, environment, shared.folder, cores=shared.cores.serving)
    stack.callback(child.stop)
    # Litestar's handler has no health check: any answer shows that it listens.
    child.await_ready(lambda: listens(port))
    return Server(child, f"http://127.0.0.1:{port}/invocations")


def _bare(stack: ExitStack, shared: Shared, environment: dict[str, str]) -> Running:
    cores = shared.cores.serving
    child = Child("bare", ["-m", f"{SERVING}.bare"], environment, shared.folder, cores=cores, talks=True)
    stack.callback(child.stop)
    return Bare(child)


@dataclass(frozen=True)
class _Gateway:
    """Starts the gateway's processes as `gateway serve` does."""

    traced: bool

    def __call__(self, stack: ExitStack, shared: Shared, environment: dict[str, str]) -> Running:
        port = free_port()
        settings = {
            "GATEWAY_AGENTS_DIR": str(AGENTS_DIR),
            "GATEWAY_DATABASE_URL": shared.database_url,
            "GATEWAY_HOME": str(shared.folder / "home"),
            "GATEWAY_MLFLOW_PORT": str(shared.mlflow_port),
            "GATEWAY_PORT": str(port),
            **(_TRACED if self.traced else _untraced()),
            **({"GATEWAY_MODEL": MODEL_NAME} if "OPENAI_BASE_URL" in environment else {}),
            **environment,
        }
        web = Child("gateway-web", ["-m", "gateway", "web"], settings, shared.folder, cores=shared.cores.serving)
        stack.callback(web.stop)
        web.await_ready(lambda: answers(f"http://127.0.0.1:{port}/ping"))
        if self.traced:
            worker = ["-m", "gateway", "worker"]
            cores = shared.cores.others
            evaluator = Child("evaluator", worker, settings, shared.folder, cores=cores, nice=EVALUATOR_NICENESS)
            stack.callback(evaluator.stop)
            evaluator.await_ready(lambda: _works(shared.database_url, evaluator.pid))
        return Server(web, f"http://127.0.0.1:{port}/invocations")


_TRACED = {"GATEWAY_SAMPLE_RATE": "1"}


def _untraced() -> dict[str, str]:
    """Return what switches tracing off; a gateway without that setting keeps no trace instead."""
    return {"GATEWAY_TRACING": "false"} if "tracing" in Settings.model_fields else {"GATEWAY_SAMPLE_RATE": "0"}


def _works(database_url: str, pid: int) -> bool:
    beat = "SELECT 1 FROM evaluators WHERE pid = %s AND heartbeat_at > now() - interval '5 seconds'"
    with psycopg.connect(database_url) as connection:
        return connection.execute(beat, [pid]).fetchone() is not None


AUTOLOG = Contestant("autolog", "AgentServer, autolog", _agent_server("autolog"), stores_traces=True)
AGENT_SERVER = Contestant("agent-server", "AgentServer, tracing off", _agent_server())
TRACED = Contestant("gateway", "gateway, 100 % sampled, redacted", _Gateway(traced=True), stores_traces=True)
UNTRACED = Contestant("gateway-untraced", "gateway, tracing off", _Gateway(traced=False))
BARE = Contestant("bare", "bare loop around Runner.run", _bare)
LITESTAR = Contestant("litestar", "bare Litestar handler", _litestar)

CONTESTANTS = {each.name: each for each in (AUTOLOG, AGENT_SERVER, TRACED, UNTRACED, BARE, LITESTAR)}
"""By name, in the order of the report."""
