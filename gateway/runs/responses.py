"""Stored answers of the Responses API: encrypted, each belonging to the API key that made it."""

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from gateway.crypto import Cipher
from gateway.errors import InvalidRequest, ResponseNotFound
from gateway.runs.history import as_input
from gateway.runs.line import Statement
from gateway.runs.requests import Run, RunRequest
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
        known: bool,
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
            known: it was stored as under way. If it was deleted since, it stays so.
        """
        stored = self._cipher.encrypt(msgspec.json.encode(body), run.response_id)
        if known:
            return _FINISH, [session_id, turn, status, stored, run.response_id]
        owner = self._process_id if status == "in_progress" else None
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
            cursor = await connection.execute(_GET, [self._process_id, response_id, key_id, key_id])
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
            error = ResponseNotFound(
                f"No stored response {response_id[:100]!r} can be gone on with: there is none, it failed, is under way "
                "or has expired, or it was made with store=false or another key."
            )
            error.param = "previous_response_id"
            raise error
        return Place(str(row[0]), int(row[1]))  # type: ignore[call-overload]

    async def resolve(self, items: Sequence[Any], key_id: str) -> list[Any]:
        """Return the items with every reference to an item of a stored response replaced by that item.

        Raises:
            InvalidRequest: there is no such item.
        """
        outputs: dict[str, dict[str, Any]] = {}
        resolved = []
        for number, item in enumerate(items):
            if item.get("type") != "item_reference":
                resolved.append(item)
                continue
            if item["id"] not in outputs:
                outputs |= {each["id"]: each for each in await self._output_with(item["id"], key_id)}
            if item["id"] not in outputs:
                raise InvalidRequest(
                    f"There is no stored item {item['id'][:100]!r}. Send the item itself, or use previous_response_id.",
                    f"input[{number}].id",
                )
            if (whole := as_input(outputs[item["id"]])) is not None:
                resolved.append(whole)
        return resolved

    async def _output_with(self, item_id: str, key_id: str) -> list[dict[str, Any]]:
        """Return the output of the response that an item's id tells; none if there is no such response."""
        if (found := _ITEM_ID.fullmatch(item_id)) is None:
            return []
        try:
            return list((await self.get(f"resp_{found[1]}", key_id)).body["output"])
        except ResponseNotFound:
            return []

    async def delete(self, response_id: str, key_id: str | None) -> None:
        """Delete a response; its turn stays in its session. Raise `ResponseNotFound`."""
        async with self._pool.connection() as connection:
            deleted = await connection.execute(_DELETE, [response_id, key_id, key_id])
        if not deleted.rowcount:
            raise _not_found(response_id)


_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})_\d+")  # see `gateway.runs.items.item_id_of`


def _not_found(response_id: str) -> ResponseNotFound:
    return ResponseNotFound(
        f"There is no stored response {response_id[:100]!r}, or it has expired, or it was made with store=false or "
        "another key."
    )


_PUT = """
    INSERT INTO responses (response_id, key_id, session_id, turn, user_id, status, process_id, body, input)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
_FINISH = """
    UPDATE responses SET session_id = %s, turn = %s, status = %s, process_id = NULL, body = %s WHERE response_id = %s
"""
_GET = f"""
    SELECT body, status, input, status = 'in_progress' AND process_id <> %s AND process_id NOT IN ({LIVING})
    FROM responses
    WHERE response_id = %s AND (%s::text IS NULL OR key_id = %s)
"""
_PLACE = """
    SELECT session_id, turn FROM responses
    WHERE response_id = %s AND key_id = %s AND turn IS NOT NULL AND status = 'completed'
"""
_DELETE = "DELETE FROM responses WHERE response_id = %s AND (%s::text IS NULL OR key_id = %s)"
