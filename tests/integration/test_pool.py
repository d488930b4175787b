"""The pool: what it hands out works, and asking costs nothing while connections are in use."""

import psycopg

from gateway.storage.database import open_pool


async def test_a_connection_that_the_server_has_closed_is_not_handed_out(database_url: str) -> None:
    """A connection that was used just now and closed by the server since is replaced before anyone gets it."""
    async with open_pool(database_url, max_size=1, name="test") as pool:
        async with pool.connection() as connection:
            [killed] = await (await connection.execute("SELECT pg_backend_pid()")).fetchone()  # type: ignore[misc]
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
            await other.execute("SELECT pg_terminate_backend(%s, 5000)", [killed])
        async with pool.connection() as connection:
            [pid] = await (await connection.execute("SELECT pg_backend_pid()")).fetchone()  # type: ignore[misc]
        assert pid != killed


async def test_a_connection_in_use_is_not_asked_about_again(database_url: str) -> None:
    """Between two uses in a row the server is sent nothing but what the callers want."""
    async with open_pool(database_url, max_size=1, name="test") as pool:
        for _ in range(3):
            async with pool.connection() as connection:
                cursor = await connection.execute("SELECT pg_stat_get_snapshot_timestamp()")
                await cursor.fetchone()
                pid = connection.info.backend_pid
        async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as other:
            cursor = await other.execute("SELECT query FROM pg_stat_activity WHERE pid = %s", [pid])
            assert await cursor.fetchone() == ("SELECT pg_stat_get_snapshot_timestamp()",)
