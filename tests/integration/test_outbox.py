"""The hand-over to Postgres on its own: a database that goes and comes back, buffers that fill, processes that die."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from blockbuster import blockbuster_ctx

from gateway.crypto import load_keys
from gateway.reloading import LiveSettings
from gateway.settings import Settings
from gateway.storage.database import open_pool
from gateway.storage.queue import open_queue
from gateway.tracing.balance import Check, read_check
from gateway.tracing.capture.recording import RunCapture
from gateway.tracing.handover.outbox import OutboxWriter, open_files
from gateway.tracing.handover.preparing import Preparer
from gateway.tracing.handover.recovery import Recovered, Recovery
from gateway.tracing.handover.settling import database_identity
from gateway.tracing.handover.tally import Owner
from gateway.tracing.redaction.redactor import Redactor
from gateway.tracing.sampling import Draw
from gateway.tracing.spans import SpanError, Trace

from .relay import Relay
from .runs import until

Rows = Callable[..., list[tuple[Any, ...]]]
Make = Callable[..., Settings]
KEPT = Draw(1.0, drawn=True, asked=False)
DEADLINE_S = 3.0


class Process:
    """The tracing side of one web process."""

    def __init__(self, outbox: OutboxWriter, recovery: Recovery, folder: Path, process_id: int):
        self.outbox = outbox
        self.recovery = recovery
        self.folder = folder
        self.process_id = process_id
        self.offered: list[str] = []

    def serve(
        self, count: int = 1, draw: Draw = KEPT, *, sampled: bool = True, error: SpanError | None = None, **facts: Any
    ) -> None:
        """Serve runs that have ended by now."""
        for _ in range(count):
            now = time.time_ns()
            trace = Trace(
                **{
                    "trace_id": f"tr-{uuid.uuid4().hex}",
                    "agent": "math",
                    "agent_version": "1",
                    "session_id": f"s-{uuid.uuid4().hex}",
                    "user_id": None,
                    "offline": True,
                    "started_ns": now - 1_000_000,
                    "ended_ns": now,
                    "error": error,
                }
                | facts
            )
            run = RunCapture(trace, [{"role": "user", "content": "What is 6 times 7?"}], sampled=sampled)
            run.answer = None if error else "42"
            self.outbox.begin(trace.agent)
            self.outbox.offer(run, draw)
            self.offered.append(trace.trace_id)

    async def handed_over(self) -> None:
        """Wait until everything is in the database."""
        await until(lambda: not self.outbox.waiting)

    def files(self) -> list[str]:
        """Return the kinds of files that processes left, or have."""
        return sorted(path.suffix for path in self.folder.iterdir() if path.suffix != ".lock")


@asynccontextmanager
async def process(settings: Settings, process_id: int, url: str | None = None) -> AsyncIterator[Process]:
    """Start one, put together as the web process does it; the test stops it, or lets it die."""
    assert settings.database_url
    direct = settings.database_url.get_secret_value()
    live, keys = await asyncio.to_thread(lambda: (LiveSettings(settings), load_keys(settings)))
    folder = settings.home / "web"
    pool = open_pool(url or direct, max_size=3, name="outbox-test")
    await pool.open(wait=True, timeout=10)
    queue = await open_queue(pool)
    database = await database_identity(pool)
    owner = Owner(process_id, database, "here", time.time_ns(), ("math", "support"))
    room = settings.spill_max_bytes
    files = await asyncio.to_thread(open_files, folder, owner, keys.outbox, spill_max_bytes=room)
    redactor = Redactor(keys.derive("redaction"))
    preparer = Preparer(redactor, keys.outbox, live, process_id=process_id)
    outbox = OutboxWriter(pool, queue, preparer, *files, live)
    recovery = Recovery(pool, queue, keys.outbox, live, folder, database)
    with blockbuster_ctx(["gateway"]):
        outbox.start()
        try:
            yield Process(outbox, recovery, folder, process_id)
        finally:
            await pool.close(timeout=0.5)


async def die(victim: Process, *, leave: bool = True) -> None:
    """End a process as ``kill -9`` does: what was in memory is gone, the kernel frees its lock."""
    for task in victim.outbox._tasks:
        task.cancel()
    await asyncio.to_thread(victim.outbox._tally.close, delete=not leave)


async def balance(settings: Settings) -> Check:
    """Return whether the ledger adds up."""
    assert settings.database_url
    async with await psycopg.AsyncConnection.connect(settings.database_url.get_secret_value()) as connection:
        return await read_check(connection)


COUNTS = "SELECT agent, served, unsettled, closed_at IS NOT NULL FROM run_counts WHERE process_id = %s ORDER BY agent"
STORED = "SELECT trace_id FROM runs JOIN outbox USING (trace_id) ORDER BY position"
DROPS = "SELECT process_id, agent, reason, sum(count)::int FROM run_drops GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"


async def test_what_ends_is_stored_and_counted(make_settings: Make, rows: Rows) -> None:
    """Runs come into the ledger, traces into the outbox, counts beside them; what never ends is lost; all adds up."""
    settings = make_settings()
    async with process(settings, 1) as web:
        web.serve(3)
        web.serve(1, Draw(0.0, drawn=False, asked=False), agent="support")
        web.serve(1, Draw(0.5, drawn=True, asked=True), error=SpanError("RUN_FAILED", "no"))
        web.serve(1, Draw(0.0, drawn=False, asked=False), sampled=False)
        web.outbox.begin("support")  # is still under way
        await web.handed_over()
        facts = rows("SELECT agent, state, status, kept_because, held FROM runs LEFT JOIN outbox USING (trace_id)")
        assert sorted(facts, key=str) == [
            *[("math", "pending", "error", ["sampled", "asked", "error"], False)],
            *[("math", "pending", "ok", ["sampled"], False)] * 3,
            *[("math", "sampled_out", "ok", [], None)],
            *[("support", "pending", "ok", [], True)],
        ]
        await until(lambda: rows(COUNTS, 1) == [("math", 5, 0, False), ("support", 2, 1, False)])
        statistics = web.outbox.statistics()
        assert (statistics.handed_over_runs, statistics.waiting_runs, statistics.oldest_waiting_s) == (6, 0, 0.0)
        await web.outbox.stop(DEADLINE_S)
        assert web.files() == []
    assert rows(COUNTS, 1) == [("math", 5, 0, True), ("support", 2, 0, True)]
    assert rows(DROPS) == [(1, "support", "crash", 1)]
    assert (await balance(settings)).adds_up


async def test_an_idle_process_reports_what_it_has_begun(make_settings: Make, rows: Rows) -> None:
    """Runs that take long are counted as under way within a second or so, with nothing else to store."""
    async with process(make_settings(), 1) as web:
        web.outbox.begin("math")
        await until(lambda: rows(COUNTS, 1) == [("math", 1, 1, False), ("support", 0, 0, False)])
        await web.outbox.stop(DEADLINE_S)


async def test_a_database_that_goes_and_comes_back(make_settings: Make, rows: Rows, database_url: str) -> None:
    """Runs that end while the database is away wait on disk, and are stored once, in order, when it is back."""
    settings = make_settings()
    async with Relay(database_url) as relay, process(settings, 1, relay.url) as web:
        web.serve(3)
        await web.handed_over()
        await relay.away()
        web.serve(250)
        await until(lambda: web.outbox.statistics().spilled_runs == 250)
        web.serve(5)
        await until(lambda: web.outbox.statistics().spilled_runs == 255)
        statistics = web.outbox.statistics()
        assert (statistics.waiting_runs, statistics.waiting_bytes, statistics.dropped_runs) == (255, 0, 0)
        assert statistics.spilled_bytes > 255 * 200
        assert 0 < statistics.oldest_waiting_s < 30
        await relay.back()
        await web.handed_over()
        assert [row[0] for row in rows(STORED)] == web.offered
        assert web.files() == [".spill", ".tally"]
        await web.outbox.stop(DEADLINE_S)
        assert web.files() == []
    ledger = await balance(settings)
    assert (ledger.adds_up, ledger.served, ledger.rows) == (True, 258, 258)


async def test_beyond_every_bound_runs_are_dropped_and_counted(
    make_settings: Make, rows: Rows, database_url: str
) -> None:
    """What neither disk nor memory may hold is dropped and counted by agent, also in the counts of a killed process."""
    settings = make_settings(spill_max_bytes=10_000, trace_buffer_bytes=10_000)
    async with Relay(database_url) as relay, process(settings, 1, relay.url) as web:
        await relay.away()
        for _ in range(40):  # one by one: a buffer this small has room for one that is not prepared
            web.serve(1)
            await until(lambda: not web.outbox._captured and not web.outbox._preparing)
        statistics = web.outbox.statistics()
        assert 5_000 < statistics.waiting_bytes <= 10_000
        assert 5_000 < statistics.spilled_bytes <= 10_000
        dropped = statistics.dropped_runs
        assert 5 < statistics.waiting_runs == 40 - dropped < 40
        await relay.back()
        await web.handed_over()
        await until(lambda: rows(DROPS) == [(1, "math", "buffer_full", dropped)])
        web.serve(1)
        await web.handed_over()
        assert rows(DROPS) == [(1, "math", "buffer_full", dropped)]
        await web.outbox.stop(DEADLINE_S)
    assert (await balance(settings)).adds_up


async def test_runs_that_are_not_prepared_are_bounded_too(make_settings: Make, rows: Rows) -> None:
    """More runs at once than the buffer may have are dropped and counted at once."""
    settings = make_settings(trace_buffer_count=10)
    async with process(settings, 1) as web:
        web.serve(25)
        assert web.outbox.statistics().dropped_runs == 15
        await web.handed_over()
        await web.outbox.stop(DEADLINE_S)
    assert rows(DROPS) == [(1, "math", "buffer_full", 15)]
    assert rows(COUNTS, 1)[0] == ("math", 25, 0, True)


async def test_bytes_bound_what_is_not_prepared(make_settings: Make) -> None:
    """Of runs whose size is not known yet, fewer are taken where few bytes may wait."""
    async with process(make_settings(trace_buffer_bytes=350_000), 1) as web:
        web.serve(5)
        assert web.outbox.statistics().dropped_runs == 2
        await web.outbox.stop(DEADLINE_S)


async def test_a_commit_that_was_not_heard_of_stays_single(make_settings: Make, rows: Rows, database_url: str) -> None:
    """When the connection is cut after the commit and before its answer, runs and drops are there once."""
    settings = make_settings(trace_buffer_count=10)
    async with Relay(database_url) as relay, process(settings, 1, relay.url) as web:
        relay.cut_after(b"COMMIT")
        web.serve(12)
        await until(lambda: relay.cuts == 1)
        await web.handed_over()
        await web.outbox.stop(DEADLINE_S)
    assert len(rows(STORED)) == 10
    assert rows(DROPS) == [(1, "math", "buffer_full", 2)]
    assert (await balance(settings)).adds_up


async def test_a_database_that_hangs_holds_nobody_up(make_settings: Make, rows: Rows, database_url: str) -> None:
    """While a lock holds up the hand-over, runs go on to be taken, and beyond the memory to the disk."""
    settings = make_settings(trace_buffer_count=10)
    async with process(settings, 1) as web:
        with psycopg.connect(database_url) as other:
            other.execute("LOCK TABLE runs")
            web.serve(10)
            await until(lambda: not web.outbox._captured and not web.outbox._preparing)
            web.serve(10)
            await until(lambda: web.outbox.statistics().spilled_runs == 10)
        await web.handed_over()
        await web.outbox.stop(DEADLINE_S)
    assert len(rows(STORED)) == 20


async def test_what_the_redactor_fails_on_is_withheld(make_settings: Make, rows: Rows) -> None:
    """A run that cannot be redacted is in the ledger as such, by the rules that it met, and the others are stored."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    async with process(make_settings(), 1) as web:
        web.serve(1)
        web.serve(1, Draw(0.0, drawn=False, asked=True))
        web.outbox._captured[-1][0].turn_input[0]["content"] = deep
        web.serve(1)
        await web.handed_over()
        await web.outbox.stop(DEADLINE_S)
    assert rows(
        "SELECT state, kept_because, payload IS NULL FROM runs LEFT JOIN outbox USING (trace_id) ORDER BY 1"
    ) == [
        ("pending", ["sampled"], False),
        ("pending", ["sampled"], False),
        ("redaction_blocked", ["asked"], True),
    ]


