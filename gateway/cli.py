"""The ``gateway`` command."""

import asyncio
import os
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Annotated

import structlog
import uvicorn
from cyclopts import App, Parameter
from rich.console import Console
from rich.text import Text

from gateway import __version__
from gateway.crypto import load_keys
from gateway.errors import ConfigurationError, GatewayError
from gateway.logs import configure_logging
from gateway.settings import Settings, load_settings, unknown_settings
from gateway.storage.database import database_url, migrate
from gateway.tracing.redaction import Redactor

app = App(name="gateway", version=__version__, help="Serve tool-calling agents over HTTP, and grade the live traffic.")
_problems = Console(stderr=True)


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
        _problems.print(Text.assemble(("gateway:", "bold red"), f" {error}"), soft_wrap=True)
        sys.exit(2)


def _prepare() -> Settings:
    """Read the settings and set up logging, which redacts."""
    settings = load_settings()
    configure_logging(settings.log_level, Redactor(load_keys(settings).derive("redaction")).text)
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
    from gateway.app import create_app  # noqa: PLC0415 - the SDK takes a second to import; `--help` need not wait

    settings = _prepare()
    migrate(database_url(settings))
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,  # a line a request costs as much as serving a small one; the ledger has them all
        server_header=False,
        timeout_graceful_shutdown=int(settings.shutdown_grace_s),
    )
    sockets = None if fd is None else [socket.socket(fileno=fd)]
    for each in (signal.SIGTERM, signal.SIGINT):
        # Uvicorn raises the signal once more when it has stopped in order: that is a good end, with exit code 0.
        signal.signal(each, lambda *_: sys.exit(0))
    uvicorn.Server(config).run(sockets)


@app.command
def worker() -> None:
    """Run one evaluator on the database that is set or embedded."""
    try:
        distribution("mlflow")  # `import mlflow` works without it: `mlflow-tracing` has a part of the same name
    except PackageNotFoundError:
        raise ConfigurationError(
            "The evaluator needs MLflow; install it with `pip install 'agent-gateway[evaluation]'`."
        ) from None
    from gateway.evaluation.worker import run_evaluator  # noqa: PLC0415 - an optional extra, and seconds to import

    settings = _prepare()
    migrate(database_url(settings))
    asyncio.run(run_evaluator(settings))
    # All that matters is stored. A judge that hangs is a thread that nothing can stop, and Python would wait for it.
    sys.stderr.flush()
    os._exit(0)


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
