"""How figures are read: all of one moment, within a bounded time, on one connection."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
from psycopg_pool import PoolTimeout

from gateway.errors import ServiceUnavailable
from gateway.storage.database import Connection, Pool
from gateway.tracing.ledger import SNAPSHOT

_READ_TIMEOUT_S = 10.0  # a reader gives up about then, and the connection is one that runs want


@asynccontextmanager
async def reading(pool: Pool) -> AsyncIterator[Connection]:
    """Give a connection in a transaction that sees one moment.

    Raises:
        ServiceUnavailable: the database is away, or takes too long.
    """
    try:
        async with asyncio.timeout(_READ_TIMEOUT_S), pool.connection() as connection, connection.transaction():
            await connection.execute(SNAPSHOT)
            yield connection
    except (psycopg.OperationalError, PoolTimeout, TimeoutError) as error:
        raise ServiceUnavailable(
            "The figures cannot be read: the database does not answer in time. See /health, and try again shortly."
        ) from error
