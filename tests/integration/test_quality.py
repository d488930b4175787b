"""What people in operations see: the figures, the page, and the links into MLflow."""

import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest
from litestar import Litestar
from litestar.testing import AsyncTestClient

from gateway.http.errors import HANDLERS
from gateway.quality.links import MlflowLinks
from gateway.quality.page import ops_page
from gateway.quality.rollups import NEWEST_FAILURES, quality
from gateway.storage.database import open_pool
from gateway.tracing.ledger import MEANING

MLFLOW = "http://mlflow.example:5000"
HOSTILE = """<script>alert("x")</script><img src=x onerror='y'>"""
_ids = itertools.count()


class Seed:
    """Writes rows as the outbox and the evaluator do."""

    def __init__(self, connection: psycopg.Connection[Any]):
        self._connection = connection

    def _insert(self, table: str, row: dict[str, Any]) -> None:
        values = ", ".join(f"%({column})s" for column in row)
        self._connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})", row)

    def run(self, state: str = "scored", *, minutes_ago: float = 5, **columns: Any) -> str:
        """Add a run to the ledger and return its trace id."""
        row = {
            "trace_id": f"tr-{next(_ids):032x}",
            "agent": "math",
            "agent_version": "1",
            "session_id": "s-1",
            "status": "ok",
            "offline": False,
            "state": state,
            "inclusion_probability": 1.0,
            "started_at": datetime.now(UTC) - timedelta(minutes=minutes_ago),
            "duration_ms": 12.0,
        } | columns
        self._insert("runs", row)
        return row["trace_id"]

    def score(self, value: Any = None, passed: bool | None = None, *, minutes_ago: float = 5, **columns: Any) -> None:
        """Add a score."""
        scorer = columns.get("scorer", "exact_match")
        row = {
            "score_id": f"a-{next(_ids)}",
            "trace_id": "tr-1",
            "agent": "math",
            "scorer": scorer,
            "scorer_version": "1",
            "name": scorer,
            "value": None if value is None else json.dumps(value),
            "passed": passed,
            "source_type": "CODE",
            "source_id": scorer,
            "created_at": datetime.now(UTC) - timedelta(minutes=minutes_ago),
        } | columns
        self._insert("scores", row)

    def scored_runs(
        self,
        count: int,
        value: Any,
        passed: bool | None,
        *,
        kept: float = 1.0,
        taken: float = 1.0,
        **columns: Any,
    ) -> None:
        """Add runs, each of a session of its own and with one score: with what probability kept, and then scored."""
        for _ in range(count):
            trace_id = self.run(session_id=f"s-of-its-own-{next(_ids)}", inclusion_probability=kept)
            self.score(value, passed, trace_id=trace_id, inclusion_probability=taken, **columns)

    def scoring(self, reason: str, **columns: Any) -> None:
        """Add what a judge was to say, and passed over."""
        row = {"subject": f"tr-{next(_ids)}", "turns": 0, "scorer": "judge", "scorer_version": "1", "trace_id": "tr-1"}
        row |= {"agent": "math", "probability": 1.0, "state": "skipped", "reason": reason}
        self._insert("scorings", row | columns)

    def conversation(self, **columns: Any) -> None:
        """Add a conversation."""
        row = {"session_id": f"s-{next(_ids)}", "agent": "math", "last_turn_at": datetime.now(UTC)} | columns
        self._insert("conversations", row)

    def drops(self, count: int, reason: str) -> None:
        """Count runs of which not even a row could be kept."""
        self._insert("run_drops", {"agent": "math", "reason": reason, "count": count})


@pytest.fixture
def seed(database_url: str) -> Iterator[Seed]:
    """A writer on tables that are empty before and after the test."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        empty = "TRUNCATE runs, run_drops, scores, scorings, conversations CASCADE"
        connection.execute(empty)
        yield Seed(connection)
        connection.execute(empty)


class Mlflow:
    """Stands for MLflow's server: answers, counts the questions, and can be away."""

    def __init__(self, status: int = 200, body: Any = None):
        self.status = status
        self.body = {"experiment": {"experiment_id": "7"}} if body is None else body
        self.asked: list[httpx.URL] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        self.asked.append(request.url)
        return httpx.Response(self.status, json=self.body)


def mlflow_links(mlflow: Mlflow, ui: str | None = MLFLOW) -> MlflowLinks:
    """Return the links of experiment ``my experiment`` of that server."""
    return MlflowLinks(httpx.AsyncClient(transport=httpx.MockTransport(mlflow)), ui, "my experiment")


