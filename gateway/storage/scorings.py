"""What of ``scorings`` has failed for good: to be looked at, and to be tried again by hand."""

from datetime import datetime
from typing import Any, NamedTuple

import psycopg
from psycopg.rows import class_row

Connection = psycopg.AsyncConnection[Any]


class Failure(NamedTuple):
    """A scoring that failed for good."""

    subject: str
    turns: int
    scorer: str
    scorer_version: str
    agent: str
    reason: str | None
    attempts: int
    updated_at: datetime


async def failures(connection: Connection, scorer: str | None, since: datetime | None, most: int) -> list[Failure]:
    """Return what has failed for good, the newest first; ``None``: of all scorers, since ever."""
    async with connection.cursor(row_factory=class_row(Failure)) as cursor:
        await cursor.execute(_FAILURES, {"scorer": scorer, "since": since, "most": most})
        return await cursor.fetchall()


async def retry(connection: Connection, scorer: str | None, since: datetime | None) -> int:
    """Have what has failed tried again, with all its attempts; return how many these are."""
    cursor = await connection.execute(_RETRY, {"scorer": scorer, "since": since})
    return cursor.rowcount


_SUCH = """
    state = 'failed' AND (%(scorer)s::text IS NULL OR scorer = %(scorer)s)
    AND (%(since)s::timestamptz IS NULL OR updated_at >= %(since)s)
"""
_FAILURES = f"""
    SELECT subject, turns, scorer, scorer_version, agent, reason, attempts, updated_at FROM scorings
    WHERE {_SUCH} ORDER BY updated_at DESC LIMIT %(most)s
"""
_RETRY = f"""
    UPDATE scorings SET state = 'pending', attempts = 0, due_at = now(), updated_at = now() WHERE {_SUCH}
"""
