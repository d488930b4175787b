"""``Idempotency-Key``: a request that is sent again gets the answer of the first instead of a second run.

A key belongs to an API key and to one request, told by its fingerprint. The first request claims a row; what it was
answered is kept in it. Those that come meanwhile wait for that answer. A claim counts while its web process lives, and
is given up by it if the request failed in a way that a retry may cure: the next one runs.

Nothing readable is stored: keys and fingerprints as keyed hashes, answers encrypted and bound to their row. The hashes
come from the oldest secret key; when that one is dropped, all keys are new ones.
"""

import asyncio
import hmac
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import psycopg
import structlog
from psycopg_pool import PoolTimeout

from gateway.crypto import Cipher, keyed_hash
from gateway.errors import IdempotencyKeyInUse, IdempotencyKeyReused, InvalidRequest
from gateway.storage.database import Pool
from gateway.storage.erasure import BESIDE_NO_ERASURE
from gateway.storage.signals import LIVING

log = structlog.get_logger(__name__)

LARGEST_ANSWER_BYTES = 5_000_000
"""Bytes of a body that is kept at the most: a thousand times a usual answer, still written in a fraction of a second.
A larger answer is not kept and gives its claim up, so that the same key runs again."""

_KEY = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,255}")
_FIRST_WAIT_S = 0.02
_LONGEST_WAIT_S = 0.25
_RETRY_S = 1.0
_END_WAIT_S = 1.0  # with the database away the client is waiting for its 503


@dataclass(frozen=True)
class StoredAnswer:
    """A whole answer as it went out; of a stream, all of its bytes."""

    status: int
    headers: dict[str, str]
    body: bytes


class _Row(NamedTuple):
    """What names a row, and a claim of it."""

    key_id: str
    name: bytes
    """Keyed hash of the idempotency key."""
    owner: str

    @property
    def context(self) -> str:
        return f"{self.key_id}/{self.name.hex()}"


_End = Callable[[Sequence[str], dict[str, object]], Awaitable[None]]


class Claim:
    """The right, and the duty, to answer for an idempotency key: end it with `store` or `drop`.

    Both go on in the background where the caller is cancelled or the database is away, so that no key stays taken.
    Only the first of them counts; neither does anything if the row was lost meanwhile.
    """

    def __init__(self, row: _Row, cipher: Cipher, end: _End, *, keep_s: float):
        self._row = row
        self._cipher = cipher
        self._end = end
        self._keep_s = keep_s

    async def store(self, answer: StoredAnswer, session_id: str | None) -> None:
        """Keep the answer for all that send the key again.

        Args:
            answer: the whole answer; with more than `LARGEST_ANSWER_BYTES` it is dropped instead.
            session_id: session that the answer tells of, with which it is forgotten; if it was already since the claim
                began, the answer is dropped. ``None``: there is none.
        """
        if len(answer.body) > LARGEST_ANSWER_BYTES:
            log.warning("an answer is too large to be kept for its idempotency key", answer_bytes=len(answer.body))
            await self.drop()
            return
        stored = self._cipher.encrypt(msgspec.msgpack.encode(answer), self._row.context)
        values = self._row._asdict() | {"answer": stored, "session": session_id, "keep": self._keep_s}
        await self._end((BESIDE_NO_ERASURE, _STORE, _DROP), values)  # what was not stored is dropped

    async def drop(self) -> None:
        """Give the key back unless an answer is stored: the next request that has it runs."""
        await self._end((_DROP,), self._row._asdict())


