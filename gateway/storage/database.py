"""Connections and migrations."""

import select
import time
from pathlib import Path
from typing import ClassVar
from weakref import WeakKeyDictionary

import psycopg
from alembic import command
from alembic.config import Config
from psycopg_pool import AsyncConnectionPool, PoolTimeout
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

from gateway.errors import ConfigurationError
from gateway.settings import Settings, sqlalchemy_url
from gateway.storage.embedded import running_url

Connection = psycopg.AsyncConnection[tuple[object, ...]]
Pool = AsyncConnectionPool[Connection]


_TRUSTED_S = 2.0  # a server that is gone without a word, as when a cable is cut, is noticed after this


class _PatientPool(AsyncConnectionPool[Connection]):
    """Tells a database that is away from one that is busy: while connections come back, one is worth waiting for."""

    _came_back = 0
    _used_at: ClassVar[WeakKeyDictionary[Connection, float]] = WeakKeyDictionary()
    """When each connection came back, by the monotonic clock; a dictionary since connections have no such attribute."""

    async def getconn(self, timeout: float | None = None) -> Connection:  # noqa: ASYNC109 - as psycopg has it
        """Return a connection; raise ``PoolTimeout`` if none came back meanwhile, or if a time was given."""
        while True:
            before = self._came_back
            try:
                return await super().getconn(timeout)
            except PoolTimeout:
                if timeout is not None or self._came_back == before:
                    raise

    async def putconn(self, conn: Connection) -> None:
        """Take a connection back."""
        self._came_back += not conn.closed
        self._used_at[conn] = time.monotonic()
        await super().putconn(conn)

    @classmethod
    async def check_connection(cls, conn: Connection) -> None:
        """Raise if the connection is lost. One that was used just now is asked of the kernel, not of the server."""
        idle_s = time.monotonic() - cls._used_at.get(conn, 0.0)
        if idle_s > _TRUSTED_S or _has_something_to_say(conn):
            await super().check_connection(conn)


_MIGRATION_LOCK = 0x6167_7467  # any constant of ours: one process migrates, the others wait for it


def database_url(settings: Settings) -> str:
    """Return the Postgres URL: the one that is set, or that of the embedded server running on this home.

    Raises:
        ConfigurationError: neither is there.
    """
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    url = running_url(settings.home)
    if url is None:
        raise ConfigurationError(
            f"No database: the embedded Postgres of {settings.home} is not running. Start `gateway serve`, or set "
            "GATEWAY_DATABASE_URL to a Postgres of your own."
        )
    return url


def open_pool(url: str, *, max_size: int, name: str) -> Pool:
    """Return a pool that is not open yet; every connection is in autocommit mode.

    Args:
        url: Postgres URL.
        max_size: connections at the most. A caller waits for one as long as others give theirs back; if none does so
            for 5 s, psycopg's ``PoolTimeout`` is raised.
        name: shows in ``pg_stat_activity`` and in the pool's log lines.
    """
    return _PatientPool(
        url,
        min_size=min(2, max_size),
        max_size=max_size,
        timeout=5.0,
        # Pauses between attempts to connect double until this is over, then each caller starts anew: with psycopg's
        # 300 s a database that was away for a minute would be out of reach for another.
        reconnect_timeout=3.0,
        name=name,
        kwargs={"application_name": f"gateway-{name}"},
        configure=_autocommit,  # not by `kwargs`: Procrastinate passes them on beside an autocommit of its own
        check=_PatientPool.check_connection,
        open=False,
    )


def _has_something_to_say(connection: Connection) -> bool:
    """Whether the server sent something that nobody asked for: mostly that it has closed the connection."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    return bool(poll.poll(0))


async def _autocommit(connection: Connection) -> None:
    await connection.set_autocommit(True)


def migrate(url: str) -> None:
    """Bring the database to the newest revision; safe to call from several processes at once.

    Raises:
        ConfigurationError: the database cannot be reached.
    """
    engine = create_engine(sqlalchemy_url(url))
    try:
        with engine.connect() as connection:
            connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": _MIGRATION_LOCK})
            connection.commit()
            config = alembic_config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
            connection.commit()
    except OperationalError as error:
        raise ConfigurationError(f"The database cannot be reached: {str(error.orig).strip()}") from None
    finally:
        engine.dispose()  # ends the connection, and with it the advisory lock


def alembic_config() -> Config:
    """Return Alembic's configuration; ``migrations/env.py`` takes the connection from its attributes."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    return config


def create_database(url: str, name: str) -> None:
    """Create database ``name`` on the server of ``url`` if it is not there."""
    with psycopg.connect(url, autocommit=True) as connection:
        exists = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name]).fetchone()
        if exists is None:
            try:
                connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
            except psycopg.errors.DuplicateDatabase:
                return  # another process was faster
            except psycopg.errors.InsufficientPrivilege:
                raise ConfigurationError(
                    f"MLflow needs a database of its own and this Postgres user may not create one. Create database "
                    f"{name} beside the gateway's, or set GATEWAY_MLFLOW_TRACKING_URI."
                ) from None
