"""Retention: what is past its time goes, what is in use stays, and nobody waits for it."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import psycopg
import pytest
from structlog.testing import capture_logs

from gateway.storage import retention
from gateway.storage.database import Pool, open_pool
from gateway.storage.retention import Retention
from gateway.storage.signals import Signals


@pytest.fixture
async def pool(database_url: str) -> AsyncIterator[Pool]:
    """Connections to the test's database."""
    async with open_pool(database_url, max_size=5, name="retention") as pool:
        yield pool


@pytest.fixture
async def living(database_url: str) -> AsyncIterator[int]:
    """Id of a web process that lives."""
    signals = Signals(database_url)
    await signals.start()
    yield signals.process_id
    await signals.stop()


async def test_sessions_that_were_not_used(pool, rows) -> None:
    """A session goes some days after its last use with all that belongs to it, unless a run is under way on it."""
    rows(
        """
        INSERT INTO sessions (session_id, used_at, turn_owner, turn_until) VALUES
            ('old', now() - interval '31 days', NULL, NULL),
            ('left', now() - interval '31 days', 'crashed', now() - interval '1 second'),
            ('running', now() - interval '31 days', 'living', now() + interval '1 minute'),
            ('new', now() - interval '29 days', NULL, NULL)
        RETURNING 1
        """
    )
    rows("INSERT INTO session_turns (session_id, turn, items) SELECT session_id, 1, '' FROM sessions RETURNING 1")
    rows(
        "INSERT INTO responses (response_id, session_id, status, body, input)"
        "SELECT 'r-' || session_id, session_id, 'completed', '', '' FROM sessions RETURNING 1"
    )
    rows(
        "INSERT INTO paused_runs (trace_id, session_id, turn, agent, snapshot)"
        "SELECT 'tr-' || session_id, session_id, 1, 'math', '' FROM sessions RETURNING 1"
    )
    rows(
        "INSERT INTO approvals (approval_id, session_id, trace_id, call_id)"
        "SELECT 'a-' || session_id, session_id, 'tr-' || session_id, 'c' FROM sessions RETURNING 1"
    )
    assert await Retention(pool, days=30).sweep() == {"sessions": 2, "responses": 2}
    for table in ("sessions", "session_turns", "responses", "paused_runs", "approvals"):
        assert rows(f"SELECT session_id FROM {table} ORDER BY 1") == [("new",), ("running",)], table
    assert await Retention(pool, days=30).sweep() == {}


async def test_what_is_older_than_its_session_was_used(pool, rows) -> None:
    """Stored responses and paused runs go by their own age, although their session is in use."""
    rows("INSERT INTO sessions (session_id) VALUES ('used') RETURNING 1")
    rows(
        """
        INSERT INTO responses (response_id, session_id, status, body, input, created_at)
        SELECT 'r-' || days, 'used', 'completed', '', '', now() - make_interval(days => days)
        FROM unnest('{1, 3}'::int[]) AS days RETURNING 1
        """
    )
    rows(
        """
        INSERT INTO paused_runs (trace_id, session_id, turn, agent, snapshot, created_at)
        SELECT 'tr-' || days, 'used', days, 'math', '', now() - make_interval(days => days)
        FROM unnest('{1, 3}'::int[]) AS days RETURNING 1
        """
    )
    assert await Retention(pool, days=2).sweep() == {"responses": 1, "paused_runs": 1}
    assert rows("SELECT response_id FROM responses UNION SELECT trace_id FROM paused_runs ORDER BY 1") == [
        ("r-1",),
        ("tr-1",),
    ]


@pytest.mark.parametrize(
    ("table", "column", "template", "old", "new"),
    [
        ("idempotency_keys", "expires_at", {"idempotency_key": "k", "request_hash": "", "owner": "o", "process_id": 1},
         "1 second", "-1 minute"),
        ("erased_sessions", "erased_at", {"session_id": "s", "erasure_id": "er"}, "8 days", "6 days"),
        ("erasures", "done_at", {"erasure_id": "e", "sessions": "[]", "trace_ids": "[]", "removed": "{}"},
         "31 days", "29 days"),
        (
            "session_waiters",
            "waiting_until",
            {"session_id": "s", "owner": "o", "process_id": 0},
            "61 seconds",
            "59 seconds",
        ),
    ],
)  # fmt: skip
async def test_what_has_a_time_of_its_own(pool, rows, table, column, template, old, new) -> None:
    """Each table loses the rows that are past their time, and no others."""
    names, values = ", ".join([*template, column]), ", ".join(["%s"] * len(template))
    for age in (old, new):
        given = [f"{value}{age}" if value in {"k", "s", "e"} else value for value in template.values()]
        rows(f"INSERT INTO {table} ({names}) VALUES ({values}, now() - %s::interval) RETURNING 1", *given, age)
    assert await Retention(pool, days=30).sweep() == {table: 1}
    assert rows(f"SELECT {column} > now() - %s::interval FROM {table}", old) == [(True,)]


