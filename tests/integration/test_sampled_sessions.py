"""What is decided of whole sessions when their runs are stored: kept, held, promoted."""

import time
import uuid
from collections.abc import AsyncIterator

import psycopg
import pytest

from gateway.tracing.handover.storing import Connection, FinishedRun, store_runs


@pytest.fixture
async def connection(database_url: str) -> AsyncIterator[Connection]:
    """A connection of the kind that stores runs."""
    async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as connection:
        yield connection


def run(session: str, *rules: str, drawn: bool = False, rate: float = 0.1, **other: object) -> FinishedRun:
    """A finished run of a session that met these tail rules; keyword arguments override."""
    now_ns = time.time_ns()
    values: dict[str, object] = {
        "trace_id": f"tr-{uuid.uuid4().hex}", "agent": "math", "agent_version": "1", "session_id": session,
        "user_id": None, "key_id": "anonymous", "process_id": 1, "failed": "error" in rules, "offline": True,
        "started_ns": now_ns, "duration_ms": 5.0, "rate": rate, "drawn": drawn, "rules": list(rules),
        "state": "pending", "payload": b"trace",
    }  # fmt: skip
    return FinishedRun(**(values | other))  # type: ignore[arg-type]


async def store(connection: Connection, *runs: FinishedRun, hold: bool = True) -> bool:
    """Store runs in a transaction."""
    async with connection.transaction():
        return await store_runs(connection, runs, hold=hold)


async def ledger(connection: Connection, *runs: FinishedRun) -> list[tuple[object, ...]]:
    """Return state, probability, reasons, and whether the trace is held (``None``: it does not wait) of runs."""
    cursor = await connection.execute(
        "SELECT trace_id, state, inclusion_probability, kept_because, held FROM runs LEFT JOIN outbox USING (trace_id)"
    )
    found = {row[0]: row[1:] for row in await cursor.fetchall()}
    return [found[each.trace_id] for each in runs]


async def test_a_session_that_the_draw_keeps(connection: Connection) -> None:
    """All turns of a session that the draw keeps are for the evaluators, with its rate as their probability."""
    first, second = run("a", drawn=True), run("a", drawn=True)
    assert await store(connection, first)
    assert await store(connection, second)
    assert await ledger(connection, first, second) == [("pending", 0.1, ["sampled"], False)] * 2


async def test_the_first_turn_decides(connection: Connection) -> None:
    """A rate that changes while a conversation goes on changes nothing for it, neither up nor down."""
    before, dropped = run("kept", drawn=True), run("dropped")
    await store(connection, before, dropped)
    after, still = run("kept", drawn=False, rate=0.0), run("dropped", drawn=True, rate=1.0)
    await store(connection, after, still)
    assert await ledger(connection, before, after) == [("pending", 0.1, ["sampled"], False)] * 2
    assert await ledger(connection, dropped, still) == [("pending", 0.1, [], True)] * 2


async def test_a_tail_rule_promotes_the_whole_conversation(connection: Connection) -> None:
    """Turns that were held, the one that meets a rule, and those that follow are kept, with probability 1."""
    first, second = run("a"), run("a")
    assert not await store(connection, first, second)
    failed, after = run("a", "error"), run("a")
    assert await store(connection, failed)
    assert await store(connection, after)
    assert await ledger(connection, first, second, failed, after) == [("pending", 1.0, ["error"], False)] * 4


async def test_a_rule_counts_also_where_the_draw_had_kept_it(connection: Connection) -> None:
    """A sampled conversation that meets rules has probability 1 for all its turns, and every reason on record."""
    first = run("a", drawn=True)
    await store(connection, first)
    slow, failed = run("a", "slow", drawn=True), run("a", "error", "slow", drawn=True)
    await store(connection, slow)
    await store(connection, failed)
    found = await ledger(connection, first, slow, failed)
    assert [(state, probability, held) for state, probability, _, held in found] == [("pending", 1.0, False)] * 3
    assert all(sorted(reasons) == ["error", "sampled", "slow"] for _, _, reasons, _ in found)  # type: ignore[call-overload]


async def test_one_conversation_leaves_the_others_alone(connection: Connection) -> None:
    """What one session meets promotes no other, also in one batch."""
    quiet, failed = run("quiet"), run("failed", "error")
    await store(connection, quiet, failed)
    assert await ledger(connection, quiet, failed) == [
        ("pending", 0.1, [], True),
        ("pending", 1.0, ["error"], False),
    ]


