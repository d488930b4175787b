"""Reading the ledger: the funnel, what pending runs wait for, the check, the command."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gateway.storage.database import migrate
from gateway.storage.embedded import EmbeddedPostgres, running_url
from gateway.tracing.ledger import MEANING

from .runs import Web, desk, headers, say, until
from .test_quality import Seed

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def seed(database_url: str) -> Iterator[Seed]:
    """A writer of rows."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        yield Seed(connection)


async def ledger(client: Web, **query: str) -> dict[str, Any]:
    """Return what ``/v1/ledger`` answers."""
    answer = await client.get("/v1/ledger", params=query)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def states(funnel: dict[str, Any]) -> dict[str, int]:
    """Return the runs by state, without those that have none."""
    return {each["state"]: each["runs"] for each in funnel["states"] if each["runs"]}


async def test_the_funnel_of_a_window(serve, make_settings, seed: Seed) -> None:
    """Every state is there with its runs, its share and its reasons, of all runs and by agent; older runs are not."""
    for state in ("scored", "scored", "scored", "not_selected", "budget_skipped"):
        seed.run(state)
    seed.run("sampled_out", agent="support")
    seed.run("sampled_out", agent="support", reason="hold_full")
    seed.run("failed", agent="support", reason="refused by MLflow", minutes_ago=90)
    seed.run("scored", minutes_ago=200)
    seed.drops(2, "buffer_full")
    async with serve(make_settings()) as client:
        hour, hours = await ledger(client, since="1h"), await ledger(client, since="120m")
    assert list(MEANING) == [each["state"] for each in hour["ledger"]["states"]]
    counts = {"scored": 3, "not_selected": 1, "budget_skipped": 1, "sampled_out": 2, "dropped": 2}
    assert states(hour["ledger"]) == counts
    assert (hour["ledger"]["total"], hour["ledger"]["scored_share"]) == (9, pytest.approx(1 / 3))
    assert states(hours["ledger"]) == counts | {"failed": 1}
    reasons = {each["state"]: each["reasons"] for each in hours["ledger"]["states"] if each["reasons"]}
    assert reasons == {
        "dropped": {"buffer_full": 2},
        "failed": {"refused by MLflow": 1},
        "sampled_out": {"hold_full": 1},
    }
    assert {each["agent"]: states(each) for each in hours["agents"]} == {
        "math": {"scored": 3, "not_selected": 1, "budget_skipped": 1, "dropped": 2},
        "support": {"sampled_out": 2, "failed": 1},
    }
    begun = datetime.fromisoformat(hour["generated_at"]) - datetime.fromisoformat(hour["since"])
    assert begun == timedelta(hours=1)


async def test_what_pending_runs_wait_for(serve, make_settings, seed: Seed, rows) -> None:
    """Pending runs are told apart by what they wait for, with the age of the oldest and what is held."""
    judged, waiting, held = seed.run("pending"), seed.run("pending"), seed.run("pending")
    for trace_id, is_held, seconds in ((waiting, False, 30), (held, True, 100)):
        rows(
            "INSERT INTO outbox (trace_id, payload, held, created_at) "
            "VALUES (%s, %s, %s, now() - make_interval(secs => %s)) RETURNING 1",
            trace_id,
            b"x" * 500,
            is_held,
            seconds,
        )
    assert judged
    async with serve(make_settings()) as client:
        found = await ledger(client)
        page = (await client.get("/ops")).text
    assert found["ledger"]["pending"] == {"evaluator": 1, "held": 1, "judges": 1}
    assert found["waiting"] == {
        "traces": 1,
        "oldest_s": pytest.approx(30, abs=10),
        "held": 1,
        "held_bytes": 500,
    }
    assert "the oldest has waited 3" in page
    for words in ("waiting 1", "held 1", "judging 1"):
        assert words in page


async def test_why_runs_are_kept_and_what_was_swept(serve, make_settings, seed: Seed) -> None:
    """Reasons for which runs are kept are counted one by one; what a sweeper settled is named with the time."""
    for because in (["sampled"], ["sampled", "error"], ["error"], []):
        seed.run(kept_because=json.dumps(because))
    at = datetime.now(UTC).replace(microsecond=0)
    for minutes, reason in ((3, None), (2, None), (1, "hold_full")):
        seed.run("sampled_out", reason=reason, swept_at=at - timedelta(minutes=minutes))
    seed.run("pending", swept_at=at)  # looked at, and not settled
    async with serve(make_settings()) as client:
        found = await ledger(client)
        page = (await client.get("/ops")).text
    assert found["ledger"]["kept_because"] == {"error": 2, "sampled": 2}
    assert [(each["state"], each["reason"], each["runs"]) for each in found["swept"]] == [
        ("sampled_out", "hold_full", 1),
        ("sampled_out", None, 2),
    ]
    assert datetime.fromisoformat(found["swept"][1]["last_at"]) == at - timedelta(minutes=2)
    assert "Kept because of" in page


async def test_runs_served_add_up_while_one_is_under_way_and_after(serve, make_settings, rows) -> None:
    """The check holds at every moment: a run under way is explained, and after the end every run has its state."""
    settings = desk(make_settings)
    async with serve(settings) as client:
        await asyncio.gather(*(say(client, "1 + 1") for _ in range(5)))
        answer = await client.post("/v1/responses", json={"input": "hello", "model": "nobody"})
        assert answer.status_code == 404  # refused, so not a run
        await until(lambda: rows("SELECT sum(served) FROM run_counts") == [(5,)])
        during = (await ledger(client))["check"]
    assert (during["adds_up"], during["served"], during["rows"] + during["unsettled"]) == (True, 5, 5)
    assert [each["status"] for each in during["processes"]] == ["living"]
    async with serve(settings) as client:
        after = await ledger(client)
        page = (await client.get("/ops")).text
    assert (after["check"]["served"], after["check"]["rows"], after["check"]["unsettled"]) == (5, 5, 0)
    assert after["ledger"]["total"] == 5
    assert after["check"]["says"] == "It adds up over all time: 5 served; 5 in the ledger."
    assert "✓ It adds up over all time: 5 served" in page


