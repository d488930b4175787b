"""Conversation memory: a session's turns, one run at a time.

A session's history is a row a turn, encrypted and bound to its place. A run takes the session's turn first
(`gateway.runs.line`). Nothing is written until the run has succeeded; a failed run leaves the session as it was.
"""

import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import msgspec
import psycopg

from gateway.crypto import Cipher
from gateway.errors import SessionBusy
from gateway.runs.line import FIRST_IN_LINE, Policy, Statement, TurnLine, ended
from gateway.storage.database import Pool
from gateway.storage.erasure import BESIDE_NO_ERASURE
from gateway.storage.schema import ANONYMOUS
from gateway.storage.signals import Signals


@dataclass(frozen=True)
class StoredTurn:
    """A turn as it is stored."""

    number: int
    trace_id: str | None
    """Trace of the run that gave it; ``None`` if an earlier version stored it."""
    created_at: datetime
    items: list[Any]
    """Responses items: what the client sent, then what the run produced."""
    continues: bool = False
    """It answers tool calls or approvals of the turn before."""


@dataclass
class Turn:
    """A session's turn while a run holds it."""

    session_id: str
    number: int
    """Number of this turn, the first is 1."""
    owner: str
    key_id: str = ANONYMOUS
    earlier: list[StoredTurn] = field(default_factory=list)
    """The turns that the run sees, oldest first, whole ones only."""
    copied: bool = False
    """The earlier turns are another session's and become this one's at the commit."""
    forked_from: str | None = None
    rate: float | None = None
    """Rate by which the session's first turn was drawn for sampling; ``None``: it was not drawn yet."""
    is_new: bool = False
    """There is no row of the session before the commit."""
    settled: bool = False
    """It was committed, or taken away."""

    @property
    def history(self) -> list[Any]:
        """Responses items of the earlier turns, oldest first."""
        return [item for turn in self.earlier for item in turn.items]


