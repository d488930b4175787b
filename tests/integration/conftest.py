"""The web process in this process: the real app on a real database, with BlockBuster watching its event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import psycopg
import pytest
from blockbuster import blockbuster_ctx
from litestar.testing import AsyncTestClient

from gateway.app import create_app
from gateway.settings import Settings

Serve = Callable[[Settings], AbstractAsyncContextManager[AsyncTestClient[Any]]]


@pytest.fixture
def serve() -> Serve:
    """Serve an app; on leaving the context everything is handed over to the database."""

    @asynccontextmanager
    async def serving(settings: Settings) -> AsyncIterator[AsyncTestClient[Any]]:
        app = await asyncio.to_thread(create_app, settings)  # it reads files, which only matters at start
        async with AsyncTestClient(app) as client:
            # From here on, a blocking call of ours on the event loop fails the test.
            with blockbuster_ctx(["gateway"]):
                yield client

    return serving


@pytest.fixture
def rows(database_url: str) -> Callable[..., list[tuple[Any, ...]]]:
    """Run a statement on the test's database and return its rows."""

    def query(statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(database_url) as connection:
            return connection.execute(statement, parameters).fetchall()  # type: ignore[arg-type]

    return query
