"""What was forgotten is gone, here and in MLflow, whatever was under way: real Postgres, real MLflow, no jobs."""

import asyncio
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from gateway.evaluation.store import MlflowStore
from gateway.settings import Settings
from gateway.storage.erasure import Erasure, Subject, find_erasure, forget, last_erasure

from . import evaluating
from .runs import until

WORD = "zanzibarine"
SCORERS = """
from mlflow.entities import Feedback
from mlflow.genai.scorers import scorer

@scorer
def quotes(inputs):
    return Feedback(value=False, rationale=str(inputs))

@scorer
def quotes_all(session):
    return Feedback(value=False, rationale=str([trace.data.spans[0].inputs for trace in session]))
"""


ASKED_AGAIN = """
    WITH gone AS (DELETE FROM scores RETURNING *)
    INSERT INTO scorings (subject, turns, scorer, scorer_version, trace_id, agent, probability)
    SELECT trace_id, 0, scorer, scorer_version, trace_id, agent, 1 FROM gone RETURNING 1
"""


def new_ids(count: int) -> list[str]:
    """Return session ids that no other test has: they share an MLflow."""
    return [f"s{number}-{uuid.uuid4().hex[:8]}" for number in range(1, count + 1)]


class PausingStore(MlflowStore):
    """The real store, which stops once after it has read or written traces, until it may go on; or it is away."""

    def __init__(self, uri: str, experiment: str):
        super().__init__(uri, experiment)
        self.pauses_after: str | None = None
        self.away = False
        self.reached = threading.Event()
        self.go_on = threading.Event()

    def write_traces(self, traces: list[Any]) -> None:
        """Write, then stop if told so."""
        super().write_traces(traces)
        self._pause("write")

    def read_traces(self, trace_ids: list[str]) -> list[Any]:
        """Read, then stop if told so."""
        traces = super().read_traces(trace_ids)
        self._pause("read")
        return traces

    def delete_traces(self, trace_ids: Any) -> int:
        """Delete, unless told to be away."""
        if self.away:
            raise ConnectionError("MLflow is away")
        return super().delete_traces(trace_ids)

    def _pause(self, after: str) -> None:
        if self.pauses_after == after:
            self.pauses_after = None
            self.reached.set()
            assert self.go_on.wait(30)


class Parts:
    """The evaluator's parts, driven by hand instead of by jobs."""

    def __init__(self, parts: evaluating.Parts):
        vars(self).update(parts._asdict())
        self.dataset = parts.settings.scorers["quotes"].dataset

    async def forget(self, session_id: str | None = None, **subject: str) -> Erasure:
        """Forget here, as the web process does."""
        erasure = await forget(self.pool, Subject(session_id, **subject))
        assert erasure is not None
        return erasure

    async def look(self, erasure: Erasure) -> Erasure:
        """Return the erasure as it stands now."""
        async with self.pool.connection() as connection:
            found = await find_erasure(connection, erasure.erasure_id)
        assert found is not None
        return found

    async def work(self, session_id: str) -> None:
        """Do all that an evaluator does for a conversation."""
        await self.intake.drain()
        await self.conversations.score(session_id)
        await self.datasets.merge_waiting()

    def records(self) -> list[Any]:
        """Return the records of the dataset."""
        dataset_id = self.store.dataset_id(self.dataset)
        return self.store.records(dataset_id) if dataset_id else []


