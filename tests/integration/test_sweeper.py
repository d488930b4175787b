"""Held conversations: let go when they are over or there is no room, and never beside a promotion."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from gateway.reloading import LiveSettings
from gateway.runs.line import TurnLine
from gateway.settings import Settings
from gateway.storage.database import Connection, Pool, open_pool
from gateway.storage.erasure import Subject, forget
from gateway.storage.signals import Signals
from gateway.tracing.handover.storing import FinishedRun, store_runs
from gateway.tracing.sweeper import _LOCK, Sweeper

from .runs import until

Rows = Callable[..., list[tuple[Any, ...]]]
MakeSweeper = Callable[..., Sweeper]
PAYLOAD_BYTES = 1000
HOUR_S = 3600.0
_ids = itertools.count()


def turn(session: str, *, rules: Iterable[str] = (), drawn: bool = False) -> FinishedRun:
    """Return a finished turn of a session that is sampled at a tenth."""
    return FinishedRun(
        trace_id=f"tr-{next(_ids):032x}",
        agent="math",
        agent_version="1",
        session_id=session,
        user_id=None,
        key_id="anonymous",
        process_id=1,
        failed=False,
        offline=True,
        started_ns=time.time_ns(),
        duration_ms=1.0,
        rate=0.1,
        drawn=drawn,
        rules=list(rules),
        state="pending",
        payload=b"x" * PAYLOAD_BYTES,
    )


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    """Connections to the test's database."""
    async with open_pool(database_url, max_size=5, name="sweeper") as pool:
        yield pool


@asynccontextmanager
async def storing(pool: Pool, *turns: FinishedRun) -> AsyncIterator[Connection]:
    """Store turns as a web process does; they are committed when the context is left."""
    async with pool.connection() as connection, connection.transaction():
        await store_runs(connection, turns, hold=True)
        yield connection


async def store(pool: Pool, *turns: FinishedRun) -> None:
    """Store turns in one batch."""
    async with storing(pool, *turns):
        pass


@pytest.fixture
def sweeper(pool: Pool, make_settings: Callable[..., Settings]) -> MakeSweeper:
    """Return a sweeper that lets everything stay for long, unless told otherwise."""

    def make(**overrides: float) -> Sweeper:
        return Sweeper(pool, LiveSettings(make_settings(**{"hold_s": HOUR_S} | overrides)))

    return make


def ended(rows: Rows, *sessions: str, seconds_ago: float = 1, owner: str | None = None) -> None:
    """Note that clients ended these sessions."""
    for session in sessions:
        rows(
            "INSERT INTO sessions (session_id, turns, used_at, ended_at, turn_owner, turn_until)"
            "VALUES (%s, 1, now() - interval '1 hour', now() - make_interval(secs => %s), %s, "
            "now() + interval '1 minute') RETURNING 1",
            session,
            seconds_ago,
            owner,
        )


def age(rows: Rows, session: str, seconds: float) -> None:
    """Move all that is known of a session into the past."""
    rows("UPDATE runs SET started_at = started_at - make_interval(secs => %s) WHERE session_id = %s RETURNING 1",
         seconds, session)  # fmt: skip
    rows("UPDATE sampled_sessions SET last_run_at = last_run_at - make_interval(secs => %s) WHERE session_id = %s "
         "RETURNING 1", seconds, session)  # fmt: skip


def states(rows: Rows) -> dict[str, str]:
    """Return the state of the runs of each session; `held` for what is held."""
    found = rows(
        "SELECT DISTINCT session_id, CASE WHEN held THEN 'held' ELSE state END "
        "FROM runs LEFT JOIN outbox USING (trace_id)"
    )
    assert len(dict(found)) == len(found)  # a conversation is never in two states
    return dict(found)


async def test_a_conversation_is_held_from_its_last_turn_on(pool, rows, sweeper) -> None:
    """All turns go when the last is longer ago than the hold; what was sampled, or is newer, stays."""
    await store(pool, turn("over"), turn("new"), turn("sampled", drawn=True))
    await store(pool, turn("over"))
    for session in ("over", "sampled"):
        age(rows, session, 400)
    age(rows, "new", 200)
    assert await sweeper(hold_s=300).sweep() == {"over": 2}
    assert states(rows) == {"over": "sampled_out", "new": "held", "sampled": "pending"}
    assert rows(
        "SELECT DISTINCT reason, swept_at = updated_at, kept_because FROM runs WHERE state = 'sampled_out'"
    ) == [(None, True, [])]
    assert rows("SELECT count(*) FROM outbox") == [(2,)]
    assert await sweeper(hold_s=300).sweep() == {}


