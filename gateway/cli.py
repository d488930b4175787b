"""The ``gateway`` command."""

import asyncio
import gc
import os
import resource
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import psycopg
import structlog
import uvicorn
from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text
from uvicorn.loops.auto import auto_loop_factory

from gateway import __version__
from gateway.commands import datasets, doctor, offline, rescore, scorers, scores
from gateway.commands.stored import in_database, need_mlflow, output, time_of
from gateway.crypto import load_keys
from gateway.errors import ConfigurationError, GatewayError
from gateway.logs import configure_logging, redact_prints
from gateway.settings import Settings, load_settings, unknown_settings
from gateway.storage.api_keys import SCOPES, ApiKey, check_open, create_key, list_keys, revoke_key
from gateway.storage.database import database_url, migrate
from gateway.tracing.ledger import SNAPSHOT
from gateway.tracing.redaction.redactor import Redactor

app = App(name="gateway", version=__version__, help="Serve tool-calling agents over HTTP, and grade the live traffic.")
keys = App(name="keys", help="Make, list and revoke API keys.")
app.command(keys)
for _commands in (datasets, doctor, offline, rescore, scorers, scores):
    _commands.register(app)

T = TypeVar("T")

_notes = Console(stderr=True)
_LONGEST_DAYS = 36_500
_MOST_FILES = 65_536
_KEEP_ALIVE_S = 75  # longer than load balancers keep an idle connection, commonly 60 s: they are to close it
_YOUNG_OBJECTS = 50_000  # made before the collector looks at them: some tens of runs, a few megabytes


def main() -> None:
    """Run the command line; an error that a person can mend is one message, not a stack trace."""
    with _messages():
        app()