async def test_a_difference_is_said(serve, make_settings, seed: Seed, rows) -> None:
    """A run that was served and is nowhere, one that nobody counted, and a process left open are said in words."""
    rows("INSERT INTO web_processes (host, pid) VALUES ('elsewhere', 1) RETURNING 1")
    [[left]] = rows("SELECT process_id FROM web_processes")
    rows(
        "INSERT INTO run_counts (process_id, agent, served, unsettled, closed_at) "
        "VALUES (%s, 'math', 3, 1, NULL), (4242, 'math', 1, 0, now()) RETURNING 1",
        left,
    )
    seed.run(process_id=left)
    seed.run(process_id=4243)
    async with serve(make_settings()) as client:
        check = (await ledger(client))["check"]
        page = (await client.get("/ops")).text
    assert (check["adds_up"], check["difference"], check["agents"]) == (False, 2, {"math": 2})
    named = {each["process_id"]: (each["host"], each["status"], each["difference"]) for each in check["processes"]}
    assert named[left] == ("elsewhere", "left", 2)
    assert named[4242] == (None, "closed", 1)
    assert named[4243] == (None, "closed", -1)
    assert (
        f"Web process {left} on host elsewhere is gone and was not settled: 2 of its runs are missing." in check["says"]
    )
    assert "⚠ It does not add up over all time" in page


async def test_a_window_that_is_none_is_refused(serve, make_settings) -> None:
    """What is neither a time nor a duration is refused with the forms that are taken."""
    async with serve(make_settings()) as client:
        for since in ("yesterday", "", "999999999d"):
            answer = await client.get("/v1/ledger", params={"since": since})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == "since"
            assert "15m, 24h or 7d" in answer.json()["error"]["message"]


async def test_only_operations_may_read_it(serve, make_settings) -> None:
    """A key for runs alone is refused, one for operations is let in."""
    settings = make_settings()
    [app] = await headers(settings, "app")
    [ops] = await headers(settings, "ops", scopes=["ops"])
    async with serve(settings) as client:
        statuses = [(await client.get("/v1/ledger", headers=each)).status_code for each in ({}, app, ops)]
    assert statuses == [401, 403, 200]


async def test_an_ended_session_is_let_go_in_a_moment(serve, make_settings, rows) -> None:
    """Turns of a session that is not sampled are held until its client ends it, and gone about a second later."""
    settings = desk(make_settings, sample_rate=0.0)
    async with serve(settings) as client:
        for session in ("s-1", "s-2"):
            await say(client, "1 + 1", session)
        await until(lambda: rows("SELECT count(*) FROM outbox WHERE held") == [(2,)])
        assert (await ledger(client))["ledger"]["pending"]["held"] == 2
        await client.post("/v1/sessions/s-1/end")
        await until(lambda: rows("SELECT count(*) FROM outbox") == [(1,)])
        found = await ledger(client)
    assert states(found["ledger"]) == {"pending": 1, "sampled_out": 1}
    assert rows("SELECT session_id, extract(epoch FROM swept_at - ended_at) < 3 FROM runs JOIN sessions "
                "USING (session_id) WHERE state = 'sampled_out'") == [("s-1", True)]  # fmt: skip


Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def gateway(tmp_path: Path) -> Command:
    """Run ``gateway ledger`` on a home of the test's own; keyword arguments are settings."""

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"GATEWAY_HOME": str(tmp_path / "home")} | settings
        command = [sys.executable, "-m", "gateway", "ledger", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False
        )

    return run


def test_the_command(gateway: Command, database_url: str, seed: Seed, rows) -> None:
    """It shows the funnel and the check in words, or all as JSON; the exit code says whether it adds up."""
    seed.run("scored", process_id=1, agent="[red]math", kept_because='["sampled"]')
    seed.run("pending", process_id=1, agent="[red]math")
    rows("INSERT INTO run_counts (process_id, agent, served, closed_at) VALUES (1, '[red]math', 2, now()) RETURNING 1")
    shown = gateway(GATEWAY_DATABASE_URL=database_url)
    assert shown.returncode == 0, shown.stderr
    for expected in (
        *MEANING.values(),
        "[red]math",
        "judging 1",
        "50.0 %",
        "It adds up over all time: 2 served",
    ):
        assert expected in shown.stdout
    rows("DELETE FROM runs WHERE state = 'scored' RETURNING 1")
    with ThreadPoolExecutor() as threads:
        options = (("--json", "--since", "1h"), ("--since", "soon"))
        given, wrong = threads.map(lambda each: gateway(*each, GATEWAY_DATABASE_URL=database_url), options)
    report = json.loads(given.stdout)
    assert (given.returncode, report["check"]["difference"], report["ledger"]["total"]) == (1, 1, 1)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "15m, 24h or 7d" in wrong.stderr


def test_the_command_starts_the_embedded_database(gateway: Command, tmp_path: Path) -> None:
    """It reads beside an embedded Postgres that runs, and runs one that does not for its own time."""
    home = tmp_path / "home"
    home.mkdir()
    postgres = EmbeddedPostgres(home)
    migrate(postgres.start())
    beside = gateway()
    assert running_url(home) is not None
    postgres.stop()
    alone = gateway()
    assert running_url(home) is None
    for done in (beside, alone):
        assert done.returncode == 0, done.stderr
        assert "It adds up over all time: 0 served" in done.stdout
