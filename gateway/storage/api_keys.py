"""API keys: who may call, what for, and how much.

A key is shown once, when it is made; the database has its hash. The rows of all valid keys fit into memory, so a web
process reads them at once, every few seconds, and checks each request without a round trip, wrong keys included.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import math
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import psycopg
from psycopg.rows import class_row
from psycopg.types.json import Jsonb

from gateway.errors import ConfigurationError, ServiceUnavailable, Unauthenticated
from gateway.settings import Settings
from gateway.storage.database import Pool
from gateway.storage.schema import ANONYMOUS
from gateway.storage.signals import KEYS_CHANGED, RECONNECTED, SEND, Signals

SCOPES = ("invoke", "feedback", "ops", "admin")
"""What a key may be for; ``admin`` implies all others."""

_FORM = re.compile(r"gw_([0-9a-f]{8})_[\w-]{43}", re.ASCII)
_FRESH_S = 5.0  # a change comes as a signal; this is for one that was missed
_LOOK_AGAIN_S = 1.0  # as above, for a key that is not known (yet): a flood of wrong ones costs one statement a second
_STALE_S = 60.0  # while the database is away nobody can revoke a key either, and runs say by themselves what is wrong
_HOW = "send `Authorization: Bearer <key>`; a key is made with `gateway keys create`."


@dataclass(frozen=True)
class Caller:
    """Who makes a request, and what they may do."""

    key_id: str
    """Owner of what the request makes: the id of the API key, or `gateway.storage.schema.ANONYMOUS`."""
    name: str
    """Name of the key, for messages."""
    scopes: frozenset[str]
    agents: frozenset[str] | None
    """Agents that it may use; ``None``: all."""
    requests_per_minute: int | None
    """``None``: what the setting says."""
    concurrency: int | None
    """Requests at once; ``None``: what the setting says."""

    def may(self, scope: str) -> bool:
        """Whether the caller has one of `SCOPES`."""
        return scope in self.scopes or "admin" in self.scopes

    def may_use(self, agent: str) -> bool:
        """Whether the caller may use the agent of that name."""
        return self.agents is None or agent in self.agents


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key, of which the key itself is no part."""

    key_id: str
    name: str
    scopes: list[str]
    agents: list[str] | None
    """``None``: all."""
    requests_per_minute: int | None
    """``None``: what the setting says."""
    concurrency: int | None
    """``None``: what the setting says."""
    created_at: datetime
    expires_at: datetime | None
    """``None``: never."""
    state: Literal["valid", "expired", "revoked"]


async def create_key(
    connection: psycopg.AsyncConnection[Any],
    name: str,
    scopes: list[str],
    agents: list[str] | None,
    expires_at: datetime | None,
    requests_per_minute: int | None,
    concurrency: int | None,
) -> str:
    """Store a new key and return it, ``gw_<id, 8 hex>_<32 random bytes in base64url>``; nobody can read it again.

    The arguments are those of `ApiKey`.
    """
    key_id = secrets.token_hex(4)
    key = f"gw_{key_id}_{secrets.token_urlsafe(32)}"
    limits = [requests_per_minute, concurrency]
    values = [key_id, name, _hash(key), Jsonb(scopes), None if agents is None else Jsonb(agents), *limits, expires_at]
    async with connection.transaction():
        await connection.execute(_CREATE, values)
        await connection.execute(SEND, [KEYS_CHANGED, ""])
    return key


async def list_keys(connection: psycopg.AsyncConnection[Any]) -> list[ApiKey]:
    """Return all keys that were ever made, the oldest first."""
    async with connection.cursor(row_factory=class_row(ApiKey)) as cursor:
        return await (await cursor.execute(_LIST)).fetchall()


async def revoke_key(connection: psycopg.AsyncConnection[Any], key_id: str) -> bool:
    """Make a key worthless from now on; return whether there was such a key that was not revoked before."""
    async with connection.transaction():
        revoked = await connection.execute(_REVOKE, [key_id])
        await connection.execute(SEND, [KEYS_CHANGED, ""])
    return revoked.rowcount == 1


def any_key(url: str) -> bool:
    """Return whether a key was ever made in the database of ``url``; expired and revoked ones count."""
    with psycopg.connect(url) as connection:
        return connection.execute(_EVER_MADE).fetchone() == (True,)


def check_open(settings: Settings, url: str) -> bool:
    """Return whether everything is open to everyone who reaches the gateway, since no key was ever made.

    Raises:
        ConfigurationError: it is, other machines can reach it, and nobody said that this is meant.
    """
    if any_key(url):
        return False
    if not settings.allow_anonymous and not _is_loopback(settings.host):
        raise ConfigurationError(
            f"GATEWAY_HOST is {settings.host}, which others can reach, and there is no API key. Make one with "
            "`gateway keys create`, or set GATEWAY_ALLOW_ANONYMOUS=1 to serve without."
        )
    return True


@dataclass(frozen=True)
class _Known:
    """A key that is valid."""

    caller: Caller
    secret_hash: bytes
    ends: float
    """Reading of the clock at which it expires."""


@dataclass(frozen=True)
class _Keys:
    """All keys at one moment."""

    valid: dict[str, _Known]
    """By id."""
    ever_made: bool
    read_at: float
    """Reading of the clock."""