async def test_a_run_that_the_database_refuses_holds_up_no_other(make_settings: Make, rows: Rows) -> None:
    """A row that Postgres cannot take is counted as dropped, and all others of its batch are stored."""
    settings = make_settings()
    async with process(settings, 1) as web:
        web.serve(5)
        web.serve(1, user_id="no\0good")
        web.serve(5)
        await until(lambda: rows(DROPS) == [(1, "math", "refused", 1)])
        await web.outbox.stop(DEADLINE_S)
    assert len(rows(STORED)) == 10
    assert (await balance(settings)).adds_up


async def test_a_stop_with_the_database_away_loses_nothing(make_settings: Make, rows: Rows, database_url: str) -> None:
    """What waits at the end, prepared or not, goes to disk; the next process stores it once and settles the counts."""
    settings = make_settings()
    async with Relay(database_url) as relay, process(settings, 1, relay.url) as web:
        web.serve(2)
        await web.handed_over()
        await relay.away()
        web.serve(30)
        await until(lambda: web.outbox.statistics().spilled_runs == 30)
        web.serve(30)
        await web.outbox.stop(DEADLINE_S)
        assert web.files() == [".spill", ".tally"]
    assert len(rows("SELECT FROM runs")) == 2
    async with process(settings, 2) as following:
        assert await following.recovery.look() == Recovered(processes=1, runs=60, damaged=0, lost=0)
        assert [row[0] for row in rows(STORED)] == web.offered
        assert rows(COUNTS, 1)[0] == ("math", 62, 0, True)
        assert following.files() == [".tally"]
        assert await following.recovery.look() == Recovered(0, 0, 0, 0)
        await following.outbox.stop(DEADLINE_S)
    assert rows(DROPS) == []
    assert (await balance(settings)).adds_up


