"""Conversation memory: one read and one write a run, one run at a time a session.

A session's history is a row a turn, encrypted and bound to its place. A run takes the session's turn first: a row of
``sessions`` names the owner and a time after which the turn is free again, should its owner have died. Another run
waits for it, in this process or any other. Nothing is written until the run has succeeded; a failed run leaves the
session as it was.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import psycopg
import structlog

from gateway.crypto import Cipher
from gateway.errors import SessionBusy
from gateway.storage.database import Pool

log = structlog.get_logger(__name__)

_FIRST_WAIT_S = 0.02
_LONGEST_WAIT_S = 0.25
_GIVE_BACK_WAIT_S = 1.0  # with the database away the client is waiting for its 503


class Turn:
    """A session's turn while a run holds it."""

    def __init__(self, session_id: str, number: int, owner: str, history: list[Any]):
        self.session_id = session_id
        self.number = number
        """Number of this turn, the first is 1."""
        self.owner = owner
        self.history = history
        """Responses items of the earlier turns, oldest first, whole turns only."""
        self.committed = False


class SessionStore:
    """Reads and writes sessions."""

    def __init__(self, pool: Pool, cipher: Cipher, *, history_turns: int, hold_s: float):
        """Take the pool, the cipher of the items, and two bounds.

        Args:
            pool: connections to the database.
            cipher: encrypts the items.
            history_turns: earlier turns that a run sees at the most.
            hold_s: seconds after which a turn is free again if its owner never gave it back.
        """
        self._pool = pool
        self._cipher = cipher
        self._history_turns = history_turns
        self._hold_s = hold_s

    @asynccontextmanager
    async def turn(self, session_id: str) -> AsyncIterator[Turn]:
        """Hold the session's turn; wait for it as long as the caller's own deadline allows.

        On leaving without `commit`, the session is as it was before.
        """
        owner = uuid.uuid4().hex
        turn = None
        try:
            # Inside, since a cancelled statement may have taken the turn before its answer was read.
            turns = await self._take(session_id, owner)
            turn = Turn(session_id, turns + 1, owner, await self._read(session_id, turns))
            yield turn
        finally:
            if turn is None or not turn.committed:
                # Shielded: a cancelled run must give the turn back, or the session would be stuck until it expires.
                await asyncio.shield(self._give_back(session_id, owner))

    async def commit(self, turn: Turn, items: list[Any]) -> None:
        """Write the turn's items and free the session, in one statement.

        Raises:
            SessionBusy: the turn was held for so long that another run took it; nothing was written.
        """
        stored = self._cipher.encrypt(msgspec.json.encode(items), f"{turn.session_id}/{turn.number}")
        async with self._pool.connection() as connection:
            written = await connection.execute(_COMMIT, [turn.session_id, turn.owner, stored])
        if written.rowcount != 1:
            raise SessionBusy(
                "The run took longer than a session's turn may be held, and another run has gone on with the session; "
                "this run's turn was not stored. Send the request again."
            )
        turn.committed = True

    async def _take(self, session_id: str, owner: str) -> int:
        """Take the turn and return how many turns there are already."""
        wait_s = _FIRST_WAIT_S
        while True:
            async with self._pool.connection() as connection:
                cursor = await connection.execute(_TAKE, [session_id, owner, self._hold_s])
                if (row := await cursor.fetchone()) is not None:
                    return int(row[0])  # type: ignore[call-overload,no-any-return]
            await asyncio.sleep(wait_s)
            wait_s = min(wait_s * 1.5, _LONGEST_WAIT_S)

    async def _read(self, session_id: str, turns: int) -> list[Any]:
        if not turns or not self._history_turns:
            return []
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_READ, [session_id, turns - self._history_turns])
            rows = await cursor.fetchall()
        items: list[Any] = []
        for number, stored in rows:
            items += msgspec.json.decode(self._cipher.decrypt(stored, f"{session_id}/{number}"))  # type: ignore[arg-type]
        return items

    async def _give_back(self, session_id: str, owner: str) -> None:
        try:
            async with self._pool.connection(timeout=_GIVE_BACK_WAIT_S) as connection:
                await connection.execute(_GIVE_BACK, {"session": session_id, "owner": owner})
        except psycopg.OperationalError as error:  # what the run ended with matters more to its client
            log.warning("a session's turn could not be given back; it is free when its time is over", error=str(error))


_TAKE = """
    INSERT INTO sessions (session_id, turn_owner, turn_until) VALUES (%s, %s, now() + make_interval(secs => %s))
    ON CONFLICT (session_id) DO UPDATE SET turn_owner = excluded.turn_owner, turn_until = excluded.turn_until
    WHERE sessions.turn_owner IS NULL OR sessions.turn_until < now()
    RETURNING turns
"""
_READ = "SELECT turn, items FROM session_turns WHERE session_id = %s AND turn > %s ORDER BY turn"
_COMMIT = """
    WITH mine AS (
        UPDATE sessions SET turns = turns + 1, turn_owner = NULL, turn_until = NULL
        WHERE session_id = %s AND turn_owner = %s RETURNING session_id, turns)
    INSERT INTO session_turns (session_id, turn, items) SELECT session_id, turns, %s FROM mine
"""
# A session that never had a turn that succeeded is gone again, as if nothing had been asked.
_GIVE_BACK = """
    WITH gone AS (
        DELETE FROM sessions WHERE session_id = %(session)s AND turn_owner = %(owner)s AND turns = 0)
    UPDATE sessions SET turn_owner = NULL, turn_until = NULL
    WHERE session_id = %(session)s AND turn_owner = %(owner)s AND turns > 0
"""
