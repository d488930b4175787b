"""Conversation memory: one run at a time a session, in the order of arrival, over all web processes.

A session's history is a row a turn, encrypted and bound to its place. A run takes the session's turn first: a row of
``sessions`` names the owner, its process, and a time after which the turn is free again. The turn of a process that
died is free at once, since its advisory lock is gone (`gateway.storage.signals`). Who finds the turn taken queues in
``session_waiters``; the first in line is woken by a signal. Nothing is written until the run has succeeded; a failed
run leaves the session as it was.
"""

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import msgspec
import psycopg
import structlog

from gateway.crypto import Cipher
from gateway.errors import RunCancelled, SessionBusy, SessionNotFound
from gateway.storage.database import Pool
from gateway.storage.erasure import BESIDE_NO_ERASURE
from gateway.storage.schema import ANONYMOUS
from gateway.storage.signals import LIVING, RECONNECTED, STOP_RUN, TURN_FREE, Signals

log = structlog.get_logger(__name__)

Policy = Literal["enqueue", "reject", "interrupt"]
Statement = tuple[str, Sequence[Any] | Mapping[str, Any]]
"""A statement and its parameters."""

_LOOK_AGAIN_S = 1.0  # a signal may be missed, so a waiter looks by itself as well
_TICKET_S = 5.0  # how long a waiter that no longer looks (its process died) keeps its place
_SETTLE_WAIT_S = 1.0  # with the database away the client is waiting for its 503
_RETRY_S = 1.0
_NO_TICKET = 2**62  # behind all who wait


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
        self._hold_s = hold_s
        self._sleepers: dict[str, asyncio.Event] = {}
        """By owner."""
        self._settling: set[asyncio.Task[None]] = set()
        signals.on(TURN_FREE, self._wake)
        signals.on(RECONNECTED, self._wake_all)

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
        await self._check_owner(session_id, key_id)
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
                    raise _ended()  # what was forgotten must not come back in a fork
            cursor = await connection.execute(_COMMIT, mine)
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

    async def settle(self, statements: Sequence[Statement]) -> None:
        """Execute for certain, whoever is cancelled and whatever the database does; wait for that a moment at most."""
        task = asyncio.create_task(self._execute(statements), name="sessions")
        self._settling.add(task)  # the event loop keeps weak references only
        task.add_done_callback(self._settling.discard)
        await asyncio.wait({task}, timeout=_SETTLE_WAIT_S)  # unlike `wait_for`, it never cancels the task

    def _encrypted(self, turn: Turn, number: int, items: list[Any]) -> bytes:
        return self._cipher.encrypt(msgspec.json.encode(items), f"{turn.session_id}/{number}")

    async def _lost(self, connection: psycopg.AsyncConnection[Any], turn: Turn) -> Exception:
        cursor = await connection.execute("SELECT turn_owner FROM sessions WHERE session_id = %s", [turn.session_id])
        if await cursor.fetchone() in {(turn.owner,), None}:  # still ours, but interrupted; or forgotten
            return _ended()
        return SessionBusy(
            "Another run has gone on with the session, since this one took longer than a session's turn may be held, "
            "or its process seemed to be gone; its turn was not stored. Send the request again."
        )

    @asynccontextmanager
    async def _held(
        self, session_id: str, owner: str, key_id: str | None, policy: Policy, **new: str | None
    ) -> AsyncIterator[Turn]:
        """Hold the turn; ``new`` is what a session that begins with it has from the start."""
        turn = None
        try:
            # Inside, since a cancelled statement may have taken the turn before its answer was read.
            turns = await self._take(session_id, owner, key_id, _NO_TICKET, **new)
            if turns is None:
                turns = await self._queue(session_id, owner, key_id, policy)
            turn = Turn(session_id, turns + 1, owner, key_id or ANONYMOUS)
            yield turn
        finally:
            if turn is None or not turn.settled:
                await self._give_back(session_id, owner)

    @asynccontextmanager
    async def _held_if_last(self, session_id: str, number: int, owner: str, key_id: str) -> AsyncIterator[Turn | None]:
        """Hold the turn if it is free and turn ``number`` is the last one; give ``None`` otherwise, without waiting."""
        turn = Turn(session_id, number + 1, owner, key_id)
        try:
            is_last = await self._take(session_id, owner, key_id, _NO_TICKET) == number
            yield turn if is_last else None
        finally:
            if not turn.settled:
                await self._give_back(session_id, owner)

    async def _take(
        self,
        session_id: str,
        owner: str,
        key_id: str | None,
        ticket: int,
        user_id: str | None = None,
        forked_from: str | None = None,
    ) -> int | None:
        """Take the turn if it is free and nobody waits before us; return how many turns there are already."""
        parameters = {"session": session_id, "owner": owner, "key": key_id, "hold": self._hold_s, "ticket": ticket}
        parameters |= {"process": self._signals.process_id, "user": user_id, "forked_from": forked_from}
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_TAKE if key_id else _TAKE_KNOWN, parameters)
            row = await cursor.fetchone()
        return None if row is None else int(row[0])  # type: ignore[call-overload]

    async def _queue(self, session_id: str, owner: str, key_id: str | None, policy: Policy) -> int:
        """Wait in line for the turn; return how many turns there are."""
        await self._check_owner(session_id, key_id)
        if policy == "reject":
            raise SessionBusy("Another request has this session's turn. Wait for its answer, then send this one again.")
        first_in_line = self._sleepers[owner] = asyncio.Event()
        try:
            ticket = await self._draw_ticket(session_id, owner)
            while (turns := await self._take(session_id, owner, key_id, ticket)) is None:
                if policy == "interrupt":  # each time, since the signal may have been missed
                    await self._interrupt(session_id, ticket)
                with suppress(TimeoutError):
                    await asyncio.wait_for(first_in_line.wait(), _LOOK_AGAIN_S)
                first_in_line.clear()
                await self._keep_place(ticket, key_id)
            return turns
        finally:
            del self._sleepers[owner]
            await self.settle([(_LEAVE, {"session": session_id, "owner": owner})])

    async def _check_owner(self, session_id: str, key_id: str | None) -> None:
        async with self._pool.connection() as connection:
            cursor = await connection.execute("SELECT key_id FROM sessions WHERE session_id = %s", [session_id])
            row = await cursor.fetchone()
        _check_key(row[0] if row else None, key_id)

    async def _draw_ticket(self, session_id: str, owner: str) -> int:
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_DRAW, [session_id, owner, self._signals.process_id, _TICKET_S])
            row = await cursor.fetchone()
        return int(row[0]) if row else 0  # type: ignore[call-overload]

    async def _interrupt(self, session_id: str, ticket: int) -> None:
        async with self._pool.connection() as connection:
            await connection.execute(_INTERRUPT, {"session": session_id, "ticket": ticket})

    async def _keep_place(self, ticket: int, key_id: str | None) -> None:
        async with self._pool.connection() as connection:
            row = await (await connection.execute(_KEEP, [_TICKET_S, ticket])).fetchone()
        if row is None:
            raise _ended()
        _check_key(row[0], key_id)

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

    async def _give_back(self, session_id: str, owner: str) -> None:
        values = {"session": session_id, "owner": owner}
        await self.settle([(_GIVE_BACK, values), (_FIRST_IN_LINE, values)])

    async def _execute(self, statements: Sequence[Statement]) -> None:
        while not self._pool.closed:
            try:
                async with self._pool.connection() as connection:
                    for statement, parameters in statements:
                        await connection.execute(statement, parameters)
                return
            except psycopg.OperationalError as error:
                log.warning("the end of a run could not be noted; trying again", error=str(error))
                await asyncio.sleep(_RETRY_S)

    def _wake(self, owner: str) -> None:
        if first_in_line := self._sleepers.get(owner):
            first_in_line.set()

    def _wake_all(self, _: str) -> None:
        for first_in_line in self._sleepers.values():
            first_in_line.set()


