"""The schema, its migrations, the embedded Postgres, and the hand-over while the database is away."""

import asyncio
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine
from sqlalchemy.engine import make_url

from gateway.settings import Settings, sibling_database
from gateway.storage.database import migrate
from gateway.storage.embedded import EmbeddedPostgres, running_url
from gateway.storage.schema import RUN_STATES, metadata
from gateway.tracing.ledger import MEANING, State


def test_the_migrations_make_the_schema(database_url: str) -> None:
    """A migrated database has exactly the tables, columns and indexes that the schema describes."""
    engine = create_engine(make_url(database_url).set(drivername="postgresql+psycopg"))

    def ours(name: str | None, kind: str, _parents: object) -> bool:
        return kind != "table" or name in metadata.tables

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_name": ours, "compare_type": True})
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_the_ledger_and_the_schema_name_the_same_states() -> None:
    """The states are the same in the ledger's type, its meanings, and the table's constraint."""
    assert RUN_STATES == get_args(State) == tuple(MEANING)


def test_processes_that_migrate_at_once_wait_for_each_other(postgres_url: str) -> None:
    """Of several processes that start on an empty database at once, each finds it whole."""
    with psycopg.connect(sibling_database(postgres_url, "postgres"), autocommit=True) as connection:
        connection.execute("CREATE DATABASE raced")
        url = sibling_database(postgres_url, "raced")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(migrate, [url] * 4))
        connection.execute("DROP DATABASE raced WITH (FORCE)")


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """An embedded Postgres of the test's own, started."""
    server = EmbeddedPostgres(tmp_path / "home")
    migrate(server.start())
    yield server
    server.stop()


def test_the_embedded_server_is_found_while_it_runs(postgres: EmbeddedPostgres, tmp_path: Path) -> None:
    """Another process finds the running server by its folder, and none when it has stopped."""
    assert running_url(tmp_path / "home") == postgres.url
    postgres.stop()
    assert running_url(tmp_path / "home") is None


def test_a_lock_file_with_a_reused_process_id_does_not_stop_the_start(
    postgres: EmbeddedPostgres, tmp_path: Path
) -> None:
    """A lock file left by a crash that names a process which is no Postgres is dropped, and the data is there."""
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
    lock = tmp_path / "home" / "postgres" / "postmaster.pid"
    content = lock.read_text()
    postgres.stop()
    lock.write_text(content.replace(content.split("\n", 1)[0], str(os.getpid()), 1))
    assert running_url(tmp_path / "home") is None
    with psycopg.connect(postgres.start()) as connection:
        assert connection.execute("SELECT answer FROM kept").fetchone() == (42,)


async def test_the_database_away_is_said_and_survived(
    serve: Any, make_settings: Callable[..., Settings], postgres: EmbeddedPostgres
) -> None:
    """With the database away runs get 503 and `/health` says so; when it is back, so are answers and the ledger."""
    settings = make_settings(database_url=postgres.url, trace_buffer_count=2)
    body = {"input": "12 + 30"}
    async with serve(settings) as client:
        assert (await client.post("/invocations", json=body)).status_code == 200
        async with asyncio.timeout(10), await psycopg.AsyncConnection.connect(postgres.url, autocommit=True) as look:
            while await (await look.execute("SELECT count(*) FROM runs")).fetchone() == (0,):  # noqa: ASYNC110 - another loop writes it
                await asyncio.sleep(0.02)
        await asyncio.to_thread(postgres.stop)
        *refused, health = await asyncio.gather(
            *(client.post("/invocations", json=body) for _ in range(3)), client.get("/health")
        )
        await asyncio.to_thread(postgres.start)
        answer = await client.post("/invocations", json=body)
    assert {each.status_code for each in refused} == {503}
    assert {each.json()["error_code"] for each in refused} == {"TEMPORARILY_UNAVAILABLE"}
    assert (health.status_code, health.json()["status"]) == (503, "down")
    assert "database" in health.json()["degraded"]
    assert answer.status_code == 200
    with psycopg.connect(postgres.url) as connection:
        kept = connection.execute("SELECT status, count(*) FROM runs GROUP BY status ORDER BY status").fetchall()
        drops = connection.execute("SELECT agent, reason, sum(count) FROM run_drops GROUP BY 1, 2").fetchall()
    # Two fitted into the buffer while the database was away; the third is counted, not lost in silence.
    assert kept == [("error", 2), ("ok", 2)]
    assert drops == [("math", "buffer_full", 1)]
