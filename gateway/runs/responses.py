"""Stored answers of the Responses API: encrypted, each belonging to the API key that made it."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from gateway.crypto import Cipher
from gateway.errors import ResponseNotFound
from gateway.runs.requests import Run, RunRequest
from gateway.runs.sessions import Statement
from gateway.storage.database import Pool
from gateway.storage.signals import LIVING

Status = Literal["in_progress", "completed", "failed", "cancelled"]


class StoredResponse(NamedTuple):
    """A response as it is stored."""

    body: dict[str, Any]
    """As it was, or will be, answered."""
    status: Status
    input: list[Any]
    """Responses items of its request."""
    orphaned: bool
    """It is under way, says the database, and the process that ran it is gone."""


class Place(NamedTuple):
    """Where a response stands in a conversation."""

    session_id: str
    turn: int


class ResponseStore:
    """Reads and writes stored responses."""

    def __init__(self, pool: Pool, cipher: Cipher, process_id: int):
        self._pool = pool
        self._cipher = cipher
        self._process_id = process_id

    def put(
        self,
        run: Run,
        request: RunRequest,
        body: dict[str, Any],
        *,
        status: Status,
        session_id: str,
        user_id: str | None,
        turn: int | None,
    ) -> Statement:
        """Return the statement that stores a response, or what became of it.

        Args:
            run: the run that it is the answer of.
            request: what was asked.
            body: the response's JSON.
            status: where the run is.
            session_id: as stored.
            user_id: as stored.
            turn: the session's turn that it is the answer of; ``None`` if none was kept.
        """
        owner = self._process_id if status == "in_progress" else None
        stored = self._cipher.encrypt(msgspec.json.encode(body), run.response_id)
        asked = self._cipher.encrypt(msgspec.json.encode(request.items), f"{run.response_id}/input")
        return _PUT, [run.response_id, request.key_id, session_id, turn, user_id, status, owner, stored, asked]

    async def execute(self, statements: Sequence[Statement]) -> None:
        """Run statements of `put` by themselves."""
        async with self._pool.connection() as connection, connection.transaction():
            for statement, parameters in statements:
                await connection.execute(statement, parameters)

    async def get(self, response_id: str, key_id: str | None) -> StoredResponse:
        """Return a response; ``key_id`` ``None`` stands for every key. Raise `ResponseNotFound`."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_GET, [response_id, key_id, key_id])
            row = await cursor.fetchone()
        if row is None:
            raise _not_found(response_id)
        body, status, asked, orphaned = row
        return StoredResponse(
            msgspec.json.decode(self._cipher.decrypt(body, response_id)),  # type: ignore[arg-type]
            status,  # type: ignore[arg-type]
            msgspec.json.decode(self._cipher.decrypt(asked, f"{response_id}/input")),  # type: ignore[arg-type]
            bool(orphaned),
        )

    async def place(self, response_id: str, key_id: str) -> Place:
        """Return where a response stands; raise `ResponseNotFound` if nothing can follow it."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_PLACE, [response_id, key_id])
            row = await cursor.fetchone()
        if row is None:
            raise _not_found(response_id)
        return Place(str(row[0]), int(row[1]))  # type: ignore[call-overload]

    async def delete(self, response_id: str, key_id: str | None) -> None:
        """Delete a response; its turn stays in its session. Raise `ResponseNotFound`."""
        async with self._pool.connection() as connection:
            deleted = await connection.execute(_DELETE, [response_id, key_id, key_id])
        if not deleted.rowcount:
            raise _not_found(response_id)


def _not_found(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(
        f"There is no stored response {response_id[:100]!r} to go on with: it failed, is under way, has expired, or "
        "was made with store=false or another key."
    )


_PUT = """
    INSERT INTO responses (response_id, key_id, session_id, turn, user_id, status, process_id, body, input)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
    ON CONFLICT (response_id) DO UPDATE SET session_id = excluded.session_id, turn = excluded.turn,
        status = excluded.status, process_id = excluded.process_id, body = excluded.body
"""
_GET = f"""
    SELECT body, status, input, status = 'in_progress' AND process_id NOT IN ({LIVING}) FROM responses
    WHERE response_id = %s AND (%s::text IS NULL OR key_id = %s)
"""
_PLACE = """
    SELECT session_id, turn FROM responses
    WHERE response_id = %s AND key_id = %s AND turn IS NOT NULL AND status = 'completed'
"""
_DELETE = "DELETE FROM responses WHERE response_id = %s AND (%s::text IS NULL OR key_id = %s)"
