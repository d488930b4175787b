"""The evaluator's intake on a real Postgres and a real MLflow, with its database opened directly and over REST."""

import asyncio
import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from mlflow.entities import Feedback
from mlflow.entities import Trace as MlflowTrace
from mlflow.genai.scorers import scorer

from gateway.evaluation.scoring import LiveScorer
from gateway.evaluation.store import MlflowStore
from gateway.rules import ScorerRule
from gateway.settings import MLFLOW_DEFAULTS, Settings
from gateway.tracing.spans import SpanError

from .evaluating import evaluator, fill, made

WAYS = ["direct", "rest"]


class Gate:
    """Stands in front of a server: closed, whoever calls finds nobody."""

    def __init__(self, port: int):
        self._to = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        """Address of the gate."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def shut(self) -> None:
        """Let nobody through any more."""
        self._closed.set()

    def open(self) -> None:
        """Let callers through."""
        self._closed.clear()

    def _accept(self) -> None:
        while True:
            caller, _ = self._listener.accept()
            threading.Thread(target=self._forward, args=(caller,), daemon=True).start()

    def _forward(self, caller: socket.socket) -> None:
        with caller, socket.create_connection(self._to) as server:
            while not self._closed.is_set():
                for each in select.select([caller, server], [], [], 0.05)[0]:
                    data = each.recv(65536)
                    if not data:
                        return
                    (server if each is caller else caller).sendall(data)


@pytest.fixture(scope="session")
def mlflow_port(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a running MLflow server on the tests' MLflow database."""
    MlflowStore(mlflow_uri, "made by the tests")  # makes the tables
    folder: Path = tmp_path_factory.mktemp("mlflow")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    own = {"MLFLOW_BACKEND_STORE_URI": mlflow_uri, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env=os.environ | MLFLOW_DEFAULTS | own, cwd=folder, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success:
                break
        time.sleep(0.2)
    yield port
    os.killpg(server.pid, signal.SIGTERM)
    server.wait(20)


@pytest.fixture
def uri_of(mlflow_uri: str, request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Return MLflow's tracking URI for a way of writing."""

    def uri(way: str) -> str:
        return mlflow_uri if way == "direct" else f"http://127.0.0.1:{request.getfixturevalue('mlflow_port')}"

    return uri


@pytest.fixture
def settings(make_settings: Callable[..., Settings]) -> Settings:
    """Settings with an experiment of the test's own."""
    return make_settings(mlflow_experiment=f"test-{uuid.uuid4().hex[:8]}")


def kept(store: MlflowStore, *trace_ids: str) -> list[tuple[str, str]]:
    """Return what MLflow's tags say of why traces were kept."""
    found = {trace.info.trace_id: trace.info.tags for trace in store.read_traces(list(trace_ids))}
    tags = [found[trace_id] for trace_id in trace_ids]
    return [(each["gateway.inclusion_probability"], each["gateway.kept_because"]) for each in tags]


def is_whole(trace: MlflowTrace, *, scores: int = 1) -> bool:
    """Whether a trace has all spans and scores, once each."""
    ids = [each.assessment_id for each in trace.info.assessments]
    return len(trace.data.spans) == 2 and len(ids) == len(set(ids)) == scores


def code_scorer(function: Callable[..., Any]) -> list[LiveScorer]:
    """Return a scorer in plain code as the only one."""
    return [LiveScorer(scorer(function), "1", ScorerRule(dataset=None))]


def polite(outputs: Any) -> Feedback:
    """Give a verdict."""
    return Feedback(name="to ann@example.com", value=True, rationale="ask ann@example.com")


@pytest.mark.parametrize("way", WAYS)
async def test_written_twice_a_trace_is_there_once_with_all_it_carries(settings, uri_of, rows, way) -> None:
    """Cost, tags, previews and ids are where MLflow reads them; a second write changes nothing; scores are redacted."""
    own = {"tags": {"team": "a" * 5000}, "metadata": {"page": "checkout"}, "client_request_id": "req-7"}
    trace = made(traceparent=f"00-{'a' * 32}-{'b' * 16}-01", request_preview="a sum", **own)
    stopped = made(
        "s-2", error=SpanError("CANCELLED", "The client left."), client_left=True, client_request_id="x" * 60
    )
    fill(settings, trace, stopped, rate=0.25)
    payloads = rows("SELECT trace_id, payload FROM outbox")
    async with evaluator(settings, uri_of(way), scorers=code_scorer(polite)) as parts:
        await parts.intake.drain()
        for trace_id, payload in payloads:
            rows("UPDATE runs SET state = 'pending' RETURNING 1")
            rows("INSERT INTO outbox (trace_id, payload) VALUES (%s, %s) RETURNING 1", trace_id, payload)
        await parts.intake.drain()
        first, second = (parts.store.read_traces([each.trace_id])[0] for each in (trace, stopped))
    assert is_whole(first)
    assert is_whole(second)
    assert first.info.cost == pytest.approx({"input_cost": 15e-5, "output_cost": 6e-5, "total_cost": 21e-5})
    assert first.data.spans[1].llm_cost == first.info.cost
    assert {span.span_type for span in first.data.spans} == {"AGENT", "CHAT_MODEL"}
    assert first.info.token_usage["total_tokens"] == 1100
    assert (first.info.state, second.info.state) == ("OK", "ERROR")
    assert second.info.tags["gateway.cancelled"] == "true"
    assert (first.info.client_request_id, second.info.client_request_id) == ("req-7", None)
    assert second.info.trace_metadata["gateway.client_request_id"] == "x" * 60
    assert first.info.trace_metadata["gateway.traceparent"] == trace.traceparent
    assert (first.info.trace_metadata["page"], len(first.info.tags["team"])) == ("checkout", 4096)
    assert (first.info.request_preview, first.info.response_preview) == ("a sum", "It is 42.")
    assert (first.info.tags["gateway.inclusion_probability"], first.info.tags["gateway.kept_because"]) == (
        "0.25",
        "sampled",
    )
    assert first.info.assessments[0].rationale.startswith("ask <EMAIL:")
    assert first.info.assessments[0].name.startswith("to <EMAIL:")
    assert {row[0] for row in rows("SELECT rationale FROM scores")} >= {first.info.assessments[0].rationale}


@pytest.mark.parametrize("way", WAYS)
async def test_a_promotion_reaches_traces_that_are_held_and_those_that_are_in_mlflow(
    settings, uri_of, rows, way
) -> None:
    """Held traces are nobody's until a rule promotes them; those written before the promotion get their tags anew."""
    [held] = fill(settings, made("not drawn"), rate=0.1, drawn=False)
    [early] = fill(settings, made("drawn"), rate=0.5)
    async with evaluator(settings, uri_of(way), scorers=[]) as parts:
        await parts.intake.drain()
        assert rows("SELECT trace_id, claimed_by, attempts FROM outbox") == [(held, None, 0)]
        assert await parts.projection.project() == 0
        assert kept(parts.store, early) == [("0.5", "sampled")]
        [later] = fill(settings, made("not drawn"), rate=0.1, drawn=False, rules=["error"])
        fill(settings, made("drawn"), rate=0.5, rules=["slow"])
        await parts.intake.drain()
        assert kept(parts.store, held, later) == [("1.0", "error")] * 2
        assert await parts.projection.project() == 2
        assert kept(parts.store, early) == [("1.0", "sampled,slow")]
        assert await parts.projection.project() == 0
        fill(settings, made("drawn"), rate=0.5, rules=["error"])
        await parts.projection.project()
        assert kept(parts.store, early) == [("1.0", "sampled,error,slow")]


class PausingStore(MlflowStore):
    """The real store, which waits before it writes."""

    def __init__(self, uri: str, experiment: str):
        super().__init__(uri, experiment)
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def write_traces(self, traces: list[Any]) -> None:
        """Write, when it may."""
        self.reached.set()
        self.go_on.wait(20)
        super().write_traces(traces)


@pytest.mark.parametrize("projected", [False, True])
async def test_a_trace_written_after_its_promotion_gets_its_tags_in_the_end(
    settings, mlflow_uri, rows, projected
) -> None:
    """A trace that was claimed before the promotion is looked at again, whether or not a round of tags came between."""
    [early] = fill(settings, made("s"), rate=0.5)
    async with evaluator(settings, mlflow_uri, PausingStore, scorers=[]) as parts:
        draining = asyncio.create_task(parts.intake.drain())
        await asyncio.to_thread(parts.store.reached.wait, 20)
        fill(settings, made("s"), rate=0.5, rules=["error"])
        if projected:
            assert await parts.projection.project() == 1
        parts.store.go_on.set()
        await draining
        assert rows("SELECT projected_at FROM sampled_sessions") == [(None,)]
        assert await parts.projection.project() == 1
        assert kept(parts.store, early) == [("1.0", "sampled,error")]


async def test_while_mlflow_is_away_everything_waits_and_nothing_is_given_up(settings, mlflow_port, rows) -> None:
    """However often it is tried, the outbox keeps all; once MLflow is back, traces and tags get there."""
    gate = Gate(mlflow_port)
    [early] = fill(settings, made("s"), rate=0.5)
    async with evaluator(settings, gate.url, scorers=[]) as parts:
        await parts.intake.drain()
        gate.shut()
        late = fill(settings, made("s"), made("t"), rate=0.5, rules=["error"])
        for _ in range(7):
            await parts.intake.drain()
        assert rows("SELECT claimed_by, attempts, refusals FROM outbox WHERE retry_at <= now()") == [(None, 0, 0)] * 2
        assert await parts.projection.project() == 0
        assert rows("SELECT count(*) FROM runs WHERE state = 'failed'") == [(0,)]
        gate.open()
        await parts.intake.drain()
        assert await parts.projection.project() == 2
        assert kept(parts.store, early, *late) == [("1.0", "sampled,error")] * 3


async def test_a_read_only_mlflow_is_away_and_nothing_is_given_up(settings, mlflow_uri, rows) -> None:
    """Where MLflow's database can be read and not written, traces wait however often it is tried."""
    fill(settings, made("s"), made("t"))
    MlflowStore(mlflow_uri, settings.mlflow_experiment)  # makes the experiment while it can be made
    read_only = f"{mlflow_uri}{'&' if '?' in mlflow_uri else '?'}options=-cdefault_transaction_read_only%3Don"
    async with evaluator(settings, read_only, scorers=[]) as parts:
        for _ in range(6):
            await parts.intake.drain()
            rows("UPDATE outbox SET retry_at = now() RETURNING 1")
        assert not parts.store.is_well()
    assert rows("SELECT claimed_by, attempts, refusals FROM outbox") == [(None, 0, 0)] * 2
    async with evaluator(settings, mlflow_uri, scorers=[]) as parts:
        assert parts.store.is_well()


async def test_a_promotion_waits_for_traces_that_are_leaving_the_outbox(settings, mlflow_uri, database_url) -> None:
    """The sessions of a batch are held before the ledger is compared: a promotion that has one is waited for."""
    [early] = fill(settings, made("s"), rate=0.5)
    async with evaluator(settings, mlflow_uri, scorers=[]) as parts:
        async with await psycopg.AsyncConnection.connect(database_url) as promoting:
            await promoting.execute("UPDATE sampled_sessions SET rules = '[\"error\"]', promoted_at = now()")
            draining = asyncio.create_task(parts.intake.drain())
            async with await psycopg.AsyncConnection.connect(database_url, autocommit=True) as looking:
                async with asyncio.timeout(20):
                    while (await (await looking.execute(BLOCKED)).fetchone()) != (True,):  # noqa: ASYNC110 - Postgres'
                        await asyncio.sleep(0.01)
            await promoting.execute("UPDATE runs SET inclusion_probability = 1, kept_because = '[\"error\"]'")
        await draining
        assert await parts.projection.project() == 1
        assert kept(parts.store, early) == [("1.0", "error")]


BLOCKED = """
    SELECT EXISTS (SELECT 1 FROM pg_stat_activity WHERE datname = current_database()
                     AND wait_event_type = 'Lock' AND query LIKE '%FROM sampled_sessions%')
"""
CUT = """
    CREATE SEQUENCE cut;
    CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF nextval('cut') = 1 THEN PERFORM pg_terminate_backend(pg_backend_pid()); END IF;
        RETURN coalesce(NEW, OLD);
    END $$;
"""


@pytest.mark.parametrize(
    "point",
    [
        "BEFORE UPDATE ON outbox",
        "BEFORE INSERT ON scores",
        "BEFORE UPDATE ON scores",
        "BEFORE INSERT ON conversations",
        "BEFORE UPDATE ON runs",
        "BEFORE INSERT ON otlp_outbox",
        "BEFORE DELETE ON outbox",
        "at commit",
    ],
)
async def test_a_database_that_goes_away_at_any_step_loses_and_doubles_nothing(
    settings, mlflow_uri, database_url, rows, point
) -> None:
    """The server ends the connection at that very statement; the work is done again, with the effect of once."""
    settings = settings.model_copy(update={"otlp_endpoint": "http://127.0.0.1:9/v1/traces"})
    trace_ids = fill(settings, made("s"), made("s"), made("t"))
    deferred = "CONSTRAINT TRIGGER cut AFTER DELETE ON outbox DEFERRABLE INITIALLY DEFERRED"
    trigger = deferred if point == "at commit" else f"TRIGGER cut {point}"
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute(CUT)
        connection.execute(f"CREATE {trigger} FOR EACH ROW EXECUTE FUNCTION cut()")
    async with evaluator(settings, mlflow_uri, scorers=code_scorer(polite)) as parts:
        for _ in range(2):
            with contextlib.suppress(psycopg.OperationalError):
                await parts.intake.drain()
            rows("UPDATE outbox SET retry_at = now() RETURNING 1")
        traces = parts.store.read_traces(trace_ids)
    assert rows("SELECT last_value > 1 FROM cut") == [(True,)]  # it was cut, and came by again
    assert [is_whole(trace) for trace in traces] == [True] * 3
    assert rows("SELECT state, scored_by FROM runs") == [("scored", 1)] * 3
    assert rows("SELECT count(*), count(logged_at) FROM scores") == [(3, 3)]
    assert rows("SELECT (SELECT count(*) FROM outbox), count(*) FROM otlp_outbox") == [(0, 3)]


async def test_an_mlflow_database_that_goes_away_in_a_write_loses_and_doubles_nothing(
    settings, mlflow_uri, rows
) -> None:
    """Ended in the middle of a batch, MLflow has all of the batch afterwards, once."""
    trace_ids = fill(settings, *(made(f"s-{number}") for number in range(5)))
    with psycopg.connect(mlflow_uri.replace("+psycopg", ""), autocommit=True) as connection:
        MlflowStore(mlflow_uri, settings.mlflow_experiment)  # makes the tables
        connection.execute(CUT)
        connection.execute("CREATE TRIGGER cut BEFORE INSERT ON spans FOR EACH ROW EXECUTE FUNCTION cut()")
        try:
            async with evaluator(settings, mlflow_uri, scorers=code_scorer(polite)) as parts:
                await parts.intake.drain()
                assert rows("SELECT claimed_by, attempts, refusals FROM outbox") == [(None, 0, 0)] * 5
                await parts.intake.drain()
                traces = parts.store.read_traces(trace_ids)
        finally:
            connection.execute("DROP TRIGGER cut ON spans; DROP FUNCTION cut; DROP SEQUENCE cut")
    assert [is_whole(trace) for trace in traces] == [True] * 5
    assert rows("SELECT DISTINCT state FROM runs") == [("scored",)]


async def test_what_is_left_pending_gets_its_true_state_and_that_is_noted(settings, mlflow_uri, rows) -> None:
    """Without a row in the outbox and without a job, a run ends as what its scores say, or as lost, and when."""
    ids = fill(settings, made("a"), made("b"), made("c"))
    async with evaluator(settings, mlflow_uri, scorers=code_scorer(polite)) as parts:
        await parts.intake.drain()
        [lost] = fill(settings, made("d"))
        rows("DELETE FROM outbox RETURNING 1")
        rows("UPDATE runs SET state = 'pending', scored_by = 0, updated_at = now() - interval '1 minute' RETURNING 1")
        await parts.intake.resume_pending()
    found = {
        trace_id: rest for trace_id, *rest in rows("SELECT trace_id, state, scored_by, swept_at IS NULL FROM runs")
    }
    assert found == {
        ids[0]: ["scored", 1, False],
        ids[1]: ["scored", 1, False],
        ids[2]: ["scored", 1, False],
        lost: ["failed", 0, False],
    }


async def test_a_trace_whose_names_cannot_be_found_goes_no_further(settings, mlflow_uri, rows) -> None:
    """What the finder of names fails on is withheld and counted; the traces beside it are taken in without names."""
    bad, good = made("a", "I am Ann, and unreadable"), made("b", "I am Ann")

    def entities(trace: Any) -> Any:
        if "unreadable" in str(trace.spans[0].inputs):
            raise ValueError("no")
        trace.spans[0].inputs = {"messages": [{"role": "user", "content": "I am <PERSON:abcd>"}]}
        return trace

    fill(settings, bad, good)
    async with evaluator(settings, mlflow_uri, scorers=[], entities=entities) as parts:
        await parts.intake.drain()
        [found] = parts.store.read_traces([bad.trace_id, good.trace_id])
    assert found.info.request_preview == "I am <PERSON:abcd>"
    assert rows("SELECT state FROM runs WHERE trace_id = %s", bad.trace_id) == [("redaction_blocked",)]
    assert rows("SELECT count(*) FROM outbox") == [(0,)]
