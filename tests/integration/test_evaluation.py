"""From the outbox to MLflow: the evaluator's parts on a real Postgres and a real MLflow store, traffic over the app."""

import asyncio
import json
import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import mlflow
import pytest

from gateway.crypto import load_keys
from gateway.errors import ConfigurationError, ModelFailed
from gateway.evaluation.catalog import load_scorers
from gateway.evaluation.claims import PRESENCE_LOCK
from gateway.evaluation.predict import predict_fn
from gateway.evaluation.store import MlflowStore, configure_mlflow
from gateway.settings import Settings
from gateway.testing import HttpError, ScriptedOpenAI

from . import evaluating
from .evaluating import MS, Parts, fill, made


class CrashingStore(MlflowStore):
    """The real store, whose writes succeed and are not heard of while ``away``; it refuses one trace for good."""

    away = False
    refused: str | None = None

    def write_traces(self, traces: list[Any]) -> None:
        """Write, then fail if told so."""
        if self.refused in {trace.info.trace_id for trace in traces}:
            raise ValueError("this trace cannot be stored")
        super().write_traces(traces)
        if self.away:
            raise ConnectionError("the network went away after the write")


@pytest.fixture
def evaluator(make_settings: Callable[..., Settings], mlflow_uri: str) -> Callable[..., Any]:
    """Open the evaluator's parts on the test's database; ``store_type`` may be a failing one."""
    experiment = f"test-{uuid.uuid4().hex[:8]}"

    def opened(store_type: type[MlflowStore] = MlflowStore, **overrides: object) -> AbstractAsyncContextManager[Parts]:
        overrides = {"quiet_period_s": 0.001, "mlflow_experiment": experiment} | overrides
        return evaluating.evaluator(make_settings(**overrides), mlflow_uri, store_type)

    return opened


async def converse(client: Any, *turns: str, agent: str = "support", **fields: object) -> list[dict[str, Any]]:
    """Hold a conversation and return the answers."""
    answers: list[dict[str, Any]] = []
    session = f"s-{uuid.uuid4().hex[:8]}"
    for turn in turns:
        body = {"agent": agent, "input": turn, "session_id": session, **fields}
        answers.append((await client.post("/invocations", json=body)).json())
    return answers


def assessments(trace: Any) -> dict[str, Any]:
    """Return the valid assessments of a trace: value by name."""
    return {each.name: each.feedback.value for each in trace.info.assessments if each.valid is not False}


async def test_a_run_becomes_one_clean_tree_in_mlflow(serve, make_settings, evaluator, rows) -> None:
    """Agent, model calls and tool calls stand in one tree, with session, user, tokens, tools and scores in place."""
    async with serve(make_settings()) as client:
        [answer] = await converse(client, "Where is my parcel for order A-1004? I am ann@example.com", user="u-1")
    async with evaluator() as parts:
        await parts.intake.drain()
        [trace] = parts.store.read_traces([answer["trace_id"]])
    root, *others = trace.data.spans
    assert (root.name, root.span_type, root.parent_id) == ("support", "AGENT", None)
    assert [(span.span_type, span.parent_id == root.span_id) for span in others] == [
        ("CHAT_MODEL", True),
        ("TOOL", True),
        ("CHAT_MODEL", True),
    ]
    model, tool, _ = others
    assert tool.name == "track_shipment"
    assert tool.inputs == {"order_id": "A-1004"}
    assert tool.status.status_code == "ERROR"
    assert "Kestrel Freight" in tool.status.description
    assert {each["function"]["name"] for each in model.attributes["mlflow.chat.tools"]} >= {"track_shipment"}
    assert model.attributes["mlflow.chat.tokenUsage"]["input_tokens"] > 0
    assert [message["role"] for message in model.inputs["messages"]] == ["system", "user"]
    assert "ann@example.com" not in json.dumps(trace.to_dict())
    assert "<EMAIL:" in root.inputs["messages"][0]["content"]
    metadata = trace.info.trace_metadata
    assert metadata["mlflow.trace.session"] == answer["session_id"]
    assert metadata["mlflow.trace.user"] == "u-1"
    assert json.loads(metadata["mlflow.trace.tokenUsage"])["total_tokens"] == answer["usage"]["total_tokens"]
    verdicts = assessments(trace)
    expected = {"no_tool_errors": False, "valid_tool_arguments": True, "no_redundant_calls": True}
    assert verdicts | expected == verdicts
    assert rows("SELECT state, scored_by FROM runs") == [("scored", len(verdicts))]
    assert rows("SELECT count(*) FROM outbox") == [(0,)]


