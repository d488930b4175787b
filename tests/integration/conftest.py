"""The web process in this process: the real app on a real database, with BlockBuster watching its event loop."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import psycopg
import pytest

from gateway.settings import Settings

from .runs import Web, serving

Serve = Callable[[Settings], AbstractAsyncContextManager[Web]]


@pytest.fixture
def serve() -> Serve:
    """Serve an app; on leaving the context everything is handed over to the database."""
    return serving


@pytest.fixture
def rows(database_url: str) -> Callable[..., list[tuple[Any, ...]]]:
    """Run a statement on the test's database and return its rows."""

    def query(statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with psycopg.connect(database_url) as connection:
            return connection.execute(statement, parameters).fetchall()  # type: ignore[arg-type]

    return query