async def test_an_ended_conversation_is_let_go_when_its_last_turns_have_come_in(pool, rows, sweeper) -> None:
    """The end lets go after a moment, unless a run is under way, or one began after it."""
    await store(pool, *map(turn, ("ended", "just", "running", "gone_on", "open")))
    for session in ("ended", "just", "running", "open"):
        age(rows, session, 10)
    ended(rows, "ended", "gone_on", seconds_ago=1)
    ended(rows, "just", seconds_ago=0)
    ended(rows, "running", owner="tr-1")
    assert await sweeper().sweep() == {"over": 1}
    assert states(rows) == {
        "ended": "sampled_out", "just": "held", "running": "held", "gone_on": "held", "open": "held"
    }  # fmt: skip


async def test_a_run_under_way_keeps_its_conversation_held(pool, rows, sweeper) -> None:
    """While a run is under way the hold does not run out; a run that died is not waited for."""
    await store(pool, turn("running"), turn("died"))
    ended(rows, "running", "died", owner="tr-1")
    rows("UPDATE sessions SET ended_at = NULL RETURNING 1")
    rows("UPDATE sessions SET turn_until = now() - interval '1 second' WHERE session_id = 'died' RETURNING 1")
    age(rows, "running", 400)
    age(rows, "died", 400)
    await sweeper(hold_s=300).sweep()
    assert states(rows) == {"running": "held", "died": "sampled_out"}


async def test_a_run_that_just_failed_may_still_promote(pool, rows, sweeper, database_url) -> None:
    """Until its trace can have come in a failed run keeps its conversation held: past the end, and past the hold."""
    await store(pool, turn("ended"), turn("old"))
    ended(rows, "ended", "old", seconds_ago=10, owner="tr-1")
    rows("UPDATE sessions SET ended_at = NULL WHERE session_id = 'old' RETURNING 1")
    age(rows, "ended", 20)
    age(rows, "old", 400)
    line = TurnLine(pool, Signals(database_url), hold_s=60)
    for session in ("ended", "old"):
        await line.give_back(session, "tr-1")
    assert rows("SELECT DISTINCT turn_owner FROM sessions") == [(None,)]
    assert await sweeper(hold_s=300).sweep() == {}
    await store(pool, turn("ended", rules=["error"]))
    rows("UPDATE sessions SET used_at = used_at - interval '1 second' RETURNING 1")
    assert await sweeper(hold_s=300).sweep() == {"over": 1}
    assert states(rows) == {"ended": "pending", "old": "sampled_out"}


async def test_the_oldest_go_when_there_is_no_room(pool, rows, sweeper) -> None:
    """Beyond the bytes that may be held, whole conversations go, the one with the oldest last turn first."""
    for number, session in enumerate(("a", "b", "c")):
        await store(pool, turn(session), turn(session))
        age(rows, session, 30 - 10 * number)
    await store(pool, turn("b"))
    full = sweeper(hold_max_bytes=5 * PAYLOAD_BYTES)
    assert await full.sweep() == {"hold_full": 2}
    assert states(rows) == {"a": "sampled_out", "b": "held", "c": "held"}
    assert rows("SELECT DISTINCT reason FROM runs WHERE state = 'sampled_out'") == [("hold_full",)]
    assert await full.sweep() == {}
    assert await sweeper(hold_max_bytes=0).sweep() == {"hold_full": 5}


async def test_a_promoted_conversation_is_never_let_go(pool, rows, sweeper) -> None:
    """Who meets a tail rule is kept whole, however long ago, ended, and without room."""
    await store(pool, turn("s"))
    await store(pool, turn("s", rules=["error"]))
    age(rows, "s", 400)
    ended(rows, "s")
    assert await sweeper(hold_s=0, hold_max_bytes=0).sweep() == {}
    assert states(rows) == {"s": "pending"}


async def test_a_promotion_under_way_wins(pool, rows, sweeper) -> None:
    """A conversation whose promotion is being stored is left alone, before its commit and after."""
    await store(pool, turn("s"), turn("other"))
    for session in ("s", "other"):
        age(rows, session, 400)
    async with storing(pool, turn("s", rules=["error"])):
        async with asyncio.timeout(5):  # does not wait for it either
            assert await sweeper(hold_s=300).sweep() == {"over": 1}
    assert await sweeper(hold_s=300).sweep() == {}
    assert states(rows) == {"s": "pending", "other": "sampled_out"}
    assert rows("SELECT DISTINCT inclusion_probability, kept_because FROM runs WHERE session_id = 's'") == [
        (1.0, ["error"])
    ]


async def test_a_promotion_that_comes_in_between_look_and_lock_wins(pool, rows, sweeper) -> None:
    """What was promoted, or went on, after the sweeper looked at it is not let go."""
    await store(pool, turn("promoted"), turn("gone_on"), turn("over"))
    for session in ("promoted", "gone_on", "over"):
        age(rows, session, 400)
    sweeping = sweeper(hold_s=300)
    async with pool.connection() as connection, connection.transaction():
        looked = await sweeping._over(connection)
        await store(pool, turn("promoted", rules=["slow"]), turn("gone_on"))
        assert len(looked) == 3
        assert await sweeping._let_go(connection, looked) == {"over": 1}
    assert states(rows) == {"promoted": "pending", "gone_on": "held", "over": "sampled_out"}