class IdempotencyStore:
    """Hands out claims and stored answers. One a web process."""

    def __init__(self, pool: Pool, cipher: Cipher, hash_key: bytes, process_id: int, *, keep_s: float, wait_s: float):
        """Take the parts and two bounds.

        Args:
            pool: connections to the database.
            cipher: encrypts the answers.
            hash_key: hides idempotency keys and fingerprints.
            process_id: of this web process, from `Signals`: its claims count for as long as it lives.
            keep_s: seconds for which an answer is kept.
            wait_s: seconds for which a request waits for its twin.
        """
        self._pool = pool
        self._cipher = cipher
        self._hash_key = hash_key
        self._process_id = process_id
        self._keep_s = keep_s
        self._wait_s = wait_s
        self._ends: set[asyncio.Task[None]] = set()

    async def begin(self, key_id: str, idempotency_key: str, fingerprint: bytes) -> StoredAnswer | Claim:
        """Return the answer that is there already, or the claim to make it; wait for a twin that is under way.

        Args:
            key_id: the API key, or `gateway.storage.schema.ANONYMOUS`.
            idempotency_key: what the client sent; two API keys may use the same one.
            fingerprint: what makes the request: its method, path and body.

        Raises:
            InvalidRequest: the idempotency key is empty, too long, or has control characters.
            IdempotencyKeyReused: it came with another fingerprint before.
            IdempotencyKeyInUse: the twin is still under way after the time that may be waited.
            psycopg.OperationalError: the database is away.
        """
        if not _KEY.fullmatch(idempotency_key):
            raise InvalidRequest("Idempotency-Key must have 1 to 255 characters, none of them a control character.")
        # A prefix, since both are hashed with one key; `keyed_hash` cannot take bytes.
        request = hmac.digest(self._hash_key, b"request\n" + fingerprint, "sha256")
        row = _Row(key_id, keyed_hash(self._hash_key, key_id, idempotency_key), uuid.uuid4().hex)
        deadline, pause_s = time.monotonic() + self._wait_s, _FIRST_WAIT_S
        while not await self._take(row, request):
            if (answer := await self._read(row, request)) is not None:
                return answer
            if time.monotonic() >= deadline:
                raise IdempotencyKeyInUse(
                    "A request with this Idempotency-Key is still under way. Send it again later to get its answer."
                )
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _LONGEST_WAIT_S)
        return Claim(row, self._cipher, self._end, keep_s=self._keep_s)

    async def _take(self, row: _Row, request: bytes) -> bool:
        """Claim the row if nobody has it: there is none, it has expired, or its process died on it."""
        values = row._asdict() | {"request": request, "process": self._process_id, "keep": self._keep_s}
        try:
            async with self._pool.connection() as connection:
                return (await connection.execute(_TAKE, values)).rowcount == 1
        except PoolTimeout:
            raise  # nothing was sent
        except BaseException:
            # The statement may have taken the row before its answer was read.
            await self._end((_DROP,), row._asdict())
            raise

    async def _read(self, row: _Row, request: bytes) -> StoredAnswer | None:
        """Return the answer, ``None`` if there is none yet; raise `IdempotencyKeyReused`."""
        async with self._pool.connection() as connection:
            cursor = await connection.execute(_READ, row._asdict())
            found = await cursor.fetchone()
        if found is None:
            return None  # dropped since we tried to take it
        known_request, stored = found
        if known_request != request:
            raise IdempotencyKeyReused(
                "This Idempotency-Key was sent before with another request. Use a new key for each new request."
            )
        if stored is None:
            return None
        plain = self._cipher.decrypt(stored, row.context)  # type: ignore[arg-type]
        return msgspec.msgpack.decode(plain, type=StoredAnswer)

    async def _end(self, statements: Sequence[str], values: dict[str, object]) -> None:
        """End a claim for certain, and wait for that a moment at the most."""
        task = asyncio.create_task(self._execute(statements, values), name="idempotency")
        self._ends.add(task)  # the event loop keeps weak references only
        task.add_done_callback(self._ends.discard)
        done, _ = await asyncio.wait({task}, timeout=_END_WAIT_S)  # unlike `wait_for`, it never cancels the task
        for each in done:
            each.result()

    async def _execute(self, statements: Sequence[str], values: dict[str, object]) -> None:
        while not self._pool.closed:
            try:
                async with self._pool.connection() as connection, connection.transaction():
                    for statement in statements:
                        await connection.execute(statement, values)
                return
            except psycopg.OperationalError as error:
                log.warning("an idempotency key could not be settled; trying again", error=str(error))
                await asyncio.sleep(_RETRY_S)


# A row of this process is never a dead one's, even while its own connection for signals is being made anew.
_TAKE = f"""
    INSERT INTO idempotency_keys AS known (key_id, idempotency_key, request_hash, owner, process_id, expires_at)
    VALUES (%(key_id)s, %(name)s, %(request)s, %(owner)s, %(process)s, now() + make_interval(secs => %(keep)s))
    ON CONFLICT (key_id, idempotency_key) DO UPDATE SET
        request_hash = excluded.request_hash, owner = excluded.owner, process_id = excluded.process_id,
        session_id = NULL, answer = NULL, created_at = now(), expires_at = excluded.expires_at
    WHERE known.expires_at <= now()
       OR known.answer IS NULL AND known.process_id <> excluded.process_id AND known.process_id NOT IN ({LIVING})
"""
_READ = """
    SELECT request_hash, answer FROM idempotency_keys
    WHERE key_id = %(key_id)s AND idempotency_key = %(name)s AND expires_at > now()
"""
_STORE = """
    UPDATE idempotency_keys
    SET answer = %(answer)s, session_id = %(session)s, expires_at = now() + make_interval(secs => %(keep)s)
    WHERE key_id = %(key_id)s AND idempotency_key = %(name)s AND owner = %(owner)s AND answer IS NULL
      AND NOT EXISTS (SELECT 1 FROM erased_sessions AS erased
                      WHERE erased.session_id = %(session)s AND erased_at >= idempotency_keys.created_at)
"""
_DROP = """
    DELETE FROM idempotency_keys
    WHERE key_id = %(key_id)s AND idempotency_key = %(name)s AND owner = %(owner)s AND answer IS NULL
"""
