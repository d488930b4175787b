"""API keys: who is let in, when a change counts, and the commands that make, list and revoke them."""

import asyncio
import hashlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from litestar import Litestar, Request, Response, get
from litestar.testing import AsyncTestClient

from gateway.errors import ConfigurationError, GatewayError, ServiceUnavailable, Unauthenticated
from gateway.http.access import caller_of, challenge, require_scope
from gateway.settings import Settings
from gateway.storage.api_keys import SCOPES, KeyRing, any_key, check_open, create_key, list_keys, revoke_key
from gateway.storage.database import Pool, open_pool
from gateway.storage.embedded import running_url
from gateway.storage.schema import ANONYMOUS
from gateway.storage.signals import KEYS_CHANGED, Signals

ROOT = Path(__file__).parent.parent.parent
FORM = re.compile(r"gw_([0-9a-f]{8})_[A-Za-z0-9_-]{43}")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


class Clock:
    """A clock that stands still until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock of the test's own."""
    return Clock()


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    """A pool on the test's database."""
    async with open_pool(database_url, max_size=4, name="test") as opened:
        yield opened


@pytest.fixture
async def signals(database_url: str) -> AsyncIterator[Signals]:
    """The signals of a web process."""
    started = Signals(database_url)
    await started.start()
    yield started
    await started.stop()


@pytest.fixture
def ring(pool: Pool, signals: Signals, clock: Clock) -> KeyRing:
    """The key ring of a process that lets nobody in without a key."""
    return KeyRing(pool, signals, allow_anonymous=False, clock=clock)


@pytest.fixture
def told(signals: Signals) -> asyncio.Event:
    """Set when a change of the keys has come to the process, and its key ring knows."""
    event = asyncio.Event()
    signals.on(KEYS_CHANGED, lambda _subject: event.set())
    return event


@pytest.fixture
def make(pool: Pool, told: asyncio.Event) -> Callable[..., Any]:
    """Make a key as another process does, and wait until it is known; keyword arguments override."""

    async def making(**overrides: Any) -> str:
        values: dict[str, Any] = {"name": "app", "scopes": ["invoke"], "agents": None, "expires_at": None}
        values |= {"requests_per_minute": None, "concurrency": None} | overrides
        told.clear()
        async with pool.connection() as connection:
            key = await create_key(connection, **values)
        await asyncio.wait_for(told.wait(), 5)
        return key

    return making


async def refused(ring: KeyRing, key: str | None) -> str:
    """Return what is said to who is not let in."""
    with pytest.raises(Unauthenticated) as raised:
        await ring.caller(key)
    return str(raised.value)


async def test_everything_is_open_until_a_key_is_made(ring: KeyRing) -> None:
    """As long as no key was ever made, requests with and without one are anonymous and may do everything."""
    assert await ring.is_open()
    for key in (None, "sk-anything", f"gw_12345678_{'x' * 43}"):
        caller = await ring.caller(key)
        assert caller.key_id == ANONYMOUS
        assert caller.may("invoke")
        assert caller.may("admin")
        assert caller.may_use("math")


async def test_a_key_says_who_calls(ring: KeyRing, make: Callable[..., Any]) -> None:
    """A key's caller has the id, scopes, agents and limits that it was made with, and no other key is let in."""
    key = await make(scopes=["invoke", "ops"], agents=["math"], requests_per_minute=60, concurrency=2)
    caller = await ring.caller(key)
    assert FORM.fullmatch(key)
    assert (caller.key_id, caller.name) == (key.split("_")[1], "app")
    assert [scope for scope in SCOPES if caller.may(scope)] == ["invoke", "ops"]
    assert (caller.may_use("math"), caller.may_use("support")) == (True, False)
    assert (caller.requests_per_minute, caller.concurrency) == (60, 2)
    assert "Authorization: Bearer" in await refused(ring, None)
    for wrong in ("", "sk-other", key[:-1], key[:-1] + ("a" if key[-1] != "a" else "b"), key + "x", "gw_é"):
        assert "gateway keys create" in await refused(ring, wrong)


async def test_admin_may_everything(ring: KeyRing, make: Callable[..., Any]) -> None:
    """The scope admin implies all others."""
    caller = await ring.caller(await make(scopes=["admin"]))
    assert all(caller.may(scope) for scope in SCOPES)