async def test_a_promotion_that_comes_after_keeps_what_comes_from_then_on(pool, rows, sweeper, database_url) -> None:
    """Who stores a turn while its conversation is let go waits, and finds its earlier turns gone, never half gone."""
    await store(pool, turn("s"))
    age(rows, "s", 400)
    sweeping = sweeper(hold_s=300)
    async with pool.connection() as connection, connection.transaction():
        await sweeping._let_go(connection, await sweeping._over(connection))
        late = asyncio.create_task(store(pool, turn("s", rules=["error"])))
        await until(lambda: rows("SELECT count(*) FROM pg_locks WHERE NOT granted") != [(0,)])
    await late
    assert rows("SELECT state, kept_because, inclusion_probability FROM runs ORDER BY started_at") == [
        ("sampled_out", [], 0.1),
        ("pending", ["error"], 1.0),
    ]
    assert rows("SELECT held FROM outbox") == [(False,)]


async def test_turns_and_sweeps_at_once_leave_nothing_half_done(pool, rows, sweeper) -> None:
    """However sweeps and promotions interleave, a run is either kept with its trace or sampled out without."""
    sessions = [f"s-{number}" for number in range(8)]

    async def talk(session: str) -> None:
        for number in range(6):
            await store(pool, turn(session, rules=["error"] if number == 3 else ()))

    talking = asyncio.gather(*map(talk, sessions))
    while not talking.done():
        await asyncio.gather(*(sweeper(hold_s=0).sweep() for _ in range(2)))
    await talking
    await sweeper(hold_s=0).sweep()
    odd = """
        SELECT state, held, kept_because FROM runs LEFT JOIN outbox USING (trace_id)
        WHERE NOT (state = 'pending' AND NOT held AND kept_because = '["error"]' AND inclusion_probability = 1
                   OR state = 'sampled_out' AND held IS NULL AND kept_because = '[]' AND inclusion_probability = 0.1)
    """
    assert rows(odd) == []
    kept = rows("SELECT count(*) FROM runs WHERE state = 'pending' GROUP BY session_id")
    assert len(kept) == len(sessions)
    assert all(count >= 3 for (count,) in kept)


async def test_one_process_at_a_time(pool, rows, sweeper, database_url) -> None:
    """While another process sweeps, a sweep leaves it to that one."""
    await store(pool, turn("s"))
    with psycopg.connect(database_url) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
        assert await sweeper(hold_s=0).sweep() == {}
    assert await sweeper(hold_s=0).sweep() == {"over": 1}


async def test_a_pile_is_let_go_in_batches(pool, rows, sweeper) -> None:
    """More conversations than a batch takes are let go in one sweep."""
    await store(pool, *(turn(f"s-{number}") for number in range(1100)))
    with capture_logs() as logs:
        assert await sweeper(hold_s=0).sweep() == {"over": 1100}
    assert [entry["over"] for entry in logs] == [1100]
    assert rows("SELECT count(*) FROM outbox") == [(0,)]


async def test_what_was_forgotten_meanwhile_stays_erased(pool, rows, sweeper) -> None:
    """A held conversation that is forgotten is erased, and nothing is left of it to let go."""
    await store(pool, turn("s"), turn("other"))
    erasure = await forget(pool, Subject("s"))
    assert erasure is not None
    assert erasure.done
    assert await sweeper(hold_s=0).sweep() == {"over": 1}
    assert sorted(rows("SELECT state FROM runs")) == [("erased",), ("sampled_out",)]
    assert rows("SELECT session_id FROM sampled_sessions") == [("other",)]


async def test_it_goes_on_after_an_error(database_url, rows, make_settings, monkeypatch) -> None:
    """While the database is away it says so and goes on; when it is back, it lets go."""
    monkeypatch.setattr("gateway.tracing.sweeper._AFTER_ERROR_S", 0.01)
    pool = open_pool(database_url, max_size=2, name="sweeper")  # gives no connection before it is opened
    logged = {"warning": asyncio.Event(), "info": asyncio.Event()}

    def notice(_logger: object, level: str, entry: Any) -> Any:
        logged[level].set()
        return entry

    with capture_logs(processors=[notice]):
        sweeping = asyncio.create_task(Sweeper(pool, LiveSettings(make_settings(hold_s=0))).run())
        async with asyncio.timeout(30):
            await logged["warning"].wait()
            async with pool:
                await store(pool, turn("s"))
                await logged["info"].wait()
                sweeping.cancel()
                await asyncio.wait({sweeping})
    assert states(rows) == {"s": "sampled_out"}
