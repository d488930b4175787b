"""The limits of API keys, over two web processes: here two instances of what a web process has, on one database."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

import psycopg
import pytest

from gateway.errors import ConcurrencyLimited, RateLimited, ServiceUnavailable
from gateway.storage.allowances import Admission, Allowances
from gateway.storage.api_keys import Caller
from gateway.storage.database import Pool, open_pool
from gateway.storage.schema import ANONYMOUS
from gateway.storage.signals import Signals

KEY = Caller("0a0b0c0d", "app", frozenset({"invoke"}), None, None, None)
ANONYMOUS_CALLER = Caller(ANONYMOUS, ANONYMOUS, frozenset({"invoke"}), None, None, None)

Pair = Callable[..., Any]
Rows = Callable[..., list[tuple[Any, ...]]]


@dataclass
class Process:
    """The parts of a web process that limits need."""

    pool: Pool
    signals: Signals
    allowances: Allowances

    async def admit(self, caller: Caller = KEY) -> Admission:
        """Let a request in."""
        return await self.allowances.admit(caller)

    @property
    def statements(self) -> int:
        """How often a connection to the database was wanted."""
        return self.pool.get_stats().get("requests_num", 0)


@asynccontextmanager
async def running(url: str, rate: int | None, concurrency: int | None, **clock: Any) -> AsyncIterator[Process]:
    """Run what a web process runs."""
    async with AsyncExitStack() as stack:
        signals = Signals(url)
        await signals.start()
        stack.push_async_callback(signals.stop)
        pool = await stack.enter_async_context(open_pool(url, max_size=5, name="test"))
        allowances = Allowances(pool, signals, requests_per_minute=rate, concurrency=concurrency, **clock)
        await allowances.start()
        stack.push_async_callback(allowances.stop)
        yield Process(pool, signals, allowances)


@pytest.fixture
def pair(database_url: str) -> Pair:
    """Run two processes with the same limits."""

    @asynccontextmanager
    async def two(*, rate: int | None = None, concurrency: int | None = None, **clock: Any) -> AsyncIterator[Any]:
        async with (
            running(database_url, rate, concurrency, **clock) as one,
            running(database_url, rate, concurrency, **clock) as other,
        ):
            yield one, other

    return two


async def eventually(look: Callable[[], Any], expected: Any) -> None:
    """Wait until the database has what is expected of it: it does not tell by itself."""
    async with asyncio.timeout(10):
        while await asyncio.to_thread(look) != expected:  # noqa: ASYNC110 - as said
            await asyncio.sleep(0.05)


async def admitted(requests: list[Awaitable[Admission]]) -> list[Admission]:
    """Make requests at once and return the admissions; all others were refused by a limit."""
    answers = await asyncio.gather(*requests, return_exceptions=True)
    assert all(isinstance(answer, Admission | RateLimited) for answer in answers)
    return [answer for answer in answers if isinstance(answer, Admission)]


async def test_without_limits_nothing_is_asked(pair: Pair) -> None:
    """A caller without limits costs no statement."""
    async with pair() as (one, _):
        before = one.statements
        for _ in range(10):
            (await one.admit()).release()
        assert one.statements == before


async def test_no_more_at_once_than_allowed(pair: Pair) -> None:
    """Of 200 requests over two processes never more than the limit are under way, and in the end all were."""
    under_way: set[int] = set()
    most = 0

    async def request(process: Process, number: int) -> None:
        nonlocal most
        while True:
            try:
                admission = await process.admit()
                break
            except ConcurrencyLimited:
                continue
        under_way.add(number)
        most = max(most, len(under_way))
        await asyncio.sleep(0.005 * (number % 4))
        under_way.remove(number)
        admission.release()

    async with pair(concurrency=7) as processes:
        await asyncio.gather(*(request(processes[number % 2], number) for number in range(200)))
    assert most == 7


async def test_one_at_a_time_in_turns(pair: Pair) -> None:
    """With a limit of one the idle process gives up its slot to the other, request by request."""
    async with pair(concurrency=1) as (one, other):
        for _ in range(5):
            (await one.admit()).release()
            (await other.admit()).release()


async def test_a_full_house_is_said(pair: Pair) -> None:
    """When all slots are in use the error says how many there are and when to come again."""
    async with pair(concurrency=1) as (one, other):
        admission = await one.admit()
        for process in (one, other):
            with pytest.raises(ConcurrencyLimited, match="API key 'app' may have 1 requests under way") as raised:
                await process.admit()
            assert raised.value.retry_after_s == 1.0
        (await other.admit(ANONYMOUS_CALLER)).release()  # another key has slots of its own
        admission.release()
        (await other.admit()).release()


async def test_a_slot_goes_to_who_waits(pair: Pair) -> None:
    """A request that waits gets the slot that becomes free, in its own process or in the other."""
    async with pair(concurrency=1) as (one, other):
        for process in (one, other):
            admission = await one.admit()
            waiting = asyncio.create_task(process.admit())
            await asyncio.sleep(0.05)  # until it has been told that there is none
            admission.release()
            admission.release()  # the second time is nothing
            (await waiting).release()


async def test_a_request_that_is_given_up_leaves_its_slot(pair: Pair) -> None:
    """A request that is cancelled while it waits, or just when it was let in, takes no slot with it."""
    async with pair(concurrency=1) as (one, _):
        admission = await one.admit()
        early, late = asyncio.create_task(one.admit()), asyncio.create_task(one.admit())
        await asyncio.sleep(0.01)
        early.cancel()
        await asyncio.wait([early])
        admission.release()  # hands the slot to `late`
        late.cancel()
        await asyncio.wait([late])
        assert (early.cancelled(), late.cancelled()) == (True, True)
        (await one.admit()).release()


async def test_the_slots_of_a_dead_process_are_free(pair: Pair) -> None:
    """What a process held when it died is free at once."""
    async with pair(concurrency=3) as (one, other):
        for _ in range(3):
            await one.admit()
        with pytest.raises(ConcurrencyLimited):
            await other.admit()
        await one.signals.stop()  # which is how the others see that it is gone
        assert len(await admitted([other.admit() for _ in range(5)])) == 3


async def test_a_lost_connection_does_not_lose_slots(pair: Pair, database_url: str, rows: Rows) -> None:
    """A process that counted as dead for a moment holds its slots again, even if they were written off."""
    async with pair(concurrency=1) as (one, other):
        admission = await one.admit()
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute("DELETE FROM key_slots")
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND application_name = 'gateway-signals'"
            )
        await eventually(lambda: rows("SELECT slots FROM key_slots"), [(1,)])
        with pytest.raises(ConcurrencyLimited):
            await other.admit()
        admission.release()


async def test_what_nobody_uses_is_given_back(pair: Pair, rows: Rows) -> None:
    """Leased slots and tokens that no request needs are back in the database after a moment, and at the stop."""
    held = "SELECT sum(slots) FROM key_slots"
    async with pair(rate=6000, concurrency=100) as (one, other):
        (await one.admit()).release()
        assert rows(held) == [(5,)]
        assert rows("SELECT tokens FROM key_budgets") == [(5700.0,)]
        await eventually(lambda: rows(held), [(0,)])
        await eventually(lambda: rows("SELECT tokens BETWEEN 5999 AND 6000 FROM key_budgets"), [(True,)])
        (await other.admit()).release()
        assert rows(held) == [(5,)]
    assert rows(held) == [(0,)]
    assert rows("SELECT tokens BETWEEN 5998 AND 6000 FROM key_budgets") == [(True,)]


async def test_a_minute_has_no_more_requests_than_allowed(pair: Pair) -> None:
    """Two processes together let in what a full bucket has and what flows in meanwhile, and not one request more."""
    begun = time.monotonic()
    async with pair(rate=600) as processes:
        total = await admitted([processes[number % 2].admit() for number in range(1000)])
    assert 600 <= len(total) <= 600 + 10 * (time.monotonic() - begun)


async def test_no_token_is_refused_while_another_process_holds_it(pair: Pair) -> None:
    """What one process has leased of a minute's requests and not spent, the other can spend."""
    async with pair(rate=200) as (one, other):
        await one.admit()  # leases ten
        assert len(await admitted([other.admit() for _ in range(199)])) == 199


