"""The ledger's arithmetic and words: pure functions of what was counted."""

from datetime import UTC, datetime, timedelta

import pytest

from gateway.quality.since import parse_since
from gateway.tracing.balance import Count, check

NOW = datetime(2026, 1, 31, 12, tzinfo=UTC)


def count(
    process_id: int = 1,
    agent: str = "math",
    *,
    served: int = 10,
    rows: int = 10,
    dropped: int = 0,
    unsettled: int = 0,
    closed: bool = False,
    living: bool = False,
) -> Count:
    """Return what is known of one process and agent."""
    return Count(process_id, agent, served, unsettled, rows, dropped, closed, living, "box" if not closed else None)


@pytest.mark.parametrize(
    ("text", "since"),
    [
        ("90s", NOW - timedelta(seconds=90)),
        ("15m", NOW - timedelta(minutes=15)),
        ("24h", NOW - timedelta(days=1)),
        (" 7d ", NOW - timedelta(days=7)),
        ("2026-01-30", datetime(2026, 1, 30, tzinfo=UTC)),
        ("2026-01-31T08:00:00", datetime(2026, 1, 31, 8, tzinfo=UTC)),
        ("2026-01-31T08:00:00Z", datetime(2026, 1, 31, 8, tzinfo=UTC)),
        ("2026-01-31T08:00:00+02:00", datetime(2026, 1, 31, 6, tzinfo=UTC)),
    ],
)
def test_a_window_is_a_time_or_a_duration(text: str, since: datetime) -> None:
    """Times in ISO 8601, in UTC unless they say otherwise, and durations back from now are understood."""
    parsed = parse_since(text, NOW)
    assert parsed == since
    assert parsed.tzinfo is UTC


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "15",
        "15 m",
        "-15m",
        "1.5h",
        "1w",
        "٣h",
        "999999999d",
        "0001-01-01T00:00+14:00",
        "2026-13-01",
        "\0",
    ],
)
def test_what_is_no_window_is_told_apart(text: str) -> None:
    """Anything else, and what lies before all time, is none."""
    assert parse_since(text, NOW) is None


def test_a_ledger_without_runs_adds_up() -> None:
    """Nothing served and nothing in the ledger is in order."""
    found = check([])
    assert found.adds_up
    assert found.says == "It adds up over all time: 0 served; 0 in the ledger."


def test_runs_under_way_of_a_living_process_are_explained() -> None:
    """What a living process has not settled yet is no difference, and is named."""
    found = check([
        count(1, served=12, rows=9, dropped=1, unsettled=2, living=True),
        count(2, served=5, rows=5, closed=True),
    ])  # fmt: skip
    assert (found.adds_up, found.served, found.rows, found.dropped, found.unsettled) == (True, 17, 14, 1, 2)
    assert found.says == (
        "It adds up over all time: 17 served; 14 in the ledger; 1 without a row, counted as dropped; "
        "2 under way or on the way into the ledger."
    )
    assert [(each.process_id, each.status) for each in found.processes] == [(1, "living")]


def test_runs_of_a_process_that_died_are_missing() -> None:
    """What a dead process has not settled counts as missing, and it is said who has to settle it."""
    found = check([count(7, served=10, rows=7, unsettled=2)])
    assert (found.adds_up, found.difference, found.unsettled, found.agents) == (False, 3, 0, {"math": 3})
    [process] = found.processes
    assert (process.status, process.difference) == ("left", 3)
    assert found.says.startswith(
        "It does not add up over all time: 10 served; 7 in the ledger. Web process 7 on host box is gone"
    )
    assert "3 of its runs are missing. The next web process that starts there" in found.says


def test_a_process_that_died_with_nothing_missing_is_named() -> None:
    """A process that was never settled is said, though its counts agree: runs may have begun since it told them."""
    found = check([count()])
    assert found.adds_up
    assert "was not settled: no run is known to miss" in found.says


def test_differences_do_not_cancel_each_other_out() -> None:
    """What is missing of one agent is not made good by what is too much of another."""
    found = check([
        count(agent="math", served=10, rows=8, living=True),
        count(agent="support", served=8, rows=10, closed=True, process_id=2),
    ])  # fmt: skip
    assert (found.adds_up, found.difference) == (False, 0)
    assert found.agents == {"math": 2, "support": -2}
    assert "Web process 1 on host box has served 2 that are nowhere in the ledger." in found.says
    assert "Web process 2 has 2 more in the ledger than it counted" in found.says