class KeyRing:
    """Tells who makes a request."""

    def __init__(
        self, pool: Pool, signals: Signals, *, allow_anonymous: bool, clock: Callable[[], float] = time.monotonic
    ):
        """Take the pool, what tells of changes, and the rule for requests without a key.

        Args:
            pool: connections to the database.
            signals: tells when keys were made or revoked.
            allow_anonymous: whether a request without a key may invoke and give feedback although there are keys.
            clock: seconds that only grow.
        """
        self._pool = pool
        self._allow_anonymous = allow_anonymous
        self._clock = clock
        self._keys: _Keys | None = None
        self._try_at = 0.0  # the database was away; no request looks again before that
        self._reading: asyncio.Task[_Keys] | None = None
        for kind in (KEYS_CHANGED, RECONNECTED):
            signals.on(kind, self._forget)

    async def caller(self, key: str | None) -> Caller:
        """Return who sent ``key``; ``None`` means that none was sent.

        As long as no key was ever made, everyone may do everything, whatever key they send: OpenAI's clients always
        send one.

        Raises:
            Unauthenticated: the key is unknown, expired or revoked; or none was sent and one is needed.
            ServiceUnavailable: the database is away.
        """
        keys = await self._read(_FRESH_S)
        if not keys.ever_made:
            return _OPEN
        if key is not None:
            return await self._owner(keys, key)
        if not self._allow_anonymous:
            raise Unauthenticated(f"The request has no API key: {_HOW}")
        return _ANONYMOUS

    async def is_open(self) -> bool:
        """Return whether no key was ever made; raise `ServiceUnavailable` if the database is away."""
        return not (await self._read(_FRESH_S)).ever_made

    async def _owner(self, keys: _Keys, key: str) -> Caller:
        if form := _FORM.fullmatch(key):
            if form[1] not in keys.valid:
                keys = await self._read(_LOOK_AGAIN_S)
            known = keys.valid.get(form[1])
            if known and hmac.compare_digest(known.secret_hash, _hash(key)) and self._clock() < known.ends:
                return known.caller
        raise Unauthenticated(f"The API key is not valid: unknown, expired or revoked. Instead, {_HOW}")

    async def _read(self, fresh_s: float) -> _Keys:
        """Return the keys as they were not longer than ``fresh_s`` ago; those who ask at once share one read."""
        if self._keys is not None and self._clock() < self._keys.read_at + fresh_s:
            return self._keys
        if self._keys is not None and self._clock() < min(self._try_at, self._keys.read_at + _STALE_S):
            return self._keys
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._query(), name="api-keys")
        reading = self._reading
        try:
            keys = await asyncio.shield(reading)
        except ServiceUnavailable:
            self._try_at = self._clock() + _LOOK_AGAIN_S
            if self._keys is not None and self._clock() < self._keys.read_at + _STALE_S:
                return self._keys
            raise
        if reading is self._reading:  # else the keys have changed meanwhile
            self._keys = keys
        return keys

    async def _query(self) -> _Keys:
        read_at = self._clock()
        try:
            async with self._pool.connection() as connection:
                rows: list[Any] = await (await connection.execute(_VALID)).fetchall()
                made = await (await connection.execute(_EVER_MADE)).fetchone()
        except psycopg.OperationalError as error:
            raise ServiceUnavailable(
                "The gateway cannot reach its database, so it cannot check API keys. Try again shortly."
            ) from error
        return _Keys({row[0]: _known(row, read_at) for row in rows}, ever_made=made == (True,), read_at=read_at)

    def _forget(self, _subject: str) -> None:
        self._keys = self._reading = None


def _known(row: tuple[Any, ...], read_at: float) -> _Known:
    key_id, name, scopes, agents, requests_per_minute, concurrency, secret_hash, remaining_s = row
    allowed = None if agents is None else frozenset(agents)
    caller = Caller(key_id, name, frozenset(scopes), allowed, requests_per_minute, concurrency)
    return _Known(caller, secret_hash, math.inf if remaining_s is None else read_at + remaining_s)


def _hash(key: str) -> bytes:
    """Return what is stored of a key.

    A plain hash: what makes a password's hash slow is that people choose guessable ones. Nobody guesses 256 random
    bits, however fast, and a slow hash would be paid by every request.
    """
    return hashlib.sha256(key.encode()).digest()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


_OPEN = Caller(ANONYMOUS, ANONYMOUS, frozenset(SCOPES), None, None, None)
_ANONYMOUS = Caller(ANONYMOUS, ANONYMOUS, frozenset({"invoke", "feedback"}), None, None, None)

_CREATE = """
    INSERT INTO api_keys
        (key_id, name, secret_hash, scopes, agents, requests_per_minute, concurrency, expires_at)
    VALUES (%s, %s, %s, %s, %s, %s, %s, %s)
"""
_LIST = """
    SELECT key_id, name, scopes, agents, requests_per_minute, concurrency, created_at, expires_at,
        CASE WHEN revoked_at IS NOT NULL THEN 'revoked' WHEN expires_at <= now() THEN 'expired' ELSE 'valid' END
            AS state
    FROM api_keys ORDER BY created_at, key_id
"""
_REVOKE = "UPDATE api_keys SET revoked_at = now() WHERE key_id = %s AND revoked_at IS NULL"
# The seconds that are left, not the time: a process's own clock may be wrong.
_VALID = """
    SELECT key_id, name, scopes, agents, requests_per_minute, concurrency, secret_hash,
        extract(epoch FROM expires_at - clock_timestamp())::float8
    FROM api_keys WHERE revoked_at IS NULL AND (expires_at > now()) IS NOT FALSE
"""
_EVER_MADE = "SELECT EXISTS (SELECT FROM api_keys)"