class SessionStore:
    """Reads and writes sessions. One a web process."""

    def __init__(self, pool: Pool, cipher: Cipher, signals: Signals, *, history_turns: int, hold_s: float):
        """Take the parts, and two bounds.

        Args:
            pool: connections to the database.
            cipher: encrypts the items.
            signals: tells when a turn is free.
            history_turns: earlier turns that a run sees at the most; what answers a tool call counts with the call.
            hold_s: seconds after which a turn is free again if its owner never gave it back.
        """
        self._pool = pool
        self._cipher = cipher
        self._signals = signals
        self._history_turns = history_turns
        self._line = TurnLine(pool, signals, hold_s=hold_s)
        self.settle = self._line.settle

    def begin(self, session_id: str, owner: str, *, key_id: str = ANONYMOUS) -> Turn:
        """Return the first turn of a session that nobody else knows of: there is none to wait for, or to give back."""
        return Turn(session_id, 1, owner, key_id, is_new=True)

    @asynccontextmanager
    async def turn(
        self,
        session_id: str,
        owner: str,
        *,
        key_id: str = ANONYMOUS,
        policy: Policy = "enqueue",
        continues: bool = False,
        user_id: str | None = None,
    ) -> AsyncIterator[Turn]:
        """Hold the session's turn; wait for it as long as the caller's own deadline allows.

        On leaving without `commit`, the session is as it was before.

        Args:
            session_id: as stored.
            owner: id that is used once; ``STOP_RUN`` signals for it mean that the turn was taken away.
            key_id: API key that the session belongs to, or will.
            policy: what to do while another holds the turn.
            continues: this turn answers tool calls or approvals of the one before, which it must see.
            user_id: as stored; a new session is that user's from now on, so that it can be found and forgotten.

        Raises:
            SessionNotFound: the session belongs to another key.
            SessionBusy: the turn is taken and ``policy`` is ``reject``.
            RunCancelled: while this one waited, a newer request with ``policy`` ``interrupt`` came.
        """
        async with self._held(session_id, owner, key_id, policy, user_id=user_id) as turn:
            turn.earlier = await self._read(session_id, turn.number - 1, continues=continues)
            yield turn

    @asynccontextmanager
    async def after(
        self,
        session_id: str,
        number: int,
        owner: str,
        *,
        key_id: str = ANONYMOUS,
        continues: bool = False,
        user_id: str | None = None,
    ) -> AsyncIterator[Turn]:
        """Hold the turn that follows turn ``number``: the session's own if that was its last, else one of a fork.

        A fork is a new session that begins with copies of the turns so far, so that both go on by themselves.
        """
        async with self._held_if_last(session_id, number, owner, key_id) as turn:
            if turn is not None:
                turn.earlier = await self._read(session_id, number, continues=continues)
                yield turn
                return
        fork_id = f"s-{owner.removeprefix('tr-')}"
        async with self._held(fork_id, owner, key_id, "enqueue", user_id=user_id, forked_from=session_id) as fork:
            # Read once the fork is there: who forgets the session from now on finds the fork, and ends this run.
            fork.earlier = await self._read(session_id, number, continues=continues)
            fork.number, fork.copied, fork.forked_from = number + 1, True, session_id
            yield fork

    @asynccontextmanager
    async def hold(self, session_id: str) -> AsyncIterator[None]:
        """Keep everyone off a session: end the run that is under way on it, and take its turn.

        Raises:
            SessionNotFound: there is none.
        """
        async with self._held(session_id, uuid.uuid4().hex, None, "interrupt"):
            yield

    async def peek(
        self, session_id: str, *, key_id: str = ANONYMOUS, last: int | None = None, continues: bool = False
    ) -> list[StoredTurn]:
        """Return the turns that a run which is not to be remembered sees; the arguments are those of `turn`.

        Raises:
            SessionNotFound: the session belongs to another key.
        """
        await self._line.check_owner(session_id, key_id)
        return await self._read(session_id, 2**31 - 1 if last is None else last, continues=continues)

    async def turns(self, session_id: str) -> list[StoredTurn]:
        """Return all turns of a session, oldest first; none if there is no such session."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_READ_ALL, [session_id])
            return self._decrypted(session_id, await cursor.fetchall())

    async def commit(
        self,
        turn: Turn,
        items: list[Any],
        *,
        trace_id: str | None = None,
        user_id: str | None = None,
        continues: bool = False,
        also: Sequence[Statement] = (),
    ) -> None:
        """Write the turn's items and free the session, with everything in ``also`` or not at all.

        Raises:
            RunCancelled: a newer request took the turn away; nothing was written.
            SessionBusy: the turn was held for so long that another run took it; nothing was written.
        """
        mine = {
            "session": turn.session_id,
            "turn": turn.number,
            "key": turn.key_id,
            "owner": turn.owner,
            "user": user_id,
            "forked_from": turn.forked_from,
            "items": self._encrypted(turn, turn.number, items),
            "trace": trace_id,
            "continues": continues,
        }
        copies = turn.earlier if turn.copied else []
        async with self._pool.connection() as connection, AsyncExitStack() as stack:
            if copies or also:
                await stack.enter_async_context(connection.transaction())
            if copies:
                await connection.execute(BESIDE_NO_ERASURE)
                last = [turn.forked_from, copies[-1].number, copies[-1].created_at]
                if await (await connection.execute(_STILL_THERE, last)).fetchone() is None:
                    raise ended()  # what was forgotten must not come back in a fork
            cursor = await connection.execute(_COMMIT_NEW if turn.is_new else _COMMIT, mine)
            if await cursor.fetchone() is None:
                raise await self._lost(connection, turn)
            for each in copies:
                content = self._encrypted(turn, each.number, each.items)
                await connection.execute(
                    _COPY, [turn.session_id, each.number, content, each.trace_id, each.continues, each.created_at]
                )
            for statement, parameters in also:
                await connection.execute(statement, parameters)
        turn.settled = True

    def _encrypted(self, turn: Turn, number: int, items: list[Any]) -> bytes:
        return self._cipher.encrypt(msgspec.json.encode(items), f"{turn.session_id}/{number}")

    async def _lost(self, connection: psycopg.AsyncConnection[Any], turn: Turn) -> Exception:
        cursor = await connection.execute("SELECT turn_owner FROM sessions WHERE session_id = %s", [turn.session_id])
        if await cursor.fetchone() in {(turn.owner,), None}:  # still ours, but interrupted; or forgotten
            return ended()
        return SessionBusy(
            "Another run has gone on with the session, since this one took longer than a session's turn may be held, "
            "or its process seemed to be gone; its turn was not stored. Send the request again."
        )

    @asynccontextmanager
    async def _held(
        self, session_id: str, owner: str, key_id: str | None, policy: Policy, **new: Any
    ) -> AsyncIterator[Turn]:
        """Hold the turn; ``new`` is what a session that begins with it has from the start."""
        turn = None
        try:
            # Inside, since a cancelled statement may have taken the turn before its answer was read.
            taken = await self._line.take(session_id, owner, key_id, **new)
            if taken is None:
                taken = await self._line.queue(session_id, owner, key_id, policy)
            turn = Turn(session_id, taken.turns + 1, owner, key_id or ANONYMOUS, rate=taken.rate)
            yield turn
        finally:
            if turn is None or not turn.settled:
                await self._line.give_back(session_id, owner)

    @asynccontextmanager
    async def _held_if_last(self, session_id: str, number: int, owner: str, key_id: str) -> AsyncIterator[Turn | None]:
        """Hold the turn if it is free and turn ``number`` is the last one; give ``None`` otherwise, without waiting."""
        turn = Turn(session_id, number + 1, owner, key_id)
        try:
            taken = await self._line.take(session_id, owner, key_id)
            if taken is not None:
                turn.rate = taken.rate
            yield turn if taken is not None and taken.turns == number else None
        finally:
            if not turn.settled:
                await self._line.give_back(session_id, owner)

    async def _read(self, session_id: str, last: int, *, continues: bool) -> list[StoredTurn]:
        """Return the newest turns up to ``last``; a turn and those that answer its tool calls count as one."""
        groups = self._history_turns + continues
        if not last or not groups:
            return []
        parameters = {"session": session_id, "last": last, "skip": groups - 1}
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_READ, parameters)
            return self._decrypted(session_id, await cursor.fetchall())

    def _decrypted(self, session_id: str, rows: Sequence[Any]) -> list[StoredTurn]:
        return [
            StoredTurn(
                number,
                trace_id,
                created_at,
                msgspec.json.decode(self._cipher.decrypt(stored, f"{session_id}/{number}")),
                continues,
            )
            for number, trace_id, created_at, stored, continues in rows
        ]


_READ = """
    SELECT turn, trace_id, created_at, items, continues FROM session_turns
    WHERE session_id = %(session)s AND turn <= %(last)s
      AND turn >= coalesce((SELECT turn FROM session_turns
                            WHERE session_id = %(session)s AND turn <= %(last)s AND NOT continues
                            ORDER BY turn DESC OFFSET %(skip)s LIMIT 1), 0)
    ORDER BY turn
