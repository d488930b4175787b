"""`Idempotency-Key`: one request runs, the others get its answer; web processes come and go meanwhile."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import psycopg
import psycopg.conninfo
import pytest

from gateway.crypto import DamagedData, Keys
from gateway.errors import IdempotencyKeyInUse, IdempotencyKeyReused, InvalidRequest
from gateway.runs.idempotency import LARGEST_ANSWER_BYTES, Claim, IdempotencyStore, StoredAnswer
from gateway.settings import sibling_database
from gateway.storage.database import open_pool
from gateway.storage.erasure import Subject, forget
from gateway.storage.signals import Signals

KEYS = Keys(b"a secret of some length")
REQUEST = b"POST /invocations\n{}"
ANSWER = StoredAnswer(200, {"content-type": "text/plain", "x-session": "a header"}, b"the answer \xff\x00")

Process = Callable[..., AbstractAsyncContextManager[IdempotencyStore]]


@pytest.fixture
def process(database_url: str) -> Process:
    """The store of a web process that lives for as long as the context."""

    @asynccontextmanager
    async def living(keys: Keys = KEYS, *, keep_s: float = 60, wait_s: float = 30) -> AsyncIterator[IdempotencyStore]:
        signals = Signals(database_url)
        await signals.start()
        try:
            async with open_pool(database_url, max_size=5, name="idempotency") as pool:
                hash_key = keys.derive("idempotency")
                yield IdempotencyStore(pool, keys.answers, hash_key, signals.process_id, keep_s=keep_s, wait_s=wait_s)
        finally:
            await signals.stop()

    return living


@pytest.fixture
async def store(process: Process) -> AsyncIterator[IdempotencyStore]:
    """The store of one living web process."""
    async with process() as store:
        yield store


@pytest.fixture
async def other(process: Process) -> AsyncIterator[IdempotencyStore]:
    """The store of another living web process, that does not wait for twins."""
    async with process(wait_s=0) as store:
        yield store


async def claim(store: IdempotencyStore, request: bytes = REQUEST) -> Claim:
    """Begin, and be the one that is to run."""
    begun = await store.begin("key-1", "once", request)
    assert isinstance(begun, Claim)
    return begun


async def hammer(*stores: IdempotencyStore) -> tuple[Claim, set[asyncio.Task[StoredAnswer | Claim]]]:
    """Begin twenty times at once; return the first claim and those that wait for it."""
    begins = [stores[number % len(stores)].begin("key-1", "once", REQUEST) for number in range(20)]
    return await next_claim({asyncio.create_task(begin) for begin in begins})


async def next_claim(
    waiting: set[asyncio.Task[StoredAnswer | Claim]],
) -> tuple[Claim, set[asyncio.Task[StoredAnswer | Claim]]]:
    """Return the only claim among those that wait, and the rest of them."""
    done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    [begun] = [task.result() for task in done]
    assert isinstance(begun, Claim)
    return begun, waiting


async def test_one_runs_and_all_others_get_its_answer(process, store) -> None:
    """Of twenty requests at once over two processes one runs, and all others get its whole answer."""
    async with process() as second:
        claim, waiting = await hammer(store, second)
        await claim.store(ANSWER, "s-1")
        assert await asyncio.gather(*waiting) == [ANSWER] * 19
        assert await second.begin("key-1", "once", REQUEST) == ANSWER


async def test_a_dropped_claim_goes_to_exactly_one_other(process, store) -> None:
    """When the first gives up one of those that wait runs, and so on, until there is an answer."""
    async with process() as second:
        claim, waiting = await hammer(store, second)
        for _ in range(3):
            await claim.drop()
            claim, waiting = await next_claim(waiting)
        await claim.store(ANSWER, None)
        assert await asyncio.gather(*waiting) == [ANSWER] * 16


async def test_a_claim_is_ended_once(store) -> None:
    """A claim that was ended does nothing any more, neither to its own answer nor to a later claim."""
    first = await claim(store)
    await first.drop()
    second = await claim(store)
    await first.store(StoredAnswer(500, {}, b"late"), None)
    await first.drop()
    await second.store(ANSWER, None)
    await second.drop()
    assert await store.begin("key-1", "once", REQUEST) == ANSWER


async def test_another_request_with_the_same_key(store) -> None:
    """Another body is refused at once, while the first is under way and when it was answered."""
    first = await claim(store)
    with pytest.raises(IdempotencyKeyReused):
        await store.begin("key-1", "once", REQUEST + b" ")
    await first.store(ANSWER, None)
    with pytest.raises(IdempotencyKeyReused):
        await store.begin("key-1", "once", REQUEST + b" ")


async def test_a_twin_does_not_wait_forever(store, other) -> None:
    """A request whose twin takes too long is told so, and the twin goes on."""
    first = await claim(store)
    with pytest.raises(IdempotencyKeyInUse):
        await other.begin("key-1", "once", REQUEST)
    await first.store(ANSWER, None)
    assert await other.begin("key-1", "once", REQUEST) == ANSWER


async def test_two_api_keys_do_not_meet(store, rows) -> None:
    """Two API keys may use the same idempotency key, and nobody can tell from the stored rows."""
    await claim(store)
    assert isinstance(await store.begin("key-2", "once", b"another"), Claim)
    assert rows("SELECT count(DISTINCT idempotency_key) FROM idempotency_keys") == [(2,)]


@pytest.mark.parametrize("key", ["", "k" * 256, "a\nb", "a\x00b", "\x7f", "a\x9f"])
async def test_a_key_of_the_wrong_form(store, key) -> None:
    """A key that is empty, too long, or has control characters is refused."""
    with pytest.raises(InvalidRequest, match="1 to 255 characters"):
        await store.begin("key-1", key, REQUEST)


@pytest.mark.parametrize("key", ["k" * 255, "ünïcode 🙂", " "])
async def test_a_key_of_any_other_form(store, key) -> None:
    """Any other text is a key."""
    assert isinstance(await store.begin("key-1", key, REQUEST), Claim)


async def test_the_claim_of_a_dead_process_is_taken_over(process, other) -> None:
    """What a process was at when it died may be run by another at once, by exactly one, whatever its body."""
    async with process() as dying:
        lost = await claim(dying)
        with pytest.raises(IdempotencyKeyInUse):
            await other.begin("key-1", "once", REQUEST)
    async with process() as third:
        taken, waiting = await hammer(third)
        await lost.store(StoredAnswer(500, {}, b"late"), None)
        await taken.store(ANSWER, None)
        assert await asyncio.gather(*waiting) == [ANSWER] * 19


async def test_a_process_is_not_dead_to_itself(other, rows) -> None:
    """A process whose connection for signals was lost for a moment does not take over what it is at itself."""
    await claim(other)
    assert rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'gateway-signals'")
    with pytest.raises(IdempotencyKeyInUse):
        await other.begin("key-1", "once", REQUEST)


async def test_the_answer_of_a_dead_process_stays(process, other) -> None:
    """An answer outlives the process that made it."""
    async with process() as dying:
        await (await claim(dying)).store(ANSWER, None)
    assert await other.begin("key-1", "once", REQUEST) == ANSWER


@pytest.mark.parametrize("answered", [True, False])
async def test_an_expired_key_is_a_new_one(store, other, rows, answered) -> None:
    """A key that has expired counts as never used: one of twenty runs, its answer replaces the old one."""
    first = await claim(store, b"another request")
    if answered:
        await first.store(StoredAnswer(200, {}, b"old"), "s-1")
    rows("UPDATE idempotency_keys SET expires_at = now() - interval '1 second' RETURNING 1")
    second, waiting = await hammer(store)
    assert rows("SELECT answer, session_id FROM idempotency_keys") == [(None, None)]
    await second.store(ANSWER, "s-2")
    assert await asyncio.gather(*waiting) == [ANSWER] * 19
    assert rows("SELECT session_id FROM idempotency_keys") == [("s-2",)]


async def test_an_answer_is_kept_from_when_it_was_given(process, rows) -> None:
    """The time that an answer is kept begins when it is stored, not when its request came."""
    async with process(keep_s=3600) as store:
        first = await claim(store)
        rows("UPDATE idempotency_keys SET expires_at = now() + interval '1 second' RETURNING 1")
        await first.store(ANSWER, None)
    [(left,)] = rows("SELECT extract(epoch FROM expires_at - now())::int FROM idempotency_keys")
    assert 3500 < left <= 3600


async def test_secret_keys_rotate(process) -> None:
    """An answer is found and read with a new secret in front of the old one, and one of the new one as well."""
    rotated = Keys(b"a new secret in front", b"a secret of some length")
    async with process() as before, process(rotated) as after:
        await (await claim(before)).store(ANSWER, None)
        assert await after.begin("key-1", "once", REQUEST) == ANSWER
        later = await after.begin("key-1", "later", REQUEST)
        assert isinstance(later, Claim)
        await later.store(ANSWER, None)
        assert await after.begin("key-1", "later", REQUEST) == ANSWER


async def test_nothing_readable_is_stored(store, rows) -> None:
    """Neither the key nor the request nor the answer can be read from the database, nor moved to another key."""
    for key in ("a key of mine", "another key"):
        begun = await store.begin("key-1", key, b"what I ask")
        assert isinstance(begun, Claim)
        await begun.store(ANSWER, None)
    for row in rows("SELECT idempotency_key, request_hash, answer, owner FROM idempotency_keys"):
        text = b"".join(each.encode() if isinstance(each, str) else bytes(each) for each in row)
        assert not any(part in text for part in (b"key", b"ask", b"answer", b"header", b"plain"))
    rows("UPDATE idempotency_keys SET answer = (SELECT answer FROM idempotency_keys LIMIT 1) RETURNING 1")
    outcomes = [await outcome(store.begin("key-1", key, b"what I ask")) for key in ("a key of mine", "another key")]
    assert sorted(map(type, outcomes), key=str) == [DamagedData, StoredAnswer]


async def outcome(begin: Coroutine[Any, Any, object]) -> object:
    """What it returns, or the error it raises."""
    [outcome] = await asyncio.gather(begin, return_exceptions=True)
    return outcome


async def test_an_answer_of_a_session_that_was_forgotten(store, rows, database_url) -> None:
    """An answer that came while its session was forgotten is not kept; one of the session as it was begun anew is."""
    rows("INSERT INTO sessions (session_id) VALUES ('s-1') RETURNING 1")
    early = await claim(store)
    async with open_pool(database_url, max_size=2, name="erasure") as pool:
        assert await forget(pool, Subject(session_id="s-1"))
    await early.store(StoredAnswer(200, {}, b"forgotten"), "s-1")
    assert rows("SELECT count(*) FROM idempotency_keys") == [(0,)]
    await (await claim(store)).store(ANSWER, "s-1")
    assert await store.begin("key-1", "once", REQUEST) == ANSWER


async def test_an_answer_too_large_to_keep(store, rows) -> None:
    """The largest answer is kept; a larger one is not, and the next request with its key runs."""
    too_large = await claim(store)
    await too_large.store(StoredAnswer(200, {}, b"x" * (LARGEST_ANSWER_BYTES + 1)), None)
    assert rows("SELECT count(*) FROM idempotency_keys") == [(0,)]
    largest = StoredAnswer(200, {}, b"x" * LARGEST_ANSWER_BYTES)
    await (await claim(store)).store(largest, None)
    assert await store.begin("key-1", "once", REQUEST) == largest


async def test_a_client_that_goes_away_while_it_begins(store, other) -> None:
    """A request that is cancelled at any moment of its beginning leaves the key to the next one."""
    turns, done = 0, False
    while not done:
        begin = asyncio.create_task(store.begin("key-1", "once", REQUEST))
        for _ in range(turns):
            await asyncio.sleep(0)
        done = not begin.cancel()
        await asyncio.wait({begin})
        if not begin.cancelled():
            done = True
            await begin.result().drop()
        await (await claim(other)).drop()
        turns += 1
    assert turns > 3


@pytest.mark.parametrize("turns", range(8))
async def test_a_client_that_goes_away_while_its_claim_ends(store, turns) -> None:
    """A claim is given up, and an answer stored, although the request is cancelled at that moment."""

    async def end_and_cancel(end: Coroutine[Any, Any, None]) -> None:
        ending = asyncio.create_task(end)
        for _ in range(turns + 1):
            await asyncio.sleep(0)
        ending.cancel()
        await asyncio.wait({ending})

    await end_and_cancel((await claim(store)).drop())
    await end_and_cancel((await claim(store)).store(ANSWER, None))
    assert await store.begin("key-1", "once", REQUEST) == ANSWER


async def test_a_claim_ends_although_the_database_is_away(process, store, database_url) -> None:
    """A claim that is given up while the database is away does not hold its caller up, and is free when it is back."""
    name = psycopg.conninfo.conninfo_to_dict(database_url)["dbname"]
    first = await claim(store)
    async with process() as second:
        with psycopg.connect(sibling_database(database_url, "postgres"), autocommit=True) as admin:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            admin.execute(_CUT_OFF, [name])
            async with asyncio.timeout(5):
                await first.drop()
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
        await (await claim(second)).store(ANSWER, None)


_CUT_OFF = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = %s AND application_name = 'gateway-idempotency'
"""