@pytest.fixture
def settings(make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings with two scorers that fail everything and quote it."""
    (tmp_path / "empty.toml").touch()
    monkeypatch.setenv("GATEWAY_CONFIG", str(tmp_path / "empty.toml"))
    (tmp_path / "scorers").mkdir()
    (tmp_path / "scorers" / "quoting.py").write_text(SCORERS)
    return make_settings(
        scorers_dir=tmp_path / "scorers",
        scorers={"quotes": {"dataset": f"failed-{uuid.uuid4().hex[:8]}"}, "quotes_all": {"dataset": None}},
        quiet_period_s=0.001,
        mlflow_experiment=f"test-{uuid.uuid4().hex[:8]}",
    )


@pytest.fixture
def evaluator(settings: Settings, mlflow_uri: str) -> Callable[..., Any]:
    """Open the evaluator's parts on the test's database."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[Parts]:
        async with evaluating.evaluator(settings, mlflow_uri, PausingStore, alive=True) as parts:
            yield Parts(parts)

    return opened


async def say(client: Any, session: str, *texts: str, **fields: object) -> list[str]:
    """Hold a conversation and return its trace ids."""
    answers = []
    for text in texts:
        body = {"agent": "math", "input": text, "session_id": session, **fields}
        answers.append((await client.post("/invocations", json=body)).json())
    return [answer["trace_id"] for answer in answers]


def tables_with(url: str, text: str) -> set[str]:
    """Return the tables in which any row has the text, also within bytes."""
    with psycopg.connect(url) as connection:
        names = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        look = psycopg.sql.SQL("SELECT count(*) FROM {} AS row WHERE row::text ~* %s")
        return {
            name
            for (name,) in names
            if connection.execute(
                look.format(psycopg.sql.Identifier(name)), [f"{text}|{text.encode().hex()}"]
            ).fetchone()
            != (0,)
        }


async def test_nothing_of_a_forgotten_session_is_left_but_its_count(
    serve, settings, evaluator, rows, database_url, mlflow_uri
) -> None:
    """History, scores, traces and dataset rows are gone from every table, and the ledger has as many runs as before."""
    one, two = new_ids(2)
    mlflow_url = mlflow_uri.replace("postgresql+psycopg:", "postgresql:", 1)
    async with serve(settings) as client:
        traces = await say(client, one, f"12 + 30 {WORD}", f"add 1 {WORD}")
        await say(client, two, "1 + 1")
        async with evaluator() as parts:
            await parts.work(one)
            assert tables_with(database_url, WORD) == {"scores"}
            assert tables_with(mlflow_url, WORD) >= {"spans", "trace_info", "assessments", "evaluation_dataset_records"}
            known = {"sessions", "session_turns", "runs", "sampled_sessions", "conversations", "scores"}
            assert tables_with(database_url, one) >= known
            before = (await client.get("/v1/quality")).json()["day"]["ledger"]
            erasure = await parts.forget(one)
            assert not erasure.done
            await parts.erasure.erase(erasure.erasure_id)
            erasure = await parts.look(erasure)
        after = (await client.get("/v1/quality")).json()["day"]["ledger"]
    assert erasure.done
    assert erasure.removed == {
        "sessions": 1,
        "turns": 2,
        "responses": 0,
        "waiting_traces": 0,
        "scores": 3,
        "mlflow_traces": 2,
        "dataset_rows": 2,
    }
    assert tables_with(database_url, WORD) == set()
    assert tables_with(mlflow_url, WORD) == set()
    assert tables_with(mlflow_url, traces[0]) == set()
    assert tables_with(database_url, one) <= {"erasures", "erased_sessions", "procrastinate_jobs"}
    assert tables_with(database_url, traces[0]) <= {"runs", "erasures", "procrastinate_jobs"}
    assert before["total"] == after["total"] == 3
    assert rows("SELECT state, count(*) FROM runs GROUP BY state ORDER BY state") == [("erased", 2), ("scored", 1)]
    assert rows("SELECT session_id FROM sessions") == [(two,)]


async def test_traces_that_wait_in_the_outbox_never_get_to_mlflow(serve, settings, evaluator, rows) -> None:
    """A session that is forgotten before an evaluator looked leaves its traces' payloads nowhere."""
    [one] = new_ids(1)
    async with serve(settings) as client:
        [trace] = await say(client, one, "12 + 30")
    async with evaluator() as parts:
        erasure = await parts.forget(one)
        assert erasure.removed["waiting_traces"] == 1
        await parts.intake.drain()
        await parts.erasure.erase(erasure.erasure_id)
        assert (await parts.look(erasure)).done
        assert parts.store.read_traces([trace]) == []
    assert rows("SELECT state, session_id, user_id FROM runs") == [("erased", "", None)]
    assert rows("SELECT count(*) FROM outbox") == [(0,)]


async def test_a_held_conversation_is_forgotten_at_once(serve, settings, rows, database_url) -> None:
    """Of a session that is not sampled nothing was ever in MLflow: it is gone without an evaluator."""
    [one] = new_ids(1)
    async with serve(settings.model_copy(update={"sample_rate": 0.0})) as client:
        [trace] = await say(client, one, "12 + 30")
        await until(lambda: rows("SELECT held FROM outbox") == [(True,)])
        forgotten = (await client.delete(f"/v1/sessions/{one}")).json()
    assert (forgotten["status"], forgotten["removed"]["waiting_traces"]) == ("done", 1)
    assert tables_with(database_url, one) == {"erasures", "erased_sessions"}
    assert tables_with(database_url, trace) == {"runs"}
    assert rows("SELECT state FROM runs") == [("erased",)]


async def test_a_trace_on_its_way_to_mlflow_is_removed_when_it_has_arrived(serve, settings, evaluator, rows) -> None:
    """Of a batch that is being written when a session of it is forgotten, that session's traces do not stay."""
    one, two = new_ids(2)
    async with serve(settings) as client:
        [gone] = await say(client, one, "12 + 30")
        [kept] = await say(client, two, "1 + 1")
    async with evaluator() as parts:
        parts.store.pauses_after = "write"
        draining = asyncio.create_task(parts.intake.drain())
        await asyncio.to_thread(parts.store.reached.wait)
        erasure = await parts.forget(one)
        await parts.erasure.erase(erasure.erasure_id)
        assert not (await parts.look(erasure)).done
        assert rows("SELECT length(payload) FROM outbox WHERE trace_id = %s", gone) == [(0,)]
        parts.store.go_on.set()
        await draining
        assert len(parts.store.read_traces([gone])) == 1
        await parts.erasure.enqueue_open()
        assert rows("SELECT args FROM procrastinate_jobs WHERE task_name = 'erase'") == [
            ({"erasure_id": erasure.erasure_id},)
        ]
        await parts.erasure.erase(erasure.erasure_id)
        assert (await parts.look(erasure)).done
        assert [trace.info.trace_id for trace in parts.store.read_traces([gone, kept])] == [kept]
    assert rows("SELECT count(*) FROM outbox") == [(0,)]
    assert rows("SELECT DISTINCT trace_id FROM scores UNION SELECT trace_id FROM dataset_rows") == [(kept,)]
    assert rows("SELECT session_id FROM conversations") == [(two,)]
    assert dict(rows("SELECT trace_id, state FROM runs")) == {gone: "erased", kept: "scored"}


async def test_an_evaluator_that_dies_with_a_forgotten_trace_does_not_keep_it(serve, settings, evaluator, rows) -> None:
    """What a dead evaluator may have written of a forgotten trace is removed once another has taken over its claim."""
    [one] = new_ids(1)
    async with serve(settings) as client:
        [gone] = await say(client, one, "12 + 30")
    async with evaluator() as parts:
        await parts.intake._claims.claim()
        rows("UPDATE outbox SET claimed_by = 4242 RETURNING 1")
        erasure = await parts.forget(one)
        await parts.erasure.erase(erasure.erasure_id)
        assert not (await parts.look(erasure)).done
        await parts.intake.drain()
        await parts.erasure.erase(erasure.erasure_id)
        assert (await parts.look(erasure)).done
        assert parts.store.read_traces([gone]) == []
    assert rows("SELECT state FROM runs") == [("erased",)]


@pytest.mark.parametrize("what", ["judge", "conversation"])
async def test_what_is_judged_while_it_is_forgotten_leaves_no_score(serve, settings, evaluator, rows, what) -> None:
    """A verdict that comes after its trace or conversation was forgotten is thrown away, and no state changes."""
    [one] = new_ids(1)
    async with serve(settings) as client:
        [trace] = await say(client, one, "12 + 30")
    async with evaluator() as parts:
        await parts.intake.drain()
        parts.store.pauses_after = "read"
        if what == "judge":
            rows(ASKED_AGAIN)
        judging = parts.worker.work_off() if what == "judge" else parts.conversations.score(one)
        task = asyncio.create_task(judging)
        await asyncio.to_thread(parts.store.reached.wait)
        erasure = await parts.forget(one)
        await parts.erasure.erase(erasure.erasure_id)
        parts.store.go_on.set()
        await task
        await parts.datasets.merge_waiting()
        assert parts.store.read_traces([trace]) == []
        assert parts.records() == []
    counts = "SELECT (SELECT count(*) FROM scores), (SELECT count(*) FROM dataset_rows), count(*) FROM conversations"
    assert rows(counts) == [(0, 0, 0)]
    assert rows("SELECT state FROM runs") == [("erased",)]


async def test_a_dataset_row_that_another_trace_gave_too_stays_as_that_ones(serve, settings, evaluator) -> None:
    """Of a row with two origins the forgotten one is taken out; the other, and what a person added, stays."""
    one, two = new_ids(2)
    async with serve(settings) as client:
        [gone] = await say(client, one, "12 + 30")
        [kept] = await say(client, two, "12 + 30")
    async with evaluator() as parts:
        await parts.work(one)
        [record] = parts.records()
        assert {f"from.{gone}", f"from.{kept}"} <= set(record.tags)
        added = {"inputs": record.inputs, "expectations": {"expected_response": "42"}, "tags": {"reviewed": "yes"}}
        parts.store.merge_records(parts.dataset, [added])
        erasure = await parts.forget(one)
        await parts.erasure.erase(erasure.erasure_id)
        assert (await parts.look(erasure)).removed["dataset_rows"] == 0
        await parts.datasets.merge_waiting()
        [record] = parts.records()
        await parts.erasure.erase((await parts.forget(two)).erasure_id)
        assert parts.records() == []
    assert gone not in str(record)
    assert record.tags["trace_id"] == record.source.source_data["trace_id"] == kept
    assert record.tags["score.quotes"] == "false"
    assert record.tags["reviewed"] == "yes"
    assert record.expectations == {"expected_response": "42"}
    assert record.outputs["messages"][0]["content"] == "42"


async def test_a_run_that_reaches_the_ledger_after_its_session_was_forgotten_is_only_counted(
    serve, settings, evaluator, rows
) -> None:
    """A trace that was still in the memory of a web process is not kept; a new conversation of that id is."""
    [one] = new_ids(1)
    async with serve(settings.model_copy(update={"trace_flush_s": 2.0})) as client, evaluator() as parts:
        [late] = await say(client, one, "12 + 30")
        await parts.forget(one)
        [new] = await say(client, one, "1 + 1")
    assert dict(rows("SELECT trace_id, state FROM runs")) == {late: "erased", new: "pending"}
    assert rows("SELECT trace_id FROM outbox") == [(new,)]
    assert rows("SELECT session_id FROM runs WHERE state = 'erased'") == [("",)]


async def test_forgetting_a_user_takes_all_their_sessions_and_nobody_elses(serve, settings, evaluator, rows) -> None:
    """Every session in which the user was named goes, also a run that failed or is not in the ledger yet."""
    one, two, three, four, five = new_ids(5)
    async with serve(settings) as client:
        await say(client, one, "12 + 30", user="ann")
        await say(client, two, "12 + 30", user="bob")
        await say(client, two, "and 1 more", user="ann")
        await say(client, three, "1 + 1", user="bob")
        await client.post("/invocations", json={"agent": "math", "input": "1 / 0", "session_id": four, "user": "ann"})
    rows("DELETE FROM sessions WHERE session_id = %s RETURNING 1", four)  # as if its only run had failed
    async with evaluator() as parts:
        async with serve(settings.model_copy(update={"trace_flush_s": 2.0})) as client:
            [late] = await say(client, five, "2 + 2", user="ann")
            rows("DELETE FROM sessions WHERE session_id = %s RETURNING 1", five)
            erasure = await parts.forget(user_id="ann")
        assert (await parts.forget(user_id="ann")).removed["sessions"] == 0
    assert (erasure.removed["sessions"], erasure.removed["turns"]) == (2, 3)
    assert rows("SELECT session_id FROM sessions") == [(three,)]
    assert rows("SELECT session_id, user_id, state FROM runs WHERE state <> 'erased'") == [(three, "bob", "pending")]
    assert rows("SELECT state FROM runs WHERE trace_id = %s", late) == [("erased",)]
    assert rows("SELECT count(*) FROM outbox") == [(1,)]


HANGING_ON_A_SESSION = {
    "sessions": "(session_id, key_id, forked_from, turns) VALUES (%(session)s, %(key)s, %(origin)s, 1)",
    "session_turns": "(session_id, turn, items) VALUES (%(session)s, 1, 'x')",
    "paused_runs": "(trace_id, session_id, turn, agent, snapshot) VALUES (%(trace)s, %(session)s, 1, 'math', 'x')",
    "approvals": "(approval_id, session_id, trace_id, call_id) VALUES (%(trace)s, %(session)s, %(trace)s, 'c')",
    "responses": "(response_id, key_id, session_id, status, body, input) "
    "VALUES (%(trace)s, %(key)s, %(session)s, 'completed', 'x', 'x')",
    "idempotency_keys": "(key_id, idempotency_key, request_hash, owner, process_id, session_id, answer, expires_at) "
    "VALUES (%(key)s, %(trace)s, 'x', 'o', 1, %(session)s, 'x', now() + interval '1 day')",
    "session_waiters": "(session_id, owner, process_id, waiting_until) VALUES (%(session)s, 'o', 0, now())",
    "runs": "(trace_id, session_id, key_id, agent, agent_version, status, offline, state, inclusion_probability, "
    "duration_ms, started_at) "
    "VALUES (%(trace)s, %(session)s, %(key)s, 'math', '1', 'ok', true, 'pending', 1, 1, now())",
    "outbox": "(trace_id, payload) VALUES (%(trace)s, 'x')",
    "otlp_outbox": "(trace_id, payload) VALUES (%(trace)s, 'x')",
    "sampled_sessions": "(session_id, rate, kept) VALUES (%(session)s, 1, true)",
    "conversations": "(session_id, agent, last_turn_at) VALUES (%(session)s, 'math', now())",
}


async def test_forks_go_along_and_another_keys_sessions_do_not(evaluator, rows) -> None:
    """With a session go those forked from it, one by one, with all that hangs on them; the other key's is untouched."""
    async with evaluator() as parts, parts.pool.connection() as connection:
        sessions = [("a", "k1", None), ("b", "k1", "a"), ("c", "k1", "b"), ("d", "k2", None), ("e", "k1", "expired")]
        for session, key, origin in sessions:
            values = {"session": session, "key": key, "origin": origin, "trace": f"tr-{session}"}
            for table, row in HANGING_ON_A_SESSION.items():
                await connection.execute(f"INSERT INTO {table} {row}", values)
        assert await forget(parts.pool, Subject("d", key_id="k1")) is None
        erasure = await parts.forget("a", key_id="k1")
        assert (await parts.forget("expired", key_id="k1")).removed["sessions"] == 1
        assert await last_erasure(connection, Subject("c", key_id="k1")) == erasure
        assert await last_erasure(connection, Subject("c", key_id="k2")) is None
    counts = {kind: erasure.removed[kind] for kind in ("sessions", "turns", "responses", "waiting_traces")}
    assert counts == {"sessions": 3, "turns": 3, "responses": 3, "waiting_traces": 3}
    left = {table: rows(f"SELECT count(*) FROM {table}")[0][0] for table in HANGING_ON_A_SESSION}
    assert left == {table: 5 if table == "runs" else 1 for table in HANGING_ON_A_SESSION}
    assert rows("SELECT session_id FROM erased_sessions ORDER BY 1") == [("a",), ("b",), ("c",), ("e",), ("expired",)]


async def test_mlflow_away_is_waited_for(serve, settings, evaluator, rows) -> None:
    """While MLflow is away the erasure stays open, what is here is gone already, and the next attempt ends it."""
    [one] = new_ids(1)
    async with serve(settings) as client:
        [trace] = await say(client, one, "12 + 30", user="ann")
    async with evaluator() as parts:
        await parts.work(one)
        erasure = await parts.forget(one)
        parts.store.away = True
        with suppress(ConnectionError):
            await parts.erasure.erase(erasure.erasure_id)
        assert not (await parts.look(erasure)).done
        assert rows("SELECT count(*) FROM scores") == [(0,)]
        parts.store.away = False
        await parts.erasure.erase(erasure.erasure_id)
        assert (await parts.look(erasure)).removed["mlflow_traces"] == 1
        assert parts.store.read_traces([trace]) == []


async def test_a_trace_of_another_experiment_is_found(serve, settings, evaluator, mlflow_uri) -> None:
    """A trace that was written before the setting of the experiment changed is removed all the same."""
    [one] = new_ids(1)
    async with serve(settings) as client:
        [trace] = await say(client, one, "12 + 30")
    async with evaluator() as parts:
        await parts.work(one)
        parts.store.experiment_id = parts.store._experiment(f"other-{uuid.uuid4().hex[:8]}")
        erasure = await parts.forget(one)
        await parts.erasure.erase(erasure.erasure_id)
        removed = (await parts.look(erasure)).removed
    assert (removed["mlflow_traces"], removed["dataset_rows"]) == (1, 1)
    assert trace