def _check_key(found: object, key_id: str | None) -> None:
    """Raise `SessionNotFound` if a session of key ``found`` (``None``: there is none) is not for ``key_id``."""
    if (found is None and key_id is None) or (found and key_id and found != key_id):
        raise SessionNotFound("There is no such session. Leave the session id out to begin a new one.")


def _ended() -> RunCancelled:
    return RunCancelled("A newer request on this session, or its deletion, ended this run; nothing was stored.")


# This process lives, even while its own connection for signals is being made anew.
_IS_FREE = f"""
    (sessions.turn_owner IS NULL OR sessions.turn_until < now()
     OR sessions.turn_process <> %(process)s AND sessions.turn_process NOT IN ({LIVING}))
    AND NOT EXISTS (SELECT 1 FROM session_waiters AS waiter
                    WHERE waiter.session_id = sessions.session_id AND waiter.ticket < %(ticket)s
                      AND waiter.waiting_until > now()
                      AND (waiter.process_id = %(process)s OR waiter.process_id IN ({LIVING})))
"""
_TAKE = f"""
    INSERT INTO sessions (session_id, key_id, user_id, forked_from, turn_owner, turn_process, turn_until)
    VALUES (%(session)s, %(key)s, %(user)s, %(forked_from)s, %(owner)s, %(process)s,
            now() + make_interval(secs => %(hold)s))
    ON CONFLICT (session_id) DO UPDATE SET turn_owner = excluded.turn_owner, turn_process = excluded.turn_process,
        turn_until = excluded.turn_until, interrupted = false
    WHERE sessions.key_id = excluded.key_id AND {_IS_FREE}
    RETURNING turns
"""
_TAKE_KNOWN = f"""
    UPDATE sessions SET turn_owner = %(owner)s, turn_process = %(process)s, interrupted = false,
        turn_until = now() + make_interval(secs => %(hold)s)
    WHERE session_id = %(session)s AND {_IS_FREE}
    RETURNING turns
"""
_DRAW = """
    INSERT INTO session_waiters (session_id, owner, process_id, waiting_until)
    VALUES (%s, %s, %s, now() + make_interval(secs => %s)) RETURNING ticket
"""
_KEEP = """
    UPDATE session_waiters AS waiter SET waiting_until = now() + make_interval(secs => %s) WHERE ticket = %s
    RETURNING (SELECT key_id FROM sessions WHERE sessions.session_id = waiter.session_id)
"""
# The newest request counts: whoever has the turn and whoever waits for it is told to stop, unless a newer one has
# already told this one the same.
_INTERRUPT = f"""
    WITH newest AS (SELECT 1 FROM session_waiters WHERE ticket = %(ticket)s),
    passed AS (
        DELETE FROM session_waiters
        WHERE session_id = %(session)s AND ticket < %(ticket)s AND EXISTS (TABLE newest) RETURNING owner),
    holder AS (
        UPDATE sessions SET interrupted = true
        WHERE session_id = %(session)s AND turn_owner IS NOT NULL AND EXISTS (TABLE newest)
        RETURNING turn_owner AS owner)
    SELECT pg_notify('gateway', '{STOP_RUN}:' || owner) FROM (TABLE passed UNION ALL TABLE holder) AS ended
"""
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
_FIRST_IN_LINE = f"""
    SELECT pg_notify('gateway', '{TURN_FREE}:' || owner) FROM (
        SELECT owner FROM session_waiters WHERE session_id = %(session)s AND waiting_until > now()
        ORDER BY ticket LIMIT 1) AS waiter
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
    SELECT session_id, ({_FIRST_IN_LINE})::text FROM stored
"""
_STILL_THERE = "SELECT 1 FROM session_turns WHERE session_id = %s AND turn = %s AND created_at = %s"
_COPY = """
    INSERT INTO session_turns (session_id, turn, items, trace_id, continues, created_at) VALUES (%s, %s, %s, %s, %s, %s)
"""
# A session that never had a turn that succeeded is gone again, as if nothing had been asked.
_GIVE_BACK = """
    WITH gone AS (
        DELETE FROM sessions WHERE session_id = %(session)s AND turn_owner = %(owner)s AND turns = 0)
    UPDATE sessions SET turn_owner = NULL, turn_process = NULL, turn_until = NULL, interrupted = false
    WHERE session_id = %(session)s AND turn_owner = %(owner)s AND turns > 0
"""
_LEAVE = "DELETE FROM session_waiters WHERE session_id = %(session)s AND owner = %(owner)s"