@asynccontextmanager
async def served(
    database_url: str, links: MlflowLinks | None = None, *, pool_timeout_s: float = 5.0
) -> AsyncIterator[AsyncTestClient[Litestar]]:
    """Serve the two handlers on the database, as the app does."""

    @asynccontextmanager
    async def lifespan(app: Litestar) -> AsyncIterator[None]:
        # Here, not around the client: the client runs the app on an event loop of its own.
        async with open_pool(database_url, max_size=2, name="test") as pool:
            pool.timeout = pool_timeout_s
            app.state.update({"pool": pool, "mlflow_links": links or mlflow_links(Mlflow(), ui=None)})
            yield

    app = Litestar([quality, ops_page], lifespan=[lifespan], exception_handlers=HANDLERS, logging_config=None)
    async with AsyncTestClient(app) as client:
        yield client


async def figures(database_url: str, links: MlflowLinks | None = None) -> dict[str, Any]:
    """Return what ``/v1/quality`` answers."""
    async with served(database_url, links) as client:
        response = await client.get("/v1/quality")
        assert response.status_code == 200, response.text
        return response.json()


async def page(database_url: str, links: MlflowLinks | None = None) -> str:
    """Return what ``/ops`` answers."""
    async with served(database_url, links) as client:
        response = await client.get("/ops")
        assert response.status_code == 200
        return response.text


async def test_verdicts_and_failures_are_counted_apart(database_url: str, seed: Seed) -> None:
    """Scores without a verdict and failures of the scorer are counted apart and have no part in the share."""
    for passed in (True, True, True, False, None):
        seed.score(passed, passed)
    seed.score(error="TimeoutError: no answer")

    (rollup,) = (await figures(database_url))["hour"]["scorers"]

    assert (rollup["scored"], rollup["passed"], rollup["failed"], rollup["no_verdict"]) == (5, 3, 1, 1)
    assert rollup["pass_share"]["count"] == 4
    assert rollup["scorer_failures"] == 1
    assert rollup["mean"] is None


async def test_estimates_are_of_all_of_the_traffic(database_url: str, seed: Seed) -> None:
    """Share and mean are those that the whole traffic would have, though more was kept of what failed."""
    seed.scored_runs(20, 1.0, False, kept=1.0)
    seed.scored_runs(98, 5, True, kept=0.2, taken=0.5)
    seed.scored_runs(3, None, None, kept=0.001, error="TimeoutError: no answer")

    (rollup,) = (await figures(database_url))["hour"]["scorers"]
    html = await page(database_url)

    share, mean = rollup["pass_share"], rollup["mean"]
    assert (rollup["passed"], rollup["failed"], rollup["scorer_failures"]) == (98, 20, 3)
    assert share["value"] == pytest.approx(0.98)
    assert 0.95 < share["low"] < 0.97
    assert 0.985 < share["high"] < 0.995
    assert share["effective_n"] == pytest.approx(1000**2 / (20 + 98 * 100))
    assert (share["count"], share["sessions"]) == (118, 118)
    assert mean["value"] == pytest.approx(4.92)
    assert mean["low"] < 4.92 < mean["high"]
    assert "<b>98.0 %</b>" in html
    assert "<b>4.920</b>" in html
    assert "n<sub>eff</sub> 101<" in html
    assert "98 passed, 20 failed" in html


async def test_turns_of_a_session_are_one_draw(database_url: str, seed: Seed) -> None:
    """Scores of one session's turns are taken together: fifty of them are not enough data."""
    for _ in range(50):
        seed.score(True, True, trace_id=seed.run(session_id="s-long"))

    (rollup,) = (await figures(database_url))["hour"]["scorers"]

    share = rollup["pass_share"]
    assert (share["count"], share["sessions"], share["effective_n"]) == (50, 1, 1.0)


async def test_not_enough_data_is_said(database_url: str, seed: Seed) -> None:
    """Where the scores do not tell enough there is no estimate, but the counts, and what would be needed."""
    seed.scored_runs(11, 4, True)
    seed.scored_runs(1, 2, False)

    (rollup,) = (await figures(database_url))["hour"]["scorers"]
    html = await page(database_url)

    for estimate in (rollup["pass_share"], rollup["mean"]):
        assert (estimate["value"], estimate["low"], estimate["high"]) == (None, None, None)
        assert (estimate["effective_n"], estimate["needed_n"]) == (12, 30)
    assert "not enough data" in html
    assert "n<sub>eff</sub> 12</span>, at least 30 needed" in html
    assert "11 passed, 1 failed" in html