async def test_refused_requests_do_not_reach_the_database(pair: Pair) -> None:
    """When a minute's requests are used up the error says until when, and a flood of more costs no statement."""
    async with pair(rate=1, clock=lambda: 0.0) as (one, _):
        await one.admit()
        with pytest.raises(
            RateLimited, match=r"API key 'app' may make 1 requests a minute.*again in (59|60) s"
        ) as raised:
            await one.admit()
        assert 58 < (raised.value.retry_after_s or 0) <= 60
        before = one.statements
        assert await admitted([one.admit() for _ in range(200)]) == []
        assert one.statements == before


async def test_a_request_seldom_pays_a_round_trip(pair: Pair) -> None:
    """Fifty requests, one after the other, cost a few statements, not one each."""
    async with pair(rate=6000, concurrency=100) as (one, _):
        before = one.statements
        for _ in range(50):
            (await one.admit()).release()
        assert one.statements - before <= 5


async def test_a_refused_request_costs_nothing_of_its_minute(pair: Pair) -> None:
    """A request that finds no slot leaves its token to the next."""
    async with pair(rate=2, concurrency=1) as (one, _):
        admission = await one.admit()
        with pytest.raises(ConcurrencyLimited):
            await one.admit()
        admission.release()
        (await one.admit()).release()
        with pytest.raises(RateLimited, match="a minute"):
            await one.admit()


async def test_a_key_may_have_limits_of_its_own(pair: Pair) -> None:
    """A key's own limits come before those of the settings."""
    async with pair(rate=1, concurrency=1) as (one, _):
        own = replace(KEY, requests_per_minute=5, concurrency=3)
        assert len(await admitted([one.admit(own) for _ in range(5)])) == 3


async def test_the_database_away_is_said(pair: Pair) -> None:
    """A request that needs more than was leased is told to come again when the database is away."""
    async with pair(rate=60, concurrency=1) as (one, _):
        await one.pool.close()
        with pytest.raises(ServiceUnavailable):
            await one.admit()