async def test_only_a_hash_is_stored(make: Callable[..., Any], rows: Callable[..., Any]) -> None:
    """The database has the SHA-256 of the key, and the key nowhere."""
    key = await make()
    assert rows("SELECT secret_hash FROM api_keys") == [(hashlib.sha256(key.encode()).digest(),)]
    assert key.split("_", 2)[2] not in str(rows("SELECT k::text FROM api_keys k"))


async def test_anonymous_requests_where_they_are_allowed(
    pool: Pool, signals: Signals, make: Callable[..., Any]
) -> None:
    """Where anonymous requests are allowed they may invoke and give feedback, and a wrong key is still refused."""
    ring = KeyRing(pool, signals, allow_anonymous=True)
    await make()
    caller = await ring.caller(None)
    assert caller.key_id == ANONYMOUS
    assert [scope for scope in SCOPES if caller.may(scope)] == ["invoke", "feedback"]
    await refused(ring, "sk-other")


async def test_a_change_counts_at_once_in_other_processes(
    pool: Pool, ring: KeyRing, make: Callable[..., Any], told: asyncio.Event
) -> None:
    """A key that another process makes is let in, and one that it revokes is refused, as soon as the signal is here."""
    assert await ring.is_open()
    key = await make()
    assert not await ring.is_open()
    assert (await ring.caller(key)).name == "app"
    told.clear()
    async with pool.connection() as connection:
        assert await revoke_key(connection, key.split("_")[1])
        assert not await revoke_key(connection, key.split("_")[1])
        assert not await revoke_key(connection, "none")
    await asyncio.wait_for(told.wait(), 5)
    assert "revoked" in await refused(ring, key)
    assert not await ring.is_open()


async def test_a_missed_change_counts_soon(
    ring: KeyRing, clock: Clock, make: Callable[..., Any], database_url: str
) -> None:
    """Without any signal a new key is let in after a second, and one that is gone is refused after a few."""
    await ring.caller(await make())
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE api_keys SET revoked_at = now()")
        secret = f"gw_0a0b0c0d_{'s' * 43}"
        digest = hashlib.sha256(secret.encode()).digest()
        connection.execute(
            "INSERT INTO api_keys (key_id, name, secret_hash, scopes) VALUES ('0a0b0c0d', 'quiet', %s, '[]')", [digest]
        )
    clock.now = 1.0
    assert (await ring.caller(secret)).name == "quiet"
    with psycopg.connect(database_url) as connection:
        connection.execute("UPDATE api_keys SET revoked_at = now()")
    clock.now = 6.0
    await refused(ring, secret)


async def test_expiry_is_exact(ring: KeyRing, clock: Clock, make: Callable[..., Any]) -> None:
    """A key is refused from the moment it expires, although it was let in and is remembered."""
    key = await make(expires_at=datetime.now(UTC) + timedelta(seconds=4.9))
    await ring.caller(key)
    clock.now = 1.0
    await ring.caller(key)
    clock.now = 4.9
    assert "expired" in await refused(ring, key)


async def test_an_expired_key_counts_as_made(ring: KeyRing, make: Callable[..., Any], database_url: str) -> None:
    """When all keys have expired nothing is open again."""
    key = await make(expires_at=datetime.now(UTC) - timedelta(days=1))
    await refused(ring, key)
    await refused(ring, None)
    assert any_key(database_url)


async def test_requests_do_not_reach_the_database(ring: KeyRing, pool: Pool, make: Callable[..., Any]) -> None:
    """Neither a flood of wrong keys nor many requests with a right one cost more than one look at the database."""
    key = await make()
    before = pool.get_stats()["requests_num"]
    await asyncio.gather(*(ring.caller(key) for _ in range(50)))
    for number in range(200):
        await refused(ring, f"gw_{number:08x}_{'x' * 43}")
    assert pool.get_stats()["requests_num"] - before == 1