async def test_what_a_scorer_passed_over_is_counted_by_reason(database_url: str, seed: Seed) -> None:
    """What was not scored is counted by why, apart from scores and failures, for runs and for conversations."""
    seed.score(True, True)
    seed.run(skips=json.dumps({"exact_match": "no expectations", "grounded": HOSTILE}))
    seed.run(skips=json.dumps({"exact_match": "no expectations"}))
    seed.run(skips=json.dumps({"exact_match": "budget"}))
    seed.run(skips=json.dumps({"exact_match": "budget"}), minutes_ago=120)
    seed.run(skips=json.dumps({"judge": "budget"}))
    seed.scoring("budget")
    seed.scoring("no retrieval")
    seed.conversation(skips=json.dumps({"frustration": "share"}))
    seed.scoring("too long", scorer="frustration", turns=3)
    seed.scoring("too long", scorer="frustration", turns=5)
    seed.scoring("to come", state="pending")

    report = await figures(database_url)
    hour, day = report["hour"]["scorers"], report["day"]["scorers"]
    html = await page(database_url)

    said = {(each["level"], each["name"]): (each["scored"], each["not_scored"]) for each in hour}
    assert said == {
        ("trace", "exact_match"): (1, {"no expectations": 2, "budget": 1}),
        ("trace", "grounded"): (0, {HOSTILE: 1}),
        ("trace", "judge"): (0, {"budget": 2, "no retrieval": 1}),
        ("conversation", "frustration"): (0, {"too long": 2, "share": 1}),
    }
    assert day[0]["not_scored"] == {"budget": 2, "no expectations": 2}
    assert "not scored: no expectations 2, budget 1" in html
    assert HOSTILE not in html


async def test_mean_is_taken_over_numbers_alone(database_url: str, seed: Seed) -> None:
    """The mean leaves out values that are not numbers, and numbers without a verdict have no pass share."""
    for value in (0.5, 1, "not a number", True, [3]):
        seed.scored_runs(20, value, None)

    (rollup,) = (await figures(database_url))["hour"]["scorers"]

    assert rollup["mean"]["value"] == 0.75
    assert rollup["mean"]["count"] == 40
    assert rollup["pass_share"] is None
    assert rollup["no_verdict"] == 100


async def test_number_that_is_too_large_breaks_nothing(database_url: str, seed: Seed) -> None:
    """Numbers beyond a float, or whose square is, leave the figures and the page readable."""
    seed.score(10**400, False)
    seed.score(1e200, False)
    seed.score(1e90, False)

    (rollup,) = (await figures(database_url))["hour"]["scorers"]

    assert rollup["failed"] == 3
    assert rollup["mean"]["count"] == 1
    assert "exact_match" in await page(database_url)


async def test_only_latest_scores_count(database_url: str, seed: Seed) -> None:
    """A score that was replaced by a later one counts no more, neither as a score nor as a failure."""
    seed.score(False, False, latest=False)
    seed.score(True, True)

    report = await figures(database_url)

    assert [(each["passed"], each["failed"]) for each in report["hour"]["scorers"]] == [(1, 0)]
    assert report["failures"] == []


async def test_windows_hold_the_last_hour_and_day(database_url: str, seed: Seed) -> None:
    """What is older than an hour is in the day alone; what is older than a day is in neither."""
    for minutes_ago in (30, 120, 2000):
        seed.run(minutes_ago=minutes_ago)
        seed.score(True, True, minutes_ago=minutes_ago)

    report = await figures(database_url)

    assert (report["hour"]["ledger"]["total"], report["day"]["ledger"]["total"]) == (1, 2)
    assert (report["hour"]["scorers"][0]["passed"], report["day"]["scorers"][0]["passed"]) == (1, 2)


async def test_traces_and_conversations_are_told_apart(database_url: str, seed: Seed) -> None:
    """One scorer's scores of traces and of conversations are two rows, each with its level."""
    seed.score(True, True)
    seed.score(False, False, session_id="s-1")

    rollups = (await figures(database_url))["hour"]["scorers"]

    assert [(each["level"], each["passed"], each["failed"]) for each in rollups] == [
        ("trace", 1, 0),
        ("conversation", 0, 1),
    ]


async def test_ledger_lists_every_state_and_adds_up(database_url: str, seed: Seed) -> None:
    """Every state is listed, also at 0, the states sum to the total, and lost runs are named by reason."""
    for state in ("scored", "scored", "scored", "pending", "sampled_out"):
        seed.run(state)
    seed.run("failed", reason="mlflow_away")
    seed.drops(4, "buffer_full")

    ledger = (await figures(database_url))["hour"]["ledger"]

    states = {count["state"]: count for count in ledger["states"]}
    assert list(states) == list(MEANING)
    assert sum(count["runs"] for count in ledger["states"]) == ledger["total"] == 10
    assert sum(count["share"] for count in ledger["states"]) == pytest.approx(1)
    assert ledger["scored_share"] == 0.3
    assert states["erased"]["runs"] == 0
    assert states["dropped"]["reasons"] == {"buffer_full": 4}
    assert states["failed"]["reasons"] == {"mlflow_away": 1}