async def test_what_was_decided_of_sessions(pool, rows) -> None:
    """What was decided of a session goes long after its last run, unless turns are held or MLflow is to be told."""
    rows(
        """
        INSERT INTO sampled_sessions (session_id, rate, kept, last_run_at, promoted_at, projected_at) VALUES
            ('old', 1, true, now() - interval '31 days', NULL, NULL),
            ('told', 1, true, now() - interval '31 days', now(), now()),
            ('untold', 1, true, now() - interval '31 days', now(), NULL),
            ('held', 0, false, now() - interval '31 days', NULL, NULL),
            ('new', 1, true, now() - interval '29 days', NULL, NULL)
        RETURNING 1
        """
    )
    rows(
        """
        WITH run AS (
            INSERT INTO runs (trace_id, session_id, agent, agent_version, status, offline, state,
                              inclusion_probability, duration_ms, started_at)
            SELECT 'tr-' || session_id, session_id, 'math', '1', 'ok', true, 'pending', 0, 1, now()
            FROM sampled_sessions RETURNING trace_id)
        INSERT INTO outbox (trace_id, payload, held) SELECT trace_id, 'x', trace_id = 'tr-held' FROM run RETURNING 1
        """
    )
    assert await Retention(pool, days=30).sweep() == {"sampled_sessions": 2}
    assert rows("SELECT session_id FROM sampled_sessions ORDER BY 1") == [("held",), ("new",), ("untold",)]


async def test_a_process_that_is_not_settled_keeps_its_name(pool, rows) -> None:
    """The host of a dead process is known until its counters are settled, however long that takes."""
    rows(
        "INSERT INTO web_processes (process_id, host, pid, started_at) OVERRIDING SYSTEM VALUE "
        "VALUES (1, 'settled', 1, now() - interval '9 days'), (2, 'left', 1, now() - interval '9 days') RETURNING 1"
    )
    rows(
        "INSERT INTO run_counts (process_id, agent, served, closed_at) "
        "VALUES (1, 'math', 1, now()), (2, 'math', 1, NULL) RETURNING 1"
    )
    assert await Retention(pool, days=30).sweep() == {"web_processes": 1}
    assert rows("SELECT host FROM web_processes") == [("left",)]


async def test_an_erasure_that_is_not_done_stays(pool, rows) -> None:
    """An erasure that still has traces to remove stays, however old it is."""
    rows(
        "INSERT INTO erasures (erasure_id, sessions, trace_ids, removed, requested_at)"
        "VALUES ('e', '[]', '[]', '{}', now() - interval '1 year') RETURNING 1"
    )
    assert await Retention(pool, days=30).sweep() == {}


async def test_dead_processes(pool, rows, living) -> None:
    """The slots of a dead process go at once, its own row after a day; a living process keeps all it has."""
    rows("INSERT INTO web_processes (host, pid) VALUES ('h', 1), ('h', 2) RETURNING 1")
    rows(
        "INSERT INTO key_slots (key_id, process_id, slots, leased_until)"
        "SELECT 'key', process_id, 1, now() FROM web_processes RETURNING 1"
    )
    rows("UPDATE web_processes SET started_at = now() - interval '25 hours' WHERE pid <> 2 RETURNING 1")
    assert await Retention(pool, days=30).sweep() == {"key_slots": 2, "web_processes": 1}
    assert rows("SELECT process_id FROM key_slots") == [(living,)]
    assert rows("SELECT pid FROM web_processes WHERE process_id <> %s", living) == [(2,)]


def pile_up(rows) -> None:
    """Insert more sessions that are past their time than one batch takes."""
    rows(
        "INSERT INTO sessions (session_id, used_at)"
        "SELECT 's-' || number, now() - interval '31 days' FROM generate_series(1, 2500) AS number RETURNING 1"
    )


async def test_a_pile_is_deleted_by_several_at_once(pool, rows) -> None:
    """Several that sweep at once delete a pile of several batches together, each row once."""
    pile_up(rows)
    sweeps = await asyncio.gather(*(Retention(pool, days=30).sweep() for _ in range(4)))
    assert sum(map(Counter, sweeps), Counter()) == {"sessions": 2500}


async def test_one_process_at_a_time(pool, rows, database_url) -> None:
    """While another process deletes a sweep leaves it to that one."""
    pile_up(rows)
    with psycopg.connect(database_url) as other:
        other.execute("SELECT pg_advisory_xact_lock(%s)", [retention._LOCK])
        assert await Retention(pool, days=30).sweep() == {}
    assert await Retention(pool, days=30).sweep() == {"sessions": 2500}


async def test_a_row_in_use_is_left_to_the_next_sweep(pool, rows, database_url) -> None:
    """A session that a request has just locked is neither waited for nor deleted."""
    pile_up(rows)
    with psycopg.connect(database_url) as request:
        request.execute("UPDATE sessions SET used_at = now() WHERE session_id = 's-1'")
        assert await Retention(pool, days=30).sweep() == {"sessions": 2499}
    assert rows("SELECT session_id FROM sessions") == [("s-1",)]


async def test_a_sweep_says_what_it_deleted(pool, rows) -> None:
    """A sweep is logged with its counts by table, one that found nothing is not."""
    pile_up(rows)
    with capture_logs() as logs:
        for _ in range(2):
            await Retention(pool, days=30).sweep()
    assert [entry.get("sessions") for entry in logs] == [2500]


async def test_sweeps_go_on_after_an_error(database_url, rows, monkeypatch) -> None:
    """While the database is away sweeps fail and say so; when it is back, they delete."""
    monkeypatch.setattr(retention, "_FIRST_S", 0.01)
    monkeypatch.setattr(retention, "_INTERVAL_S", 0.01)
    pile_up(rows)
    logged = {"warning": asyncio.Event(), "info": asyncio.Event()}

    def notice(_logger, level, entry):
        logged[level].set()
        return entry

    pool = open_pool(database_url, max_size=2, name="retention")  # gives no connection before it is opened
    with capture_logs(processors=[notice]):
        sweeping = asyncio.create_task(Retention(pool, days=30).run())
        async with asyncio.timeout(30):
            await logged["warning"].wait()
            async with pool:
                await logged["info"].wait()
                sweeping.cancel()
                await asyncio.wait({sweeping})
    assert sweeping.cancelled()
    assert rows("SELECT count(*) FROM sessions") == [(0,)]