async def test_a_retriever_stands_below_its_tool(serve, make_settings, evaluator) -> None:
    """The policy search is a TOOL span with a RETRIEVER span below it whose outputs are documents."""
    async with serve(make_settings()) as client:
        [answer] = await converse(client, "How long does a refund take?")
    async with evaluator() as parts:
        await parts.intake.drain()
        [trace] = parts.store.read_traces([answer["trace_id"]])
    [retriever] = trace.search_spans(span_type="RETRIEVER")
    [tool] = trace.search_spans(span_type="TOOL")
    assert retriever.parent_id == tool.span_id
    assert all({"page_content", "metadata"} <= set(document) for document in retriever.outputs)


@pytest.mark.parametrize("crashes", [1, 3])
async def test_a_crash_after_the_write_loses_and_doubles_nothing(
    serve, make_settings, evaluator, rows, crashes
) -> None:
    """A batch that MLflow has, but that we did not hear of, is done again and changes nothing there."""
    async with serve(make_settings()) as client:
        answers = await converse(client, "What is the status of order A-1001?", "And of A-1002?")
    trace_ids = [answer["trace_id"] for answer in answers]
    async with evaluator(CrashingStore) as parts:
        parts.store.away = True
        for _ in range(crashes):
            await parts.intake.drain()
            assert rows("SELECT claimed_by, attempts, refusals FROM outbox") == [(None, 0, 0)] * 2
        parts.store.away = False
        await parts.intake.drain()
        traces = parts.store.read_traces(trace_ids)
    assert [trace.info.trace_id for trace in traces] == trace_ids
    for trace in traces:
        names = [each.name for each in trace.info.assessments]
        assert sorted(names) == sorted(set(names))
        assert len(trace.data.spans) == 4
    assert rows("SELECT state FROM runs") == [("scored",), ("scored",)]


async def test_a_trace_that_mlflow_refuses_holds_up_no_other(serve, make_settings, evaluator, rows) -> None:
    """Of a batch with one trace that cannot be stored the others get through; that one is given up in the end."""
    async with serve(make_settings()) as client:
        good = await converse(client, "12 + 30", "add 1 to that", agent="math")
        [bad] = await converse(client, "13 + 30", agent="math")
    async with evaluator(CrashingStore) as parts:
        parts.store.refused = bad["trace_id"]
        await parts.intake.drain()
        assert rows("SELECT trace_id, refusals FROM outbox WHERE retry_at > now()") == [(bad["trace_id"], 1)]
        async with serve(make_settings()) as client:
            await converse(client, "14 + 30", agent="math")
        rows("UPDATE outbox SET retry_at = now(), refusals = 4 WHERE refusals = 1 RETURNING 1")
        await parts.intake.drain()
        assert len(parts.store.read_traces([answer["trace_id"] for answer in good])) == 2
    assert rows("SELECT count(*) FROM outbox") == [(0,)]
    assert rows("SELECT reason FROM runs WHERE state <> 'scored'") == [("refused by MLflow",)]


async def test_the_claims_of_a_dead_evaluator_are_free_at_once(serve, make_settings, evaluator, rows) -> None:
    """What an evaluator had claimed is taken by another as soon as its advisory lock is gone, and not before."""
    async with serve(make_settings()) as client:
        await converse(client, "12 + 30", agent="math")
    async with evaluator() as parts:
        pool = parts.intake._pool
        async with pool.connection() as living:
            await living.execute("SELECT pg_advisory_lock(%s, 4242)", [PRESENCE_LOCK])
            rows("UPDATE outbox SET claimed_by = 4242 RETURNING 1")
            await parts.intake.drain()
            assert rows("SELECT claimed_by FROM outbox") == [(4242,)]
            await living.execute("SELECT pg_advisory_unlock(%s, 4242)", [PRESENCE_LOCK])
        await parts.intake.drain()
    assert rows("SELECT count(*) FROM outbox") == [(0,)]