async def test_page_shows_every_state(database_url: str, seed: Seed) -> None:
    """The page names each state and what it means, also where no run is in it."""
    seed.run()

    html = await page(database_url)

    for state, meaning in MEANING.items():
        assert state.replace("_", " ") in html
        assert meaning.replace("'", "&#x27;") in html


async def test_offline_model_is_labelled(database_url: str, seed: Seed) -> None:
    """An agent answered by an offline model is labelled so, and with the share if it was not every run."""
    seed.run(offline=True)
    seed.score(True, True)
    seed.run(agent="support", offline=True)
    seed.run(agent="support")
    seed.score(True, True, agent="support")

    agents = (await figures(database_url))["hour"]["agents"]
    html = await page(database_url)

    assert [(agent["agent"], agent["offline_share"]) for agent in agents] == [("math", 1.0), ("support", 0.5)]
    assert ">offline model</span>" in html
    assert "offline model: 50.0 % of the runs" in html


async def test_failures_are_newest_first_with_all_their_failed_scores(database_url: str, seed: Seed) -> None:
    """A failed trace comes once with each score that failed it, before older ones and without those that passed."""
    old, new = seed.run(), seed.run(session_id="s-new", offline=True)
    seed.score(False, False, trace_id=old, minutes_ago=20)
    seed.score(0.2, False, trace_id=new, scorer="helpful", rationale="too short", minutes_ago=2)
    seed.score("no", False, trace_id=new, scorer="grounded", minutes_ago=1)
    seed.score(True, True, trace_id=new, scorer="polite")

    first, second = (await figures(database_url))["failures"]

    assert (first["trace_id"], second["trace_id"]) == (new, old)
    assert (first["session_id"], first["offline"], first["level"]) == ("s-new", True, "trace")
    assert first["scores"] == [
        {"name": "grounded", "value": "no", "rationale": None},
        {"name": "helpful", "value": 0.2, "rationale": "too short"},
    ]


async def test_failed_conversation_stands_apart_from_its_first_trace(database_url: str, seed: Seed) -> None:
    """Where a conversation and its first trace both failed, each is a failure of its own."""
    trace_id = seed.run(session_id="s-1")
    seed.score(False, False, trace_id=trace_id)
    seed.score(False, False, trace_id=trace_id, session_id="s-1", scorer="no_repeated_question")

    failures = (await figures(database_url, mlflow_links(Mlflow())))["failures"]

    shown = {failure["level"]: (failure["scores"][0]["name"], failure["mlflow_url"]) for failure in failures}
    experiment = f"{MLFLOW}/#/experiments/7"
    assert shown == {
        "trace": ("exact_match", f"{experiment}/traces?selectedEvaluationId={trace_id}"),
        "conversation": ("no_repeated_question", f"{experiment}/chat-sessions/s-1"),
    }


async def test_failures_are_bounded(database_url: str, seed: Seed) -> None:
    """However many failures there are, the newest twenty are given."""
    for number in range(NEWEST_FAILURES + 5):
        seed.score(False, False, trace_id=f"tr-{number}", minutes_ago=number)

    failures = (await figures(database_url))["failures"]

    assert [failure["trace_id"] for failure in failures] == [f"tr-{number}" for number in range(NEWEST_FAILURES)]


async def test_hostile_text_is_shown_as_text(database_url: str, seed: Seed) -> None:
    """Markup in any field that the page shows comes out escaped, in text and in attributes."""
    fields = {"agent": HOSTILE, "scorer": HOSTILE, "name": HOSTILE + "name", "trace_id": HOSTILE}
    seed.run("failed", agent=HOSTILE, session_id=HOSTILE, trace_id=HOSTILE, reason=HOSTILE, offline=True)
    seed.score(HOSTILE, False, rationale=HOSTILE, **fields)
    seed.score([HOSTILE], False, rationale=HOSTILE, session_id=HOSTILE, **fields)

    for links in (mlflow_links(Mlflow()), mlflow_links(Mlflow(body={"experiment": {"experiment_id": HOSTILE}})), None):
        html = await page(database_url, links)

        assert html.count("<script") == 1  # the page's own
        assert "<img" not in html
        assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in html