async def test_with_the_database_away_what_was_known_counts_for_a_minute(
    pool: Pool, ring: KeyRing, clock: Clock
) -> None:
    """While the keys cannot be read those last read count for a minute; then a request is told to come again."""
    await ring.caller(None)
    await pool.close()
    clock.now = 10.0
    await ring.caller(None)
    clock.now = 61.0
    with pytest.raises(ServiceUnavailable):
        await ring.caller(None)


async def test_keys_are_listed_without_their_secrets(pool: Pool, make: Callable[..., Any]) -> None:
    """The list has all keys in the order in which they were made, each with its state."""
    await make(name="first", agents=["math"])
    await make(name="old", expires_at=datetime(2020, 1, 1, tzinfo=UTC))
    gone = await make(name="gone")
    async with pool.connection() as connection:
        await revoke_key(connection, gone.split("_")[1])
        keys = await list_keys(connection)
    assert [(key.name, key.state) for key in keys] == [("first", "valid"), ("old", "expired"), ("gone", "revoked")]
    assert keys[0].agents == ["math"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_loopback_no_key_is_needed(make_settings: Callable[..., Settings], database_url: str, host: str) -> None:
    """Bound to loopback the gateway starts without a key, and knows that it is open."""
    assert check_open(make_settings(host=host), database_url)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "gateway.internal"])
async def test_where_others_can_reach_it_a_key_is_needed(
    make_settings: Callable[..., Settings], database_url: str, make: Callable[..., Any], host: str
) -> None:
    """Bound elsewhere it refuses to start without a key, unless it was told to."""
    with pytest.raises(ConfigurationError, match=f"GATEWAY_HOST is {host}.*GATEWAY_ALLOW_ANONYMOUS=1"):
        check_open(make_settings(host=host), database_url)
    assert check_open(make_settings(host=host, allow_anonymous=True), database_url)
    await make()
    assert not check_open(make_settings(host=host), database_url)


@pytest.fixture
async def guarded(ring: KeyRing) -> AsyncIterator[AsyncTestClient[Litestar]]:
    """An app with a route that is open to all, and one for each of two scopes."""

    @get("/open")
    async def open_route() -> str:
        return "open"

    @get("/invoke", opt={"scope": "invoke"})
    async def invoke_route(request: Request[Any, Any, Any]) -> str:
        return caller_of(request).name

    @get("/ops", opt={"scope": "ops"})
    async def ops_route(request: Request[Any, Any, Any]) -> str:
        return caller_of(request).name

    def answer(request: Request[Any, Any, Any], error: GatewayError) -> Response[str]:
        return Response(str(error), status_code=error.status, headers=challenge(request))

    app = Litestar(
        [open_route, invoke_route, ops_route], guards=[require_scope], exception_handlers={GatewayError: answer}
    )
    app.state.key_ring = ring
    async with AsyncTestClient(app) as client:
        yield client


@pytest.mark.parametrize("how", ["bearer", "x-api-key", "basic"])
async def test_a_key_is_taken_from_where_clients_put_it(
    guarded: AsyncTestClient[Litestar], make: Callable[..., Any], how: str
) -> None:
    """A key may come as a bearer token, in X-API-Key, or as a browser's password."""
    key = await make()
    match how:
        case "bearer":
            answer = await guarded.get("/invoke", headers={"Authorization": f"bearer {key}"})
        case "x-api-key":
            answer = await guarded.get("/invoke", headers={"X-API-Key": key, "Authorization": "Bearer of-the-proxy"})
        case _:
            answer = await guarded.get("/invoke", auth=("anyone", key))
    assert (answer.status_code, answer.text) == (200, "app")


async def test_the_guard_refuses(guarded: AsyncTestClient[Litestar], make: Callable[..., Any]) -> None:
    """Without a key it is 401 with the ways to send one, without the scope 403; what names no scope is open."""
    headers = {"Authorization": f"Bearer {await make()}"}
    assert (await guarded.get("/open")).status_code == 200
    for wrong in ({}, {"Authorization": "Bearer "}, {"Authorization": "Basic !"}, {"Authorization": "Bearer sk-1"}):
        answer = await guarded.get("/invoke", headers=wrong)
        assert (answer.status_code, answer.headers.get_list("www-authenticate")) == (401, ["Bearer"])
    page = await guarded.get("/ops")
    assert page.headers.get_list("www-authenticate") == ["Bearer", 'Basic realm="Agent Gateway"']
    denied = await guarded.get("/ops", headers=headers)
    assert denied.status_code == 403
    assert "scope 'ops'" in denied.text