async def test_without_a_hold_a_rule_keeps_from_its_turn_on(connection: Connection) -> None:
    """With no time to hold, a turn that is not sampled is counted at once, and its text is not stored."""
    first = run("a")
    assert not await store(connection, first, hold=False)
    assert await ledger(connection, first) == [("sampled_out", 0.1, [], None)]
    failed, after = run("a", "error"), run("a")
    await store(connection, failed, after, hold=False)
    assert await ledger(connection, first, failed, after) == [
        ("sampled_out", 0.1, [], None),
        ("pending", 1.0, ["error"], False),
        ("pending", 1.0, ["error"], False),
    ]


async def test_a_batch_that_is_stored_again_changes_nothing(connection: Connection) -> None:
    """A batch whose commit was not heard of is written again: no run is doubled, and none comes back to the outbox."""
    runs = [run("a", drawn=True), run("b"), run("c", "error")]
    await store(connection, *runs)
    await connection.execute("DELETE FROM outbox WHERE trace_id = %s", [runs[0].trace_id])  # taken in meanwhile
    await store(connection, *runs)
    assert await ledger(connection, *runs) == [
        ("pending", 0.1, ["sampled"], None),
        ("pending", 0.1, [], True),
        ("pending", 1.0, ["error"], False),
    ]


async def test_runs_of_which_nothing_was_captured(connection: Connection) -> None:
    """A run that nothing was captured of is counted; what the redactor withheld is too, and promotes all the same."""
    off, held = run("off", state="sampled_out", payload=None), run("b")
    blocked = run("b", "error", state="redaction_blocked", payload=None)
    await store(connection, off, held, blocked)
    assert await ledger(connection, off, held, blocked) == [
        ("sampled_out", 0.1, [], None),
        ("pending", 1.0, ["error"], False),
        ("redaction_blocked", 1.0, ["error"], None),
    ]


async def test_a_session_that_was_forgotten_meanwhile(connection: Connection) -> None:
    """Of a run that began before its session was forgotten only the count is kept, and no decision of the session."""
    late = run("gone", "error", user_id="u")
    await connection.execute("INSERT INTO erased_sessions (session_id, erasure_id) VALUES ('gone', 'er-1')")
    assert not await store(connection, late)
    assert await ledger(connection, late) == [("erased", 0.1, [], None)]
    cursor = await connection.execute("SELECT session_id, user_id FROM runs")
    assert await cursor.fetchall() == [("", None)]
    cursor = await connection.execute("SELECT count(*) FROM sampled_sessions")
    assert await cursor.fetchone() == (0,)


async def test_a_rule_that_is_met_again_rewrites_nothing(connection: Connection) -> None:
    """Rows of a conversation are written again when a rule is added, and not for each turn that meets the same."""
    first, failed = run("a", drawn=True), run("a", "error", drawn=True)
    await store(connection, first, failed)

    async def version() -> tuple[object, ...] | None:
        return await (
            await connection.execute("SELECT xmin FROM runs WHERE trace_id = %s", [first.trace_id])
        ).fetchone()

    before = await version()
    await store(connection, run("a", "error", drawn=True))
    assert await version() == before
    await store(connection, run("a", "slow", drawn=True))
    assert await version() != before


async def test_tags_are_written_again_when_a_rule_is_added(connection: Connection) -> None:
    """MLflow is told anew of a promoted session exactly when a turn adds a rule."""
    await store(connection, run("a", "error"))
    await connection.execute("UPDATE sampled_sessions SET projected_at = now()")
    told = "SELECT projected_at IS NOT NULL FROM sampled_sessions"
    await store(connection, run("a", "error"), run("a"))
    assert await (await connection.execute(told)).fetchone() == (True,)
    await store(connection, run("a", "slow"))
    assert await (await connection.execute(told)).fetchone() == (False,)


async def test_a_session_that_stays_out_stays_out(connection: Connection) -> None:
    """With no rule that could promote it, a session is remembered as not drawn, and a higher rate changes nothing."""
    await store(connection, run("a", state="sampled_out", payload=None))
    later = run("a", drawn=True, rate=1.0)
    await store(connection, later, hold=False)
    assert await ledger(connection, later) == [("sampled_out", 0.1, [], None)]