async def test_braces_in_a_field_are_only_text(database_url: str, seed: Seed) -> None:
    """Text that looks like a template's field is shown as it is."""
    seed.score(False, False, rationale="{agent} $main ${nonce} %s")

    assert "{agent} $main ${nonce} %s" in await page(database_url)


async def test_long_rationale_is_cut_on_the_page_alone(database_url: str, seed: Seed) -> None:
    """The page shows the beginning of a long rationale, the JSON all of it."""
    seed.score(False, False, rationale="long " * 1000)

    assert (await figures(database_url))["failures"][0]["scores"][0]["rationale"] == ("long " * 1000)
    assert (await page(database_url)).count("long ") < 200


async def test_page_allows_no_script_but_its_own(database_url: str, seed: Seed) -> None:
    """The policy forbids all but the page's own script and style, by a nonce that is new each time."""
    async with served(database_url) as client:
        first, second = await client.get("/ops"), await client.get("/ops")

    policy = first.headers["content-security-policy"]
    nonce = policy.split("script-src 'nonce-")[1].split("'")[0]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert f'<script nonce="{nonce}">' in first.text
    assert f'<style nonce="{nonce}">' in first.text
    assert " style=" not in first.text
    assert nonce not in second.text
    assert first.headers["content-type"].startswith("text/html")


async def test_empty_database_says_what_to_do(database_url: str, seed: Seed) -> None:
    """Without runs the page gives the curl command that makes one, and the figures are 0 or null."""
    report = await figures(database_url)
    html = await page(database_url)

    assert report["hour"]["ledger"]["total"] == 0
    assert report["hour"]["ledger"]["scored_share"] is None
    assert report["hour"]["scorers"] == report["day"]["agents"] == report["failures"] == []
    assert "No runs in the last hour. Send one:" in html
    assert "curl http://testserver.local/invocations" in html
    assert "there was nothing to score" in html


async def test_runs_without_scores_point_to_the_evaluator(database_url: str, seed: Seed) -> None:
    """With runs but no scores the page says where to look, and still tells an offline model."""
    seed.run("pending", offline=True)

    html = await page(database_url)

    assert "No runs in the last hour" not in html
    assert "gateway worker" in html
    assert ">offline model</span>" in html


async def test_database_away_is_said_on_the_page() -> None:
    """Without a database the page and the figures answer 503 and point to /health."""
    async with served("postgresql://nobody@127.0.0.1:1/none", pool_timeout_s=0.1) as client:
        html, body = await client.get("/ops"), await client.get("/v1/quality")

    assert (html.status_code, body.status_code) == (503, 503)
    assert "/health" in html.text
    assert body.json()["error"]["code"] == "temporarily_unavailable"


async def test_experiment_is_looked_up_once() -> None:
    """MLflow is asked for the experiment by name, once, and what it said is kept."""
    mlflow = Mlflow()
    links = mlflow_links(mlflow)

    assert await links.experiment_url() == await links.experiment_url() == f"{MLFLOW}/#/experiments/7"
    (asked,) = mlflow.asked
    assert asked.path == "/api/2.0/mlflow/experiments/get-by-name"
    assert asked.params["experiment_name"] == "my experiment"


@pytest.mark.parametrize("mlflow", [Mlflow(404), Mlflow(500), Mlflow(body=["odd"]), Mlflow(body={"experiment": {}})])
async def test_no_link_while_mlflow_does_not_know_the_experiment(mlflow: Mlflow, database_url: str, seed: Seed) -> None:
    """Without the experiment's id the page shows the bare trace id, and does not ask MLflow again at once."""
    seed.score(False, False, trace_id="tr-bare")
    links = mlflow_links(mlflow)

    report, html = await figures(database_url, links), await page(database_url, links)

    assert report["mlflow_url"] is report["failures"][0]["mlflow_url"] is None
    assert '<span class="id">tr-bare</span>' in html
    assert len(mlflow.asked) == 1


async def test_no_ui_no_question() -> None:
    """Where no address of MLflow's UI is known, nothing is asked and there are no links."""
    mlflow = Mlflow()

    assert await mlflow_links(mlflow, ui=None).experiment_url() is None
    assert mlflow.asked == []


async def test_link_carries_no_credentials() -> None:
    """User and password in MLflow's address are used to ask, and never shown."""
    mlflow = Mlflow()

    url = await mlflow_links(mlflow, ui="https://me:secret@mlflow.example/ui/").experiment_url()

    assert url == "https://mlflow.example/ui/#/experiments/7"
    assert mlflow.asked[0].userinfo == b"me:secret"