async def test_a_browser_is_asked_for_a_key_where_anonymous_callers_may_not_go(
    guarded: AsyncTestClient[Litestar], pool: Pool, signals: Signals, make: Callable[..., Any]
) -> None:
    """An anonymous caller who lacks a scope is asked for a key, not sent away."""
    await make()
    guarded.app.state.key_ring = KeyRing(pool, signals, allow_anonymous=True)
    assert (await guarded.get("/invoke")).status_code == 200
    assert (await guarded.get("/ops")).status_code == 401


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def gateway(tmp_path: Path) -> Command:
    """Run a command on a home of the test's own; keyword arguments are settings."""

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"GATEWAY_HOME": str(tmp_path / "home")} | settings
        command = [sys.executable, "-m", "gateway", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    return run


@pytest.mark.parametrize("command", ["serve", "web"])
def test_the_start_is_refused(gateway: Command, database_url: str, command: str) -> None:
    """Neither all processes nor a single web process start where others can reach them and no key was made."""
    ports = {f"GATEWAY_{name}PORT": str(free_port()) for name in ("", "MLFLOW_")}
    done = gateway(command, GATEWAY_HOST="0.0.0.0", GATEWAY_DATABASE_URL=database_url, **ports)
    assert done.returncode == 2
    assert "Make one with `gateway keys create`, or set GATEWAY_ALLOW_ANONYMOUS=1" in done.stderr


async def test_the_commands(gateway: Command, ring: KeyRing, database_url: str) -> None:
    """A key is alone on standard output and is let in, the list shows it without its secret, revoked it is refused."""
    made = await asyncio.to_thread(
        gateway, "keys", "create", "app [1]", "--agent", "math", "--concurrency", "3", GATEWAY_DATABASE_URL=database_url
    )
    key = made.stdout.strip()
    assert FORM.fullmatch(key), made.stderr
    caller = await ring.caller(key)
    assert (caller.name, caller.scopes, caller.agents) == ("app [1]", {"invoke", "feedback"}, {"math"})
    shown = await asyncio.to_thread(gateway, "keys", "list", GATEWAY_DATABASE_URL=database_url)
    for expected in (caller.key_id, "app [1]", "invoke, feedback", "math", "3 at once", "never", "valid"):
        assert expected in shown.stdout
    assert key not in shown.stdout
    revoked = await asyncio.to_thread(gateway, "keys", "revoke", caller.key_id, GATEWAY_DATABASE_URL=database_url)
    again = await asyncio.to_thread(gateway, "keys", "revoke", caller.key_id, GATEWAY_DATABASE_URL=database_url)
    assert (revoked.returncode, again.returncode) == (0, 2)
    assert "gateway keys list" in again.stderr


def test_a_wrong_option_is_said(gateway: Command, database_url: str) -> None:
    """An option that cannot be meant makes no key and says what can be given."""
    expected = {
        ("--scope", "root"): "no scope root. There are: invoke, feedback, ops, admin",
        ("--agent", "nobody"): "no agent nobody. There are: math",
        ("--expires-days", "-1"): "--expires-days is -1",
        ("--expires-days", "nan"): "--expires-days is nan",
        ("--requests-per-minute", "0"): "--requests-per-minute is 0",
    }
    with ThreadPoolExecutor() as threads:
        done = threads.map(
            lambda option: gateway("keys", "create", "app", *option, GATEWAY_DATABASE_URL=database_url), expected
        )
    for each, said in zip(done, expected.values(), strict=True):
        assert (each.returncode, each.stdout) == (2, "")
        assert said in each.stderr
    assert not any_key(database_url)


def test_the_commands_start_the_embedded_database(gateway: Command, tmp_path: Path) -> None:
    """Where the embedded Postgres does not run, a command runs it for its own time."""
    key = gateway("keys", "create", "app", "--scope", "admin").stdout.strip()
    assert FORM.fullmatch(key)
    assert running_url(tmp_path / "home") is None
    assert key.split("_")[1] in gateway("keys", "list").stdout
