"""How web processes know of each other: who lives, and what happened elsewhere.

Each web process keeps one connection beside its pool. On it it holds an advisory lock, which Postgres frees the moment
the process is gone, so that nothing it held has to be waited for; and it listens for short messages: a session's turn
is free, a run is to stop, a key was revoked.

A message is a hint that saves waiting, never the truth: after the connection was lost, whatever was said meanwhile is
missed. Whoever waits for one looks again from time to time, and `RECONNECTED` is given to all.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable

import psycopg
import structlog

from gateway.storage.database import Pool

log = structlog.get_logger(__name__)

WEB_LOCK = 0x6167_7470
"""First key of the advisory lock by which a web process shows that it is alive; the second is its id."""

LIVING = f"""
    SELECT objid::int FROM pg_locks
    WHERE locktype = 'advisory' AND classid = {WEB_LOCK} AND objsubid = 2 AND granted
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
"""Ids of the web processes that are alive, as a subquery."""

RECONNECTED = "reconnected"
"""Kind of the signal that is raised here when messages may have been missed."""

TURN_FREE = "turn_free"
"""A session's turn is free; the subject is the owner that is first in line for it."""
STOP_RUN = "stop_run"
"""A newer request took a run's place; the subject is the id of the run's trace, which owns the session's turn."""
STOP_RESPONSE = "stop_response"
"""A response was cancelled; the subject is the id of its run's trace."""
KEYS_CHANGED = "keys_changed"
"""API keys were made or revoked; no subject."""
SLOTS_WANTED = "slots_wanted"
"""A process needs what others have leased of a key's limits and do not use; the subject is the key's id."""

SEND = "SELECT pg_notify('gateway', %s || ':' || %s)"
"""Statement that sends a signal; parameters: kind, subject. Sent when its transaction commits."""

_CHANNEL = "gateway"
_RECONNECT_S = 0.5

Handler = Callable[[str], None]


class Signals:
    """The connection of one web process."""

    def __init__(self, url: str):
        self._url = url
        self._handlers: dict[str, list[Handler]] = defaultdict(list)
        self._task: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()
        self.process_id = 0
        """Id of this process, from `start` on; ids are never used again."""

    def on(self, kind: str, handler: Handler) -> None:
        """Call ``handler`` with the subject of each signal of that kind; it must not block nor raise."""
        self._handlers[kind].append(handler)

    async def start(self) -> None:
        """Connect, register this process, and listen in the background."""
        self._task = asyncio.create_task(self._run(), name="signals")
        connected = asyncio.create_task(self._connected.wait())
        await asyncio.wait({self._task, connected}, return_when=asyncio.FIRST_COMPLETED)
        connected.cancel()
        if self._task.done():
            await self._task  # raises what went wrong

    async def stop(self) -> None:
        """Disconnect: from here on this process counts as gone."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            try:
                await self._listen()
            except psycopg.OperationalError as error:
                if not self.process_id:
                    raise
                log.warning("the connection for signals was lost; connecting again", error=str(error))
            # At once where it had lasted: without it this process counts as gone.
            await asyncio.sleep(_RECONNECT_S - (time.monotonic() - began))

    async def _listen(self) -> None:
        async with await psycopg.AsyncConnection.connect(
            self._url, autocommit=True, application_name="gateway-signals", keepalives_idle=5, keepalives_interval=2
        ) as connection:
            if not self.process_id:
                cursor = await connection.execute(
                    "INSERT INTO web_processes (host, pid) VALUES (%s, %s) RETURNING process_id",
                    [socket.gethostname(), os.getpid()],
                )
                row = await cursor.fetchone()
                self.process_id = int(row[0]) if row else 0
            # Shared, since the server may take long to see that an earlier connection of this process is gone.
            await connection.execute("SELECT pg_advisory_lock_shared(%s, %s)", [WEB_LOCK, self.process_id])
            await connection.execute(f"LISTEN {_CHANNEL}")
            if self._connected.is_set():
                self._raise(RECONNECTED, "")
            self._connected.set()
            async for notice in connection.notifies():
                kind, _, subject = notice.payload.partition(":")
                self._raise(kind, subject)

    def _raise(self, kind: str, subject: str) -> None:
        for handler in self._handlers[kind]:
            handler(subject)


async def send(pool: Pool, kind: str, subject: str = "") -> None:
    """Tell all web processes; raise psycopg's errors if the database is away."""
    async with pool.connection() as connection:
        await connection.execute(SEND, [kind, subject])
