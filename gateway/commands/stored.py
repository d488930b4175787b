"""What the commands share that look at what is stored: the database, MLflow, and where they print."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any, TypeVar

import psycopg
from rich.console import Console

from gateway.errors import ConfigurationError
from gateway.quality.since import SINCE_FORMS, parse_since
from gateway.settings import Settings
from gateway.storage.database import database_url, migrate
from gateway.storage.embedded import EmbeddedPostgres, running_url

T = TypeVar("T")


def need_mlflow(what: str = "This command") -> None:
    """Raise `ConfigurationError`, which says what needs it, if MLflow is not installed."""
    try:
        distribution("mlflow")  # `import mlflow` works without it: `mlflow-tracing` has a part of the same name
    except PackageNotFoundError:
        raise ConfigurationError(
            f"{what} needs MLflow; install it with `pip install 'agent-gateway[evaluation]'`."
        ) from None


def use_mlflow(settings: Settings) -> None:
    """Let MLflow's clients in this process use the gateway's traces, and its judges their model.

    Raises:
        ConfigurationError: MLflow is not installed, or its database is that of an embedded Postgres that does not run.
    """
    need_mlflow()
    from gateway.evaluation.store import configure_mlflow, tracking_uri  # noqa: PLC0415 - takes seconds to import

    url = database_url(settings) if settings.runs_own_mlflow else ""
    configure_mlflow(settings, tracking_uri(settings, url))


def time_of(option: str, text: str) -> datetime:
    """Return the time that was given for an option, in UTC.

    Raises:
        ConfigurationError: it is none.
    """
    if (time := parse_since(text, datetime.now(UTC))) is None:
        raise ConfigurationError(f"{option} {text} is neither a time nor a duration; give {SINCE_FORMS}.")
    return time


def output() -> Console:
    """Return where results are printed."""
    return Console(width=None if sys.stdout.isatty() else 300)  # into a pipe, lines as long as they need be


def in_database(settings: Settings, work: Callable[[psycopg.AsyncConnection[Any]], Awaitable[T]]) -> T:
    """Return what ``work`` returns on a connection, which it shares with no other."""

    async def connect(url: str) -> T:
        async with await psycopg.AsyncConnection.connect(url) as connection:
            return await work(connection)

    with database(settings) as url:
        return asyncio.run(connect(url))


@contextmanager
def database(settings: Settings) -> Iterator[str]:
    """Have the database that is set or embedded, migrated; an embedded one that does not run, runs meanwhile."""
    with postgres(settings) as url:
        migrate(url)
        yield url


@contextmanager
def postgres(settings: Settings) -> Iterator[str]:
    """Have the database that is set or embedded, as it is; an embedded one that does not run, runs meanwhile."""
    if (url := known_database(settings)) is not None:
        yield url
        return
    from gateway.supervisor import only_one  # noqa: PLC0415 - what serving needs

    settings.home.mkdir(parents=True, exist_ok=True)
    with only_one(settings.home):
        server = EmbeddedPostgres(settings.home)
        try:
            yield server.start()
        finally:
            server.stop()


def known_database(settings: Settings) -> str | None:
    """Return the URL of the database that is set, or of the embedded one if it runs; ``None``: there is neither."""
    if settings.database_url is not None or running_url(settings.home):
        return database_url(settings)
    return None