async def test_what_a_crash_took_is_in_the_ledger(make_settings: Make, rows: Rows) -> None:
    """Runs under way, and those not stored yet, of a process that was killed are dropped (crash), by agent."""
    settings = make_settings()
    async with process(settings, 1) as victim:
        victim.serve(4)
        await victim.handed_over()
        victim.outbox.begin("math")
        victim.outbox.begin("support")
        victim.serve(2)
        await die(victim)
    async with process(settings, 2) as web:
        assert await web.recovery.look() == Recovered(processes=1, runs=0, damaged=0, lost=4)
        assert rows(DROPS) == [(1, "math", "crash", 3), (1, "support", "crash", 1)]
        assert rows(COUNTS, 1) == [("math", 7, 0, True), ("support", 1, 0, True)]
        await web.outbox.stop(DEADLINE_S)
        assert web.files() == []
    assert (await balance(settings)).adds_up


async def test_a_recovery_that_is_cut_off_begins_anew(make_settings: Make, rows: Rows, database_url: str) -> None:
    """Wherever a recovery is ended, the next one comes to the same: nothing is lost, stored or counted twice."""
    settings = make_settings()
    async with Relay(database_url) as relay, process(settings, 1, relay.url) as victim:
        await relay.away()
        victim.serve(5)
        await until(lambda: victim.outbox.statistics().spilled_runs == 5)
        victim.outbox.begin("math")
        await die(victim)
    for word in (b"COMMIT", b"INSERT INTO run_drops", b"run_counts"):
        async with Relay(database_url) as relay, process(settings, 2, relay.url) as web:
            relay.cut_after(word)
            await die(web, leave=False)  # its own reports are not what is to be cut
            with pytest.raises(psycopg.OperationalError):
                await web.recovery.look()
    async with process(settings, 3) as web:
        # Only the last commit may have been done: then it is found again, and nothing more is lost.
        assert (await web.recovery.look()) == Recovered(processes=1, runs=0, damaged=0, lost=1)
        await web.outbox.stop(DEADLINE_S)
    assert [row[0] for row in rows(STORED)] == victim.offered
    assert rows(DROPS) == [(1, "math", "crash", 1)]
    assert (await balance(settings)).adds_up


