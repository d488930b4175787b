"""The line for a session's turn: one run at a time, in the order of arrival, over all web processes.

A row of ``sessions`` names the turn's owner, its process, and a time after which the turn is free again. The turn of a
process that died is free at once, since its advisory lock is gone (`gateway.storage.signals`). Who finds the turn taken
queues in ``session_waiters``; the first in line is woken by a signal.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import psycopg
import structlog

from gateway.errors import RunCancelled, SessionBusy, SessionNotFound
from gateway.storage.database import Pool
from gateway.storage.signals import LIVING, RECONNECTED, STOP_RUN, TURN_FREE, Signals

log = structlog.get_logger(__name__)

Policy = Literal["enqueue", "reject", "interrupt"]
Statement = tuple[str, Sequence[Any] | Mapping[str, Any]]
"""A statement and its parameters."""

_LOOK_AGAIN_S = 1.0  # a signal may be missed, so a waiter looks by itself as well
_TICKET_S = 5.0  # how long a waiter that no longer looks keeps its place
_SETTLE_WAIT_S = 1.0  # with the database away the client is waiting for its 503
_RETRY_S = 1.0
_NO_TICKET = 2**62  # behind all who wait


class Taken(NamedTuple):
    """A session whose turn was taken."""

    turns: int
    """How many it has already."""
    rate: float | None
    """Rate by which its first turn was drawn for sampling; ``None``: it was not drawn yet."""


class TurnLine:
    """Takes and gives back the turns of sessions. One a web process."""

    def __init__(self, pool: Pool, signals: Signals, *, hold_s: float):
        """Take the parts, and the seconds after which a turn is free again if its owner never gave it back."""
        self._pool = pool
        self._signals = signals
        self._hold_s = hold_s
        self._sleepers: dict[str, asyncio.Event] = {}
        """By owner."""
        self._settling: set[asyncio.Task[None]] = set()
        signals.on(TURN_FREE, self._wake)
        signals.on(RECONNECTED, self._wake_all)

    async def take(
        self,
        session_id: str,
        owner: str,
        key_id: str | None,
        *,
        ticket: int = _NO_TICKET,
        user_id: str | None = None,
        forked_from: str | None = None,
    ) -> Taken | None:
        """Take the turn if it is free and nobody waits before us.

        Args:
            session_id: as stored.
            owner: id that is used once.
            key_id: API key that the session belongs to, or will; ``None``: whichever, but there must be one.
            ticket: place in the line; without one, behind all who wait.
            user_id: user of a session that begins with this.
            forked_from: origin of a session that begins with this.

        Returns:
            ``None`` if the turn was not to be had.
        """
        parameters = {"session": session_id, "owner": owner, "key": key_id, "hold": self._hold_s, "ticket": ticket}
        parameters |= {"process": self._signals.process_id, "user": user_id, "forked_from": forked_from}
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_TAKE if key_id else _TAKE_KNOWN, parameters)
            row = await cursor.fetchone()
        return None if row is None else Taken(*row)  # type: ignore[arg-type]

    async def queue(self, session_id: str, owner: str, key_id: str | None, policy: Policy) -> Taken:
        """Wait in line for the turn, and take it.

        Raises:
            SessionNotFound: the session belongs to another key.
            SessionBusy: the policy is to reject.
            RunCancelled: a newer request with the policy to interrupt came.
        """
        await self.check_owner(session_id, key_id)
        if policy == "reject":
            raise SessionBusy("Another request has this session's turn. Wait for its answer, then send this one again.")
        first_in_line = self._sleepers[owner] = asyncio.Event()
        try:
            ticket = await self._draw_ticket(session_id, owner)
            while (taken := await self.take(session_id, owner, key_id, ticket=ticket)) is None:
                _check_cancelled()
                if policy == "interrupt":  # each time, since the signal may have been missed
                    await self._interrupt(session_id, ticket)
                with suppress(TimeoutError):
                    await asyncio.wait_for(first_in_line.wait(), _LOOK_AGAIN_S)
                first_in_line.clear()
                await self._keep_place(ticket, key_id)
            return taken
        finally:
            del self._sleepers[owner]
            await self.settle([(_LEAVE, {"session": session_id, "owner": owner})])

    async def check_owner(self, session_id: str, key_id: str | None) -> None:
        """Raise `SessionNotFound` if the session is another key's, or (``None``: any key will do) if there is none."""
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
            raise ended()
        _check_key(row[0], key_id)

    async def give_back(self, session_id: str, owner: str) -> None:
        """Free the turn, if the owner has it, and wake the first in line; the session is as it was before."""
        values = {"session": session_id, "owner": owner}
        await self.settle([(_GIVE_BACK, values), (FIRST_IN_LINE, values)])

    async def settle(self, statements: Sequence[Statement]) -> None:
        """Execute for certain, whoever is cancelled and whatever the database does; wait for that a moment at most."""
        task = asyncio.create_task(self._execute(statements), name="sessions")
        self._settling.add(task)  # the event loop keeps weak references only
        task.add_done_callback(self._settling.discard)
        await asyncio.wait({task}, timeout=_SETTLE_WAIT_S)  # unlike `wait_for`, it never cancels the task

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


