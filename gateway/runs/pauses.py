"""Runs that wait for a person's decision: kept until it comes, in any process, and used once.

A tool with ``needs_approval`` pauses its run. The turn so far is committed, with the tool call left open, and the
SDK's run state is stored beside it. The answer takes the state out, in one transaction, before anything runs: a second
answer finds nothing to run. A new message on the session drops the paused run; the call then counts as not approved.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from gateway.crypto import Cipher
from gateway.errors import ApprovalNotFound, ApprovalUsed, InvalidRequest
from gateway.runs.execution import Snapshot
from gateway.runs.line import Statement
from gateway.runs.requests import ApprovalAnswer, ApprovalRequest
from gateway.runs.sessions import Turn
from gateway.storage.database import Pool

_USED = "This approval was answered before, or the conversation went on without it; nothing was run."


class Paused(NamedTuple):
    """Where a run waits for an approval."""

    session_id: str
    agent: str | None
    """``None``: it waits no more."""


class PausedRuns:
    """Stores and takes out paused runs."""

    def __init__(self, pool: Pool, cipher: Cipher):
        self._pool = pool
        self._cipher = cipher

    def keep(
        self, turn: Turn, trace_id: str, agent: str, snapshot: Snapshot, approvals: Sequence[ApprovalRequest]
    ) -> list[Statement]:
        """Return the statements that store a run which paused in ``turn``."""
        stored = self._cipher.encrypt(msgspec.json.encode(snapshot), trace_id)
        pause: Statement = (_PAUSE, [trace_id, turn.session_id, turn.number, agent, stored])
        requests = [(each.approval_id, turn.session_id, trace_id, each.call_id) for each in approvals]
        return [pause, *((_REQUEST, request) for request in requests)]

    def drop(self, turn: Turn) -> list[Statement]:
        """Return the statements by which a turn makes every approval before it void."""
        return [(_VOID, [turn.session_id]), (_DROP, [turn.session_id])]

    async def find(self, approval_id: str, key_id: str) -> Paused:
        """Return what an approval is for; raise `ApprovalNotFound` if the key has none of that id."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_FIND, [approval_id, key_id])
            row: Any = await cursor.fetchone()
        if row is None:
            raise _not_found(approval_id)
        return Paused(*row)

    async def take(self, turn: Turn, answers: Sequence[ApprovalAnswer]) -> tuple[Snapshot, dict[str, ApprovalAnswer]]:
        """Take out the run that these answers are for; from here on they cannot be used again.

        Returns:
            The run, and the answers by the id of the call that each is about.

        Raises:
            ApprovalNotFound: there is no such approval in this session.
            ApprovalUsed: it was answered before, or the conversation went on.
            InvalidRequest: the run waits for further approvals that were not answered along; nothing was used.
        """
        by_id = {answer.approval_id: answer for answer in answers}
        async with self._pool.connection() as connection, connection.transaction():
            cursor = await connection.execute(_LOCK, [list(by_id), turn.session_id])
            found: dict[Any, Any] = {row[0]: row[1:] for row in await cursor.fetchall()}
            for approval_id in by_id:
                if approval_id not in found:
                    raise _not_found(approval_id)
            if any(used for _, _, used in found.values()):
                raise ApprovalUsed(_USED)
            trace_ids = {trace_id for trace_id, _, _ in found.values()}
            cursor = await connection.execute(_OPEN, [list(trace_ids)])
            missing = sorted({str(row[0]) for row in await cursor.fetchall()} - set(by_id))
            if missing or len(trace_ids) > 1:
                raise InvalidRequest(
                    "Answer all approvals of one run in one request"
                    + (f"; still open: {', '.join(missing)}." if missing else ", and those of no other run."),
                    "approvals",
                )
            cursor = await connection.execute(_TAKE, [trace_ids.pop(), turn.number - 1])
            row: Any = await cursor.fetchone()
            if row is None:
                raise ApprovalUsed(_USED)
            await connection.execute("UPDATE approvals SET used = true WHERE approval_id = ANY(%s)", [list(by_id)])
        trace_id, stored = row
        snapshot = msgspec.json.decode(self._cipher.decrypt(stored, trace_id), type=Snapshot)
        return snapshot, {call_id: by_id[approval_id] for approval_id, (_, call_id, _) in found.items()}


def _not_found(approval_id: str) -> ApprovalNotFound:
    return ApprovalNotFound(f"There is no approval request {approval_id!r}. Use the id that the answer carried.")


_PAUSE = "INSERT INTO paused_runs (trace_id, session_id, turn, agent, snapshot) VALUES (%s, %s, %s, %s, %s)"
_REQUEST = "INSERT INTO approvals (approval_id, session_id, trace_id, call_id) VALUES (%s, %s, %s, %s)"
_VOID = "UPDATE approvals SET used = true WHERE session_id = %s AND NOT used"
_DROP = "DELETE FROM paused_runs WHERE session_id = %s"
_FIND = """
    SELECT session_id, agent
    FROM approvals JOIN sessions USING (session_id) LEFT JOIN paused_runs USING (session_id, trace_id)
    WHERE approval_id = %s AND key_id = %s
"""
_LOCK = """
    SELECT approval_id, trace_id, call_id, used FROM approvals
    WHERE approval_id = ANY(%s) AND session_id = %s FOR UPDATE
"""
_OPEN = "SELECT approval_id FROM approvals WHERE trace_id = ANY(%s) AND NOT used"
_TAKE = "DELETE FROM paused_runs WHERE trace_id = %s AND turn = %s RETURNING trace_id, snapshot"