async def test_a_recovery_outlives_whatever_goes_wrong(
    make_settings: Make, rows: Rows, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off while it tells the evaluators, which the queue reports in an error of its own, it tries again."""
    monkeypatch.setattr("gateway.tracing.handover.recovery._AGAIN_S", 0.01)
    settings = make_settings()
    async with Relay(database_url) as relay, process(settings, 1, relay.url) as victim:
        await relay.away()
        victim.serve(3)
        await until(lambda: victim.outbox.statistics().spilled_runs == 3)
        await die(victim)
    async with Relay(database_url) as relay, process(settings, 2, relay.url) as web:
        relay.cut_after(b"procrastinate_jobs")
        web.recovery.start()
        await until(lambda: web.files() == [".tally"])
        assert relay.cuts == 1
        await web.recovery.stop(DEADLINE_S)
        await web.outbox.stop(DEADLINE_S)
    assert [row[0] for row in rows(STORED)] == victim.offered


async def test_one_recovers_at_a_time_and_never_from_the_living(make_settings: Make, database_url: str) -> None:
    """Of two processes of a home one looks at a time, and neither touches what belongs to the other."""
    settings = make_settings()
    async with Relay(database_url) as relay, process(settings, 1, relay.url) as slow, process(settings, 2) as web:
        await relay.away()
        slow.serve(3)
        await until(lambda: slow.outbox.statistics().spilled_runs == 3)
        found = await asyncio.gather(*(each.recovery.look() for each in (web, web, web)))
        assert sorted(found, key=str) == [None, None, Recovered(0, 0, 0, 0)]
        assert slow.outbox.statistics().spilled_runs == 3
        await relay.back()
        for each in (slow, web):
            await each.outbox.stop(DEADLINE_S)


async def test_counts_that_a_power_failure_took_are_made_good(make_settings: Make, rows: Rows) -> None:
    """Where the file is older than what was stored, or empty, the highest number that anything vouches for counts."""
    settings = make_settings()
    async with process(settings, 1) as victim:
        victim.serve(3)
        victim.outbox.begin("support")
        await until(lambda: rows(COUNTS, 1) == [("math", 3, 0, False), ("support", 1, 1, False)])
        await die(victim)
        path = victim.outbox._tally.path
        assert path is not None
        path.write_bytes(b"")
    async with process(settings, 2) as web:
        assert await web.recovery.look() == Recovered(processes=1, runs=0, damaged=0, lost=1)
        await web.outbox.stop(DEADLINE_S)
    assert rows(COUNTS, 1) == [("math", 3, 0, True), ("support", 1, 0, True)]
    assert (await balance(settings)).adds_up


async def test_without_counts_on_disk_nothing_is_spilled(make_settings: Make, database_url: str) -> None:
    """Where the tally is in memory only, what would never be found again stays in memory as well."""
    settings = make_settings()
    async with open_pool(database_url, max_size=1, name="outbox-test") as pool:
        database = await database_identity(pool)
    (settings.home / "web" / f"{database}.1.new").mkdir(parents=True)  # where the tally is to be made
    async with Relay(database_url) as relay, process(settings, 1, relay.url) as web:
        await relay.away()
        web.serve(3)
        await until(lambda: not web.outbox._captured and not web.outbox._preparing)
        await web.outbox.stop(0.1)
        assert web.files() == [".new"]


async def test_a_home_that_cannot_be_written(make_settings: Make, rows: Rows, tmp_path: Path) -> None:
    """Without a folder of its own a process serves and stores all the same."""
    home = tmp_path / "home"
    home.write_text("not a folder")
    async with process(make_settings(home=home), 1) as web:
        web.serve(3)
        await web.handed_over()
        await web.outbox.stop(DEADLINE_S)
    assert rows(COUNTS, 1)[0] == ("math", 3, 0, True)