def _check_cancelled() -> None:
    """Raise the cancellation that psycopg has lost (see `gateway.runs.active.ActiveRun.check`): we would wait on."""
    if (task := asyncio.current_task()) is not None and task.cancelling():
        raise asyncio.CancelledError


def _check_key(found: object, key_id: str | None) -> None:
    """Raise `SessionNotFound` if a session of key ``found`` (``None``: there is none) is not for ``key_id``."""
    if (found is None and key_id is None) or (found and key_id and found != key_id):
        raise SessionNotFound("There is no such session. Leave the session id out to begin a new one.")


def ended() -> RunCancelled:
    """Return what a run is told whose turn, or whose place in the line, was taken away."""
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
_RATE = "(SELECT rate FROM sampled_sessions AS sampled WHERE sampled.session_id = %(session)s)"
_TAKE = f"""
    INSERT INTO sessions (session_id, key_id, user_id, forked_from, turn_owner, turn_process, turn_until)
    VALUES (%(session)s, %(key)s, %(user)s, %(forked_from)s, %(owner)s, %(process)s,
            now() + make_interval(secs => %(hold)s))
    ON CONFLICT (session_id) DO UPDATE SET turn_owner = excluded.turn_owner, turn_process = excluded.turn_process,
        turn_until = excluded.turn_until, interrupted = false
    WHERE sessions.key_id = excluded.key_id AND {_IS_FREE}
    RETURNING turns, {_RATE}
"""
_TAKE_KNOWN = f"""
    UPDATE sessions SET turn_owner = %(owner)s, turn_process = %(process)s, interrupted = false,
        turn_until = now() + make_interval(secs => %(hold)s)
    WHERE session_id = %(session)s AND {_IS_FREE}
    RETURNING turns, {_RATE}
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
FIRST_IN_LINE = f"""
    SELECT pg_notify('gateway', '{TURN_FREE}:' || owner) FROM (
        SELECT owner FROM session_waiters
        WHERE session_id = %(session)s AND waiting_until > now() AND process_id IN ({LIVING})
        ORDER BY ticket LIMIT 1) AS waiter
"""
# A session that never had a turn that succeeded is gone again, as if nothing had been asked. What is held of another
# stays for a moment (`gateway.tracing.sweeper`): the trace of the run that failed comes in after this.
_GIVE_BACK = """
    WITH gone AS (
        DELETE FROM sessions WHERE session_id = %(session)s AND turn_owner = %(owner)s AND turns = 0)
    UPDATE sessions SET turn_owner = NULL, turn_process = NULL, turn_until = NULL, interrupted = false,
        used_at = now()
    WHERE session_id = %(session)s AND turn_owner = %(owner)s AND turns > 0
"""
_LEAVE = "DELETE FROM session_waiters WHERE session_id = %(session)s AND owner = %(owner)s"