@contextmanager
def _messages() -> Iterator[None]:
    try:
        yield
    except GatewayError as error:
        # Not as markup: a message may hold brackets, as `agent-gateway[all]` does.
        _notes.print(Text.assemble(("gateway:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(2)


def _prepare(*, serves: bool = False) -> Settings:
    """Read the settings and set up logging, which redacts; so is what is printed, in a process that ``serves``."""
    settings = load_settings()
    redactor = Redactor(load_keys(settings).derive("redaction"), settings.redact_patterns)
    configure_logging(settings.log_level, redactor.text)
    if serves:
        redact_prints(redactor.text)
    if (
        unknown := unknown_settings()
    ):  # not refused: an orchestrator sets variables of that prefix for a service so named
        structlog.get_logger(__name__).warning("these variables are no settings and have no effect", names=unknown)
    return settings


@app.command
def serve(*, logs_to_files: bool = False) -> None:
    """Run everything on this machine: Postgres, MLflow, web and evaluator, until Ctrl-C.

    Args:
        logs_to_files: Write the processes' logs to the folder logs of GATEWAY_HOME instead of the terminal.
    """
    from gateway.supervisor import Supervisor  # noqa: PLC0415 - only these two commands need it

    Supervisor(_prepare(), logs_to_files=logs_to_files).run()


@app.command
def web(*, fd: Annotated[int | None, Parameter(show=False)] = None) -> None:
    """Run one web process on the database that is set or embedded."""
    # The SDK takes a second to import; `--help` need not wait for it.
    from gateway.app import Server, create_app  # noqa: PLC0415
    from gateway.http.connections import MAX_HEAD_BYTES, Connection  # noqa: PLC0415

    settings = _prepare(serves=True)
    _allow_many_connections()
    url = database_url(settings)
    migrate(url)
    if check_open(settings, url):
        structlog.get_logger(__name__).warning(
            "no API key was ever made: everyone who reaches this address may do everything, and that is everyone on "
            "this machine at least; `gateway keys create` makes a key and ends that",
            host=settings.host,
        )
    served = create_app(settings)
    config = uvicorn.Config(
        served,
        host=settings.host,
        port=settings.port,
        http=Connection,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=_KEEP_ALIVE_S,
        log_config=None,
        access_log=False,  # a line a request costs as much as serving a small one; the ledger has them all
        server_header=False,
    )
    sockets = None if fd is None else [socket.socket(fileno=fd)]
    for each in (signal.SIGTERM, signal.SIGINT):
        # Uvicorn raises the signal once more when it has stopped in order: that is a good end, with exit code 0.
        signal.signal(each, lambda *_: _leave())
    _settle_memory()
    Server(config, served, grace_s=settings.shutdown_grace_s).run(sockets)


@app.command
def worker() -> None:
    """Run one evaluator on the database that is set or embedded."""
    need_mlflow("The evaluator")
    from gateway.evaluation.worker import run_evaluator  # noqa: PLC0415 - an optional extra, and seconds to import

    settings = _prepare(serves=True)
    migrate(database_url(settings))
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:  # as web processes have it: uvloop
        runner.run(run_evaluator(settings))
    _leave()


@app.command
def demo(*, leave: bool = False) -> None:
    """Start everything, send the sample conversations, show how they were scored, and go on serving until Ctrl-C.

    Args:
        leave: End after the table instead; the exit code says whether all was as expected.
    """
    from gateway.demo import run_demo  # noqa: PLC0415 - as for `serve`

    sys.exit(run_demo(_prepare(), leave=leave))


@app.command
def init(folder: Path) -> None:
    """Write a starter project: an agent, scorers and gateway.toml.

    Args:
        folder: A new or empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigurationError(f"{folder} is not empty; name a new folder.")
    package = Path(__file__).parent
    # The wheel carries the starter; in a checkout it is read from where it is developed.
    source = package / "starter" if (package / "starter").is_dir() else package.parent
    for each in ("agents/math", "scorers"):
        shutil.copytree(source / each, folder / each, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    shutil.copy(source / "gateway.toml", folder)
    Console().print(f"Wrote a starter project to {folder}. Next: cd {folder} && gateway serve", markup=False)


@app.command
def ledger(*, since: str = "24h", json: Annotated[bool, Parameter(negative="")] = False) -> None:
    """Show what became of the runs, and whether that adds up to the runs served; exit code 1 if it does not.

    Args:
        since: Begin of the window: a time as 2026-01-31T08:00:00Z, or how long ago as 90s, 15m, 24h or 7d.
        json: Print what GET /v1/ledger answers, instead of tables.
    """
    # With the web framework, which `--help` need not wait for.
    from gateway.quality.ledger import LedgerReport, read_report  # noqa: PLC0415
    from gateway.quality.terminal import print_ledger  # noqa: PLC0415

    now = datetime.now(UTC)
    begin = time_of("--since", since)

    async def read(connection: psycopg.AsyncConnection[Any]) -> LedgerReport:
        await connection.execute(SNAPSHOT)
        return await read_report(connection, begin, now)

    report = in_database(_prepare(), read)
    if json:
        sys.stdout.write(f"{msgspec.json.format(msgspec.json.encode(report)).decode()}\n")
    else:
        print_ledger(report, output())
    sys.exit(0 if report.check.adds_up else 1)


@keys.command
def create(
    name: str,
    *,
    scope: Annotated[list[str] | None, Parameter(negative="")] = None,
    agent: Annotated[list[str] | None, Parameter(negative="")] = None,
    expires_days: float | None = None,
    requests_per_minute: int | None = None,
    concurrency: int | None = None,
) -> None:
    """Make an API key and print it, this once: `KEY=$(gateway keys create app)`.

    Args:
        name: What the key is called in lists and messages.
        scope: What it is for: invoke, feedback, ops or admin, which is all of them. Give it once for each; invoke and
            feedback if left out.
        agent: An agent that it may use. Give it once for each; all if left out.
        expires_days: Days after which it is no longer valid; never if left out.
        requests_per_minute: Its limit over all web processes; GATEWAY_KEY_REQUESTS_PER_MINUTE if left out.
        concurrency: Its requests at once over all web processes; GATEWAY_KEY_CONCURRENCY if left out.
    """
    settings = _prepare()
    scopes = scope or ["invoke", "feedback"]
    _check_known("scope", scopes, list(SCOPES))
    if agent:
        _check_known("agent", agent, sorted(path.parent.name for path in settings.agents_dir.glob("*/agent.py")))
    for option, limit in (("--requests-per-minute", requests_per_minute), ("--concurrency", concurrency)):
        if limit is not None and not 1 <= limit < 2**31:
            raise ConfigurationError(
                f"{option} is {limit}; give a number of 1 or more, or leave it out for what the setting says."
            )
    if expires_days is not None and not 0 < expires_days <= _LONGEST_DAYS:
        raise ConfigurationError(
            f"--expires-days is {expires_days:g}; give days from now, {_LONGEST_DAYS} at the most."
        )
    expires_at = None if expires_days is None else datetime.now(UTC) + timedelta(days=expires_days)
    key = in_database(
        settings,
        lambda connection: create_key(connection, name, scopes, agent, expires_at, requests_per_minute, concurrency),
    )
    _notes.print(f"API key {name!r} for {', '.join(scopes)}. It is shown this once, so keep it now.", markup=False)
    sys.stdout.write(f"{key}\n")


@keys.command(name="list")
def list_() -> None:
    """Show all API keys that were ever made, without the keys themselves."""
    table = Table("id", "name", "scopes", "agents", "limits", "created (UTC)", "expires (UTC)", "state")
    for key in in_database(_prepare(), list_keys):
        table.add_row(*(Text(cell) for cell in _cells(key)))
    output().print(table)


@keys.command
def revoke(key_id: str) -> None:
    """Make an API key worthless, at once and for good.

    Args:
        key_id: Its id, as `gateway keys list` shows it.
    """
    if not in_database(_prepare(), lambda connection: revoke_key(connection, key_id)):
        raise ConfigurationError(f"There is no API key {key_id} that could be revoked; see `gateway keys list`.")
    _notes.print(f"API key {key_id} is revoked.", markup=False)


def _allow_many_connections() -> None:
    """Raise the limit on open files: the usual 1024 is fewer than the runs of one process with their connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    with suppress(ValueError, OSError):  # macOS has a limit below the one that it tells
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _settle_memory() -> None:
    """Let the garbage collector leave alone what stays, and come less often.

    Hundreds of runs under way are young objects that live on: with Python's defaults the collector goes through them,
    and through everything that was imported, again and again, which is up to half of the CPU of a run.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS, 20, 50)


def _leave() -> None:
    """End with exit code 0, all that matters stored: Python would wait for a tool or a judge that nothing can stop."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _check_known(kind: str, given: list[str], known: list[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ConfigurationError(f"There is no {kind} {', '.join(unknown)}. There are: {', '.join(known) or 'none'}.")


def _cells(key: ApiKey) -> Iterator[str]:
    yield key.key_id
    yield key.name
    yield ", ".join(key.scopes)
    yield "all" if key.agents is None else ", ".join(key.agents)
    limits = [f"{key.requests_per_minute}/min"] if key.requests_per_minute else []
    limits += [f"{key.concurrency} at once"] if key.concurrency else []
    yield ", ".join(limits) or "as set"
    for time in (key.created_at, key.expires_at):
        yield "never" if time is None else f"{time.astimezone(UTC):%Y-%m-%d %H:%M}"
    yield key.state