"""
_READ_ALL = """
    SELECT turn, trace_id, created_at, items, continues FROM session_turns WHERE session_id = %s ORDER BY turn
"""
_COMMIT = f"""
    WITH mine AS (
        UPDATE sessions SET turns = %(turn)s, turn_owner = NULL, turn_process = NULL, turn_until = NULL,
            used_at = now(), ended_at = NULL, user_id = coalesce(user_id, %(user)s),
            forked_from = coalesce(forked_from, %(forked_from)s)
        WHERE session_id = %(session)s AND turn_owner = %(owner)s AND NOT interrupted RETURNING session_id, turns),
    stored AS (
        INSERT INTO session_turns (session_id, turn, items, trace_id, continues)
        SELECT session_id, turns, %(items)s, %(trace)s, %(continues)s FROM mine RETURNING session_id)
    SELECT session_id, ({FIRST_IN_LINE})::text FROM stored
"""
_COMMIT_NEW = """
    WITH mine AS (
        INSERT INTO sessions (session_id, key_id, user_id, turns) VALUES (%(session)s, %(key)s, %(user)s, %(turn)s)
        ON CONFLICT DO NOTHING RETURNING session_id, turns)
    INSERT INTO session_turns (session_id, turn, items, trace_id, continues)
    SELECT session_id, turns, %(items)s, %(trace)s, %(continues)s FROM mine RETURNING session_id
"""
_STILL_THERE = "SELECT 1 FROM session_turns WHERE session_id = %s AND turn = %s AND created_at = %s"
_COPY = """
    INSERT INTO session_turns (session_id, turn, items, trace_id, continues, created_at) VALUES (%s, %s, %s, %s, %s, %s)
"""