async def test_a_conversation_is_scored_on_its_first_trace(serve, make_settings, evaluator, rows) -> None:
    """After the quiet period the conversation's scores stand on its first trace, with the session in the metadata."""
    question = "Where is my parcel for order A-1004?"
    async with serve(make_settings()) as client:
        answers = await converse(client, question, question)
    async with evaluator() as parts:
        await parts.intake.drain()
        await parts.conversations.score(answers[0]["session_id"])
        first, second = parts.store.read_traces([answer["trace_id"] for answer in answers])
    assert assessments(first)["no_repeated_question"] is False
    assert assessments(first)["errors_resolved"] is False
    assert "errors_resolved" not in assessments(second)
    [on_session] = [each for each in first.info.assessments if each.name == "errors_resolved"]
    assert on_session.metadata["mlflow.trace.session"] == answers[0]["session_id"]
    assert rows("SELECT due_at, attempts FROM conversations") == [(None, 0)]


async def test_a_conversation_that_goes_on_is_scored_again(serve, make_settings, evaluator, rows) -> None:
    """The later score takes the place of the earlier one, which stays as history, here and in MLflow."""
    async with serve(make_settings()) as client:
        [first] = await converse(client, "What is 10 divided by 0?", agent="math")
        session = first["session_id"]
    async with evaluator() as parts:
        await parts.intake.drain()
        await parts.conversations.score(session)
    async with serve(make_settings()) as client:
        body = {"agent": "math", "input": "Sorry, I meant 10 divided by 4.", "session_id": session}
        await client.post("/invocations", json=body)
    async with evaluator() as parts:
        await parts.intake.drain()
        await parts.conversations.score(session)
        await parts.conversations.score(session)  # nothing is due: nothing happens
        [trace] = parts.store.read_traces([first["trace_id"]])
    scores = rows("SELECT value, latest, turns FROM scores WHERE scorer = 'errors_resolved' ORDER BY turns")
    assert scores == [(True, False, 1), (True, True, 2)]
    history = [(each.feedback.value, each.valid) for each in trace.info.assessments if each.name == "errors_resolved"]
    assert sorted(history, key=str) == [(True, False), (True, True)]


class InterruptedStore(MlflowStore):
    """The real store; something happens before it reads."""

    before: Callable[[], object] | None = None

    def read_traces(self, trace_ids: list[str]) -> list[Any]:
        """Let it happen, once, then read."""
        if self.before is not None:
            self.before, before = None, self.before
            before()
        return super().read_traces(trace_ids)


async def test_a_turn_that_arrives_while_its_conversation_is_scored_is_scored_too(
    make_settings, evaluator, rows
) -> None:
    """The conversation stays due, also where that turn ended before the last one that is known."""
    last = made("s")
    early = made("s", started_ns=last.started_ns - MS, ended_ns=last.ended_ns - MS)
    fill(make_settings(), last)
    async with evaluator(InterruptedStore) as parts:
        await parts.intake.drain()
        loop = asyncio.get_running_loop()

        def arrive() -> None:
            fill(make_settings(), early)
            asyncio.run_coroutine_threadsafe(parts.intake.drain(), loop).result(20)

        parts.store.before = arrive
        await parts.conversations.score("s")
        assert rows("SELECT count(*) FROM outbox") == [(0,)]
        assert rows("SELECT due_at <= now() FROM conversations") == [(True,)]
        await parts.conversations.score("s")
    assert rows("SELECT due_at FROM conversations") == [(None,)]


async def test_failed_traces_go_into_the_dataset_once_each(serve, make_settings, evaluator) -> None:
    """A trace that several scorers fail is one redacted row, which says where it came from and can be asked again."""
    async with serve(make_settings()) as client:
        await converse(client, "What is the status of order A-1001?")
        [bad] = await converse(client, "Do you offer gift wrapping? Write to ann@example.com.")
    dataset = f"regressions-{uuid.uuid4().hex[:6]}"
    rules = {name: {"dataset": dataset} for name in ("no_redundant_calls", "answer_uses_tool_result")}
    async with evaluator(scorers=rules) as parts:
        await parts.intake.drain()
        await parts.datasets.merge_waiting()
        await parts.datasets.merge_waiting()
    [found] = mlflow.genai.datasets.search_datasets(filter_string=f"name = '{dataset}'")
    [record] = found.to_df().to_dict("records")
    assert record["tags"]["trace_id"] == bad["trace_id"]
    assert record["tags"]["scorers"] == "answer_uses_tool_result, no_redundant_calls"
    assert record["tags"]["score.no_redundant_calls"] == "false"
    assert record["source"].source_data["trace_id"] == bad["trace_id"]
    content = record["inputs"]["messages"][0]["content"]
    assert content.startswith("Do you offer gift wrapping? Write to <EMAIL:")
    again = predict_fn("support", settings=make_settings())(**record["inputs"])
    assert again == record["outputs"]


JUDGE_YES = json.dumps({"result": "yes", "rationale": "It is right."})


async def test_text_that_postgres_has_no_form_for_is_kept(serve, make_settings, evaluator) -> None:
    """A NUL character in what a user wrote is replaced in the trace, and the trace is stored."""
    async with serve(make_settings()) as client:
        [answer] = await converse(client, "12 + 30\0", agent="math")
    async with evaluator() as parts:
        await parts.intake.drain()
        [trace] = parts.store.read_traces([answer["trace_id"]])
    assert trace.info.request_preview == "12 + 30\ufffd"


async def test_judges_see_this_very_turn(serve, make_settings, evaluator, rows, monkeypatch) -> None:
    """With a judge model, MLflow's judges ask it about this turn's tools and text, and their verdicts are logged."""
    async with serve(make_settings()) as client:
        [answer] = await converse(client, "What is the status of order A-1001?")
    for name in ("OPENAI_API_KEY", "OPENAI_API_BASE", "MLFLOW_GENAI_JUDGE_DEFAULT_MODEL"):
        monkeypatch.setenv(name, "")  # restored afterwards: the evaluator sets them for its process
    with ScriptedOpenAI(lambda _body: JUDGE_YES) as judge:
        settings = {"judge_model": "openai:/judge-1", "judge_base_url": judge.url, "judge_api_key": "sk-judge"}
        async with evaluator(**settings) as parts:
            await parts.intake.drain()
            assert rows("SELECT state FROM runs") == [("pending",)]
            rows("UPDATE runs SET state = 'erased' RETURNING 1")
            await parts.worker.work_off()
            assert judge.requests == []  # forgotten, while it waited: no model is to see it
            rows("UPDATE runs SET state = 'pending' RETURNING 1")
            rows("UPDATE scorings SET state = 'pending' RETURNING 1")
            await parts.worker.work_off()
            await parts.conversations.score(answer["session_id"])
            await parts.worker.work_off()
            [trace] = parts.store.read_traces([answer["trace_id"]])
    verdicts = assessments(trace)
    for name in ("tool_call_correctness", "tool_call_efficiency", "conversation_completeness", "knowledge_retention"):
        assert verdicts[name] == "yes"
    assert rows("SELECT state FROM runs") == [("scored",)]
    prompts = [json.dumps(request["messages"]) for request in judge.requests]
    about_tools = [prompt for prompt in prompts if "lookup_order" in prompt]
    assert all("What is the status of order A-1001?" in prompt for prompt in prompts)
    assert len(about_tools) == 2
    assert rows("SELECT DISTINCT source_type FROM scores WHERE scorer = 'tool_call_correctness'") == [("LLM_JUDGE",)]


async def test_a_trace_that_cannot_be_read_is_failed_and_holds_nothing_up(
    serve, make_settings, evaluator, rows, database_url
) -> None:
    """A payload that is no trace ends as failed, with the reason; the traces behind it are taken in."""
    settings = make_settings()
    async with serve(settings) as client:
        [broken] = await converse(client, "12 + 30", agent="math")
        [damaged] = await converse(client, "13 + 30", agent="math")
        await converse(client, "14 + 30", agent="math")
    rubbish = load_keys(settings).outbox.encrypt(b"rubbish", broken["trace_id"])
    change = "UPDATE outbox SET payload = %s WHERE trace_id = %s RETURNING 1"
    rows(change, rubbish, broken["trace_id"])
    rows(change, rubbish[:-1] + b"x", damaged["trace_id"])
    async with evaluator() as parts:
        await parts.intake.drain()
    assert set(rows("SELECT state, reason FROM runs")) == {
        ("failed", "unreadable: ValidationError"),
        ("failed", "unreadable: DamagedData"),
        ("scored", None),
    }


async def test_an_evaluator_with_another_key_leaves_the_traces_alone(serve, make_settings, evaluator, rows) -> None:
    """Traces that were encrypted with another key wait for an evaluator that has it."""
    async with serve(make_settings()) as client:
        await converse(client, "12 + 30", agent="math")
    async with evaluator(secret_key="a key that is not the one") as parts:
        for _ in range(6):
            await parts.intake.drain()
            rows("UPDATE outbox SET retry_at = now() RETURNING 1")
    assert rows("SELECT state FROM runs") == [("pending",)]
    assert rows("SELECT claimed_by, attempts, refusals FROM outbox") == [(None, 6, 0)]


async def test_runs_left_between_outbox_and_judges_are_taken_up(serve, make_settings, evaluator, rows) -> None:
    """A run whose judges were never enqueued, as a crash can leave it, is finished by the sweeper."""
    async with serve(make_settings()) as client:
        await converse(client, "12 + 30", agent="math")
    async with evaluator() as parts:
        await parts.intake.drain()
        rows("UPDATE runs SET state = 'pending', updated_at = now() - interval '1 minute' RETURNING 1")
        await parts.intake.resume_pending()
    assert rows("SELECT state FROM runs") == [("scored",)]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_golden_set_passes_offline(make_settings, mlflow_uri, monkeypatch, asynchronous, request) -> None:
    """`mlflow.genai.evaluate` runs the golden set through the agent, sync or async, with the live scorers unchanged."""
    settings = make_settings()
    configure_mlflow(settings, mlflow_uri)
    mlflow.set_tracking_uri(mlflow_uri)
    mlflow.set_experiment(f"golden-{uuid.uuid4().hex[:6]}")
    lines = (settings.agents_dir / "math" / "golden.jsonl").read_text().splitlines()
    live = {each.name: each.scorer for each in load_scorers(make_settings(scorers={"exact_match": {"enabled": True}}))}
    scorers = [live[name] for name in ("exact_match", "no_tool_errors", "valid_tool_arguments")]
    result = mlflow.genai.evaluate(
        data=[json.loads(line) for line in lines],
        predict_fn=predict_fn("math", asynchronous=asynchronous, settings=settings),
        scorers=scorers,
    )
    assert len(lines) >= 12
    assert {"36", "100"} <= {json.loads(line)["expectations"]["expected_response"] for line in lines}
    assert result.metrics["exact_match/mean"] == 1.0
    assert result.metrics["no_tool_errors/mean"] == 1.0
    assert result.metrics["valid_tool_arguments/mean"] == 1.0


def test_a_run_that_fails_offline_leaves_no_personal_text(make_settings, mlflow_uri, tmp_path) -> None:
    """When the model refuses a row with what the user wrote, neither the trace nor the error has it."""
    (tmp_path / "agents" / "plain").mkdir(parents=True)
    (tmp_path / "agents" / "plain" / "agent.py").write_text("from agents import Agent\nagent = Agent(name='plain')\n")
    configure_mlflow(make_settings(), mlflow_uri)
    mlflow.set_tracking_uri(mlflow_uri)
    mlflow.set_experiment(f"failing-{uuid.uuid4().hex[:6]}")
    with ScriptedOpenAI(lambda _body: HttpError(400, "bob@example.com is not welcome")) as model:
        overrides = {"OPENAI_API_KEY": "sk-test", "OPENAI_BASE_URL": model.url, "model": "scripted-1"}
        predict = predict_fn("plain", settings=make_settings(agents_dir=tmp_path / "agents", **overrides))
        with pytest.raises(ModelFailed) as raised:
            predict([{"role": "user", "content": "I am bob@example.com"}])
    mlflow.flush_trace_async_logging()
    [trace] = mlflow.search_traces(return_type="list")
    assert "bob@example.com" not in trace.to_json() + str(raised.value)
    assert raised.value.__cause__ is None
    assert trace.info.state == "ERROR"
    assert "<EMAIL:" in trace.to_json()


def test_a_rule_for_no_scorer_is_refused(make_settings) -> None:
    """A rule that names no scorer fails the start, and says which scorers there are."""
    with pytest.raises(ConfigurationError, match=r"no_such_scorer.*no_tool_errors"):
        load_scorers(make_settings(scorers={"no_such_scorer": {}}))
