"""`gateway evaluate` and `gateway gate` on a real MLflow, with a scripted model behind the agent and the judge."""

import json
import logging
import os
import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import mlflow
import psycopg
import pytest
import structlog
from anyio.from_thread import start_blocking_portal
from cyclopts import App
from mlflow import MlflowClient
from mlflow.entities import Trace
from mlflow.genai import datasets, make_judge

from gateway.commands.offline import register
from gateway.crypto import load_keys
from gateway.errors import AgentNotFound, ConfigurationError
from gateway.evaluation.export import to_mlflow
from gateway.evaluation.judging.budget import Budget
from gateway.evaluation.judging.limits import JudgeLimits, ModelLimits
from gateway.evaluation.judging.prices import Price, Prices
from gateway.evaluation.judging.relay import Relay, RelayParts
from gateway.evaluation.judging.spending import BudgetKeeper, SpendingBook
from gateway.evaluation.offline.deciding import REASON_TAG, prepare_gate
from gateway.evaluation.offline.evaluate import Evaluation, Options, Result, prepare
from gateway.evaluation.offline.gate import Decision, Wanted
from gateway.evaluation.offline.judged import Judges, judged
from gateway.evaluation.offline.kept import read_cases
from gateway.evaluation.offline.mlflows import open_experiment
from gateway.evaluation.offline.selection import where_it_applies
from gateway.evaluation.scoring import LiveScorer
from gateway.evaluation.store import MlflowStore
from gateway.rules import JudgeModelRule, ScorerRule
from gateway.settings import Settings
from gateway.storage.database import open_pool
from gateway.testing import Answer, HttpError, ScriptedOpenAI, Slow, ToolCall
from gateway.tracing.redaction.redactor import Redactor

from .runs import say, traces

ROOT = Path(__file__).parent.parent.parent
JUDGING = ("judge_calls", "judge_input_tokens", "judge_output_tokens", "judge_cost_usd")
PLAIN = "from agents import Agent\nagent = Agent(name='plain', instructions='Answer.')\n"
EMAIL = re.compile(r"\S+@\S+|<EMAIL:\w+>")


class Provider:
    """Plays the model of the agent, and the judge: it grades 5 if the response is the expected one, else 1."""

    def __init__(self) -> None:
        self.wrong: set[str] = set()
        self.judge_fails: HttpError | None = None
        self.asked: list[str] = []
        self.judged: list[str] = []

    def __call__(self, body: dict[str, Any]) -> Answer | Slow | HttpError:
        text = json.dumps(body.get("input") or body.get("messages"))
        if body["model"] == "judge-1":
            self.judged.append(text)
            if self.judge_fails is not None:
                return self.judge_fails
            prompt = body["messages"][-1]["content"]
            said = re.search(r'"content": "([^"]*)"\s*}\s*]\s*}\s*expectations', prompt)
            expected = re.search(r'"expected_response": "([^"]*)"', prompt)
            assert said is not None
            assert expected is not None
            assert "rubric" in prompt
            return json.dumps({"result": "5" if said[1] == expected[1] else "1", "rationale": f"It says {said[1]}."})
        self.asked.append(text)
        question = str(body["input"][-1].get("content", ""))
        if "hang" in question:
            return Slow("late")
        return "I do not know." if question in self.wrong else f"Answer to: {question}"


@pytest.fixture
def provider() -> Provider:
    """The model and the judge."""
    return Provider()


@pytest.fixture
def plain(make_settings: Callable[..., Settings], provider: Provider, tmp_path: Path) -> Iterator[Settings]:
    """Settings with one agent, whose model and judge are scripted."""
    folder = tmp_path / "agents" / "plain"
    folder.mkdir(parents=True)
    (folder / "agent.py").write_text(PLAIN)
    with ScriptedOpenAI(provider) as server:
        yield make_settings(
            agents_dir=tmp_path / "agents", model="scripted-1", OPENAI_API_KEY="sk-test", OPENAI_BASE_URL=server.url,
            judge_model="openai:/judge-1", judge_base_url=server.url, judge_api_key="sk-test",
            judge_models={"openai:/judge-1": {"input_usd": 1, "output_usd": 2}},
        )  # fmt: skip


@pytest.fixture
def book(database_url: str) -> Callable[[], list[Any]]:
    """Read what all judges spent, by the database."""

    def read() -> list[Any]:
        with psycopg.connect(database_url) as connection:
            return connection.execute(
                "SELECT model, sum(calls)::int, sum(input_tokens)::int, sum(output_tokens)::int FROM judge_spending "
                "GROUP BY model"
            ).fetchall()

    return read


@pytest.fixture
def opened(mlflow_uri: str) -> Callable[[Settings], str]:
    """Open an experiment of the test's own, and return its id."""
    return lambda settings: open_experiment(settings, mlflow_uri, f"offline-{uuid.uuid4().hex[:6]}")


def rows(folder: Path, *questions: str, name: str = "rows.jsonl") -> str:
    """Write a file of questions with the answers that are right."""
    lines = [json.dumps({"question": each, "expected_response": f"Answer to: {each}"}) for each in questions]
    (folder / name).write_text("\n".join(lines))
    return str(folder / name)


def run_gate(
    evaluation: Evaluation, experiment_id: str, report: Path, *metrics: str, **more: Any
) -> tuple[Result, Decision]:
    """Run a gate with the default thresholds."""
    checked = prepare_gate(evaluation, experiment_id, Wanted(), metrics, more.get("baseline"))
    return checked.run(report, lambda each, params: each.run(params, judges=more.get("judges")))


def judged_by(
    settings: Settings, evaluation: Evaluation, database: str | None, **more: Any
) -> AbstractContextManager[Any]:
    """Send the judges of an evaluation to a relay, as the commands do."""
    return judged(settings, database, evaluation.selection.all, runs_agents=True, **more)


def test_a_gate_from_end_to_end(plain, opened, provider, database_url, book, tmp_path) -> None:
    """A good version passes and a worse one fails, also against the first; all is logged as the contract names it."""
    experiment_id = opened(plain)
    questions = [f"Question {number}?" for number in range(1, 6)] + ["I am ann@example.com. Who am I?"]
    options = Options("plain", rows(tmp_path, *questions), ["exact_match", "quality"])
    metric = "exact_match/mean>=0.5"
    report = tmp_path / "report"
    result, decision = run_gate(prepare(plain, options), experiment_id, report, metric, baseline="last")
    assert decision.passed, decision.reason
    assert any("no baseline yet" in note for note in decision.notes)
    assert (result.metrics["average_score"], result.score_from) == (5.0, ["quality"])

    provider.wrong = set(questions[:4])
    evaluation = prepare(plain, options)
    before = os.environ["OPENAI_API_BASE"]
    with judged_by(plain, evaluation, database_url) as judges:
        assert os.environ["OPENAI_API_BASE"] == before  # the agent's own clients are no judges
        more = {"baseline": "last", "judges": judges}
        worse, refused = run_gate(evaluation, experiment_id, report, metric, "judge_calls<=6", **more)
    assert not refused.passed
    assert [check.passed for check in refused.checks] == [False, False, False, True, False, False]
    client = MlflowClient()
    run = client.get_run(worse.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params.keys() >= {
        "assistant_model", "judge_model", "temperature", "max_tokens", "dataset_version", "pass_rate_threshold",
        "score_threshold",
    }  # fmt: skip
    assert run.data.params["baseline"] == result.run_id
    assert (run.data.params["assistant_model"], run.data.params["judge_model"]) == ("scripted-1", "openai:/judge-1")
    counts = [run.data.metrics[f"{name}_cases"] for name in ("total", "passed", "failed", "error")]
    assert (counts, run.data.metrics["overall_passed"]) == ([6, 2, 4, 0], 0)
    assert run.data.metrics["average_score"] == pytest.approx((4 * 1 + 2 * 5) / 6)
    assert {name: run.data.metrics[name] for name in JUDGING} == dict(zip(JUDGING, (6, 60, 30, 0.00012), strict=True))
    assert book() == [("openai:/judge-1", 6, 60, 30)]
    [said] = [each for each in mlflow.get_trace(worse.cases[0].trace_id).info.assessments if each.name == "quality"]
    assert said.metadata["gateway.judge_calls"] == "1"
    assert run.data.tags[REASON_TAG] == refused.reason
    assert [each.dataset.name for each in run.inputs.dataset_inputs] == ["rows.jsonl"]
    assert {each.path for each in client.list_artifacts(worse.run_id, "report")} == {
        "report/junit.xml",
        "report/summary.md",
    }
    assert len(client.list_artifacts(worse.run_id, "results")) == 6
    assert read_cases(worse.run_id) == worse.cases
    summary = (report / "summary.md").read_text()
    assert "✗ OVERALL: FAIL" in summary
    assert "judges: 6 calls, 60 tokens in, 30 tokens out, 0.000120 USD" in summary

    # What is personal reaches the agent's model, as it must, and nobody else.
    assert any("ann@example.com" in text for text in provider.asked)
    assert not any("ann@example.com" in text for text in provider.judged)
    found = mlflow.search_traces(locations=[experiment_id], return_type="list")
    assert len(found) == 12
    assert not any("ann@example.com" in trace.to_json() for trace in found)
    assert "ann@example.com" not in json.dumps([case.inputs for case in read_cases(worse.run_id)])


@pytest.mark.parametrize(("status", "questions", "most_calls"), [(500, 6, 10), (429, 1, 4)])
def test_a_judge_whose_model_is_down(plain, opened, provider, database_url, tmp_path, status, questions, most_calls):
    """Cases whose judge gets no answer are in error and say why, soon: the relay tries again, and MLflow does not."""
    opened(plain)
    path = rows(tmp_path, *map(str, range(questions)))
    evaluation = prepare(plain, Options("plain", path, ["exact_match", "quality"]))
    provider.judge_fails = HttpError(status)
    with judged_by(plain, evaluation, database_url if status == 500 else None, patience_s=0) as judges:
        result = evaluation.run(judges=judges)
    assert result.metrics["error_cases"] == questions
    said = [verdict.error for case in result.cases for verdict in case.verdicts if verdict.name == "quality"]
    why = f"openai:/judge-1 answered {status}: scripted error"
    assert all(each == why or (status == 500 and "failed again and again" in str(each)) for each in said)
    assert 4 <= len(provider.judged) <= most_calls  # by itself, MLflow makes eleven a case


def test_a_model_that_is_back_soon() -> None:
    """A judge whose model is left alone for a moment is asked again when that is over."""
    replies = iter([HttpError(500), HttpError(500), json.dumps({"result": "yes", "rationale": "As it should be."})])
    polite = make_judge(name="polite", instructions="Is {{ outputs }} polite?", model="openai:/judge-1")
    with ScriptedOpenAI(lambda _: next(replies)) as server, start_blocking_portal() as portal:
        limits = JudgeLimits(
            server.url, breaker_failures=2, breaker_open_s=0.6, backoff_s=0.01, default=ModelLimits(None)
        )
        nowhere = open_pool("", max_size=1, name="nowhere")
        book = SpendingBook(nowhere)
        prices = Prices({"openai:/judge-1": Price(1.0, 2.0)})
        parts = RelayParts(limits, prices, nowhere, "", book, BudgetKeeper(Budget(), book).may_call)
        with portal.wrap_async_context_manager(Relay(parts)) as relay, relay.routing_judges():
            judges = Judges(portal, relay, patience_s=60)
            said = where_it_applies(LiveScorer(polite, "v1", ScorerRule(), "openai:/judge-1"), judges).run(
                outputs="Hi!"
            )
            assert (said.value, said.metadata["gateway.judge_calls"]) == ("yes", "3")


def test_a_budget_that_is_used_up(plain, opened, database_url, book, tmp_path) -> None:
    """What the budget does not pay for is in error and fails the gate; the next begins in plain code only."""
    limits = {"openai:/judge-1": JudgeModelRule(concurrency=1, input_usd=1, output_usd=2)}
    settings = plain.model_copy(update={"judge_tokens_per_hour": 15, "judge_models": limits})
    experiment_id = opened(settings)
    evaluation = prepare(settings, Options("plain", rows(tmp_path, "a", "b"), ["quality"]))
    with judged_by(settings, evaluation, database_url) as judges:
        result, decision = run_gate(evaluation, experiment_id, tmp_path / "report", judges=judges)
    assert sorted(case.state for case in result.cases) == ["error", "passed"]
    assert ["quality gave no verdict: The budget of the judges is used up."] in [case.reasons for case in result.cases]
    assert not decision.passed
    assert book() == [("openai:/judge-1", 1, 10, 5)]
    with (
        pytest.raises(ConfigurationError, match="budget of the judges is used up"),
        judged_by(settings, evaluation, database_url),
    ):
        pass
    plain_code = prepare(settings, Options("plain", rows(tmp_path, "a"), ["exact_match"]))
    with judged_by(settings, plain_code, database_url) as judges:
        assert judges.metrics()["judge_calls"] == 0


def test_a_case_that_takes_too_long(plain, opened, tmp_path) -> None:
    """A case beyond the timeout is in error, with its trace and its reason; the run goes on to its end."""
    opened(plain)
    evaluation = prepare(plain, Options("plain", rows(tmp_path, "hang"), ["exact_match"], workers=1, timeout_s=1))
    answered: list[int] = []
    result = evaluation.run(on_answer=lambda: answered.append(1))
    [case] = result.cases
    assert (case.state, case.outputs, len(answered)) == ("error", None, 1)
    assert case.reasons[0].startswith("RUN_TIMEOUT")
    assert case.trace_id is not None
    assert result.params["timeout_s"] == "1"
    assert os.environ["MLFLOW_GENAI_EVAL_MAX_WORKERS"] == "1"


def test_what_is_wrong_is_said_before_anything_is_logged(plain, opened, tmp_path, monkeypatch) -> None:
    """Unknown agents, datasets, scorers and metrics, and a judge without its key, leave no run behind."""
    experiment_id = opened(plain)
    path = rows(tmp_path, "a")
    with pytest.raises(AgentNotFound, match="plain"):
        prepare(plain, Options("nobody", path))
    with pytest.raises(ConfigurationError, match="There is no dataset nothing"):
        prepare(plain, Options("plain", "nothing"))
    with pytest.raises(ConfigurationError, match="exact_mach"):
        prepare(plain, Options("plain", path, ["exact_mach"]))
    evaluation = prepare(plain, Options("plain", path, ["exact_match"]))
    with pytest.raises(ConfigurationError, match="there is no metric"):
        prepare_gate(evaluation, experiment_id, Wanted(), ["quality/mean>=4"], None)
    with pytest.raises(ConfigurationError, match="--baseline 0123"):
        prepare_gate(evaluation, experiment_id, Wanted(), [], "0123")
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigurationError, match="OPENAI_API_KEY"):
        prepare(plain, Options("plain", path, ["quality"]))
    assert any("OPENAI_API_KEY" in note for note in prepare(plain, Options("plain", path)).notes)
    assert MlflowClient().search_runs([experiment_id]) == []


def test_an_mlflow_that_will_not_do(plain, mlflow_uri) -> None:
    """A folder of files, a database that is not there, and a deleted experiment are refused with what to do."""
    with pytest.raises(ConfigurationError, match="keeps no datasets there"):
        open_experiment(plain, "file:./mlruns", "x")
    with pytest.raises(ConfigurationError, match="does not answer") as refused:
        open_experiment(plain, "postgresql+psycopg://me:secret@127.0.0.1:1/mlflow", "x")
    assert "me:***@" in str(refused.value)
    name = f"offline-{uuid.uuid4().hex[:6]}"
    experiment_id = open_experiment(plain, mlflow_uri, name)
    MlflowClient().delete_experiment(experiment_id)
    with pytest.raises(ConfigurationError, match="was deleted"):
        open_experiment(plain, mlflow_uri, name)


OF_THE_STORE = {
    "mlflow.traceRequestId", "mlflow.spanInputs", "mlflow.spanOutputs", "mlflow.spanStartTimeNs", "mlflow.spanLogLevel",
}  # fmt: skip


def shape(trace: Trace) -> list[dict[str, Any]]:
    """Return all that is in a trace's spans but ids, times and what the store adds; calls are numbered."""
    places = {span.span_id: number for number, span in enumerate(trace.data.spans)}
    spans = [
        {
            "name": span.name,
            "type": span.span_type,
            "below": places.get(span.parent_id),
            "inputs": span.inputs,
            "outputs": span.outputs,
            "status": [str(span.status.status_code), span.status.description or ""],
            "events": [[event.name, dict(event.attributes)] for event in span.events],
            "attributes": {key: value for key, value in span.attributes.items() if key not in OF_THE_STORE},
        }
        for span in trace.data.spans
    ]
    text = json.dumps(spans, sort_keys=True)
    for number, call_id in enumerate(dict.fromkeys(re.findall(r"call_[0-9a-f]{32}", text))):
        text = text.replace(call_id, f"call-{number}")
    return list(json.loads(text))


async def test_the_span_tree_is_that_of_live_runs(serve, make_settings, opened, tmp_path) -> None:
    """Span by span, an offline run has the tree of the same live one: a failing tool, a retriever, a second turn."""
    settings = make_settings(default_agent="support")
    async with serve(settings) as client:
        for turn in ("Where is my parcel for order A-1004?", "What is your return policy for final sale items?"):
            await say(client, turn, "s-1")
    live = [to_mlflow(trace, "0", {}) for trace in traces(settings).values()]
    seen = [next(span for span in trace.data.spans if span.span_type == "CHAT_MODEL") for trace in live]
    asked = [[each for each in span.inputs["messages"] if each["role"] != "system"] for span in seen]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"inputs": {"messages": each}}) for each in asked))
    opened(settings)
    result = prepare(settings, Options("support", str(tmp_path / "rows.jsonl"), ["no_tool_errors"])).run()
    offline = [mlflow.get_trace(str(case.trace_id)) for case in result.cases]
    assert [case.state for case in result.cases] == ["failed", "passed"]
    kinds = {span.span_type for trace in live for span in trace.data.spans}
    assert kinds >= {"AGENT", "CHAT_MODEL", "TOOL", "RETRIEVER"}
    for ours, theirs in zip(offline, live, strict=True):
        for one, other in zip(shape(ours), shape(theirs), strict=True):
            assert one == other
        kept = ("gateway.agent", "gateway.agent_version", "gateway.offline", "mlflow.trace.tokenUsage")
        assert [ours.info.trace_metadata[key] for key in kept] == [theirs.info.trace_metadata[key] for key in kept]
        assert ours.info.tags["agent"] == "support"


def test_a_conversation_is_scored_with_its_new_answer(make_settings, opened, tmp_path) -> None:
    """The scorers of conversations see the history of a row and the new answer; their score is on the run's trace."""
    settings = make_settings()
    opened(settings)
    said = [("user", "What is 12 plus 30?"), ("assistant", "42"), ("user", "What is 12 plus 30?")]
    messages = [{"role": role, "content": content} for role, content in said]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"inputs": {"messages": messages}}))
    options = Options("math", str(tmp_path / "rows.jsonl"), ["no_repeated_question", "no_tool_errors"])
    [case] = prepare(settings, options).run().cases
    assert {each.name: each.value for each in case.verdicts} == {"no_repeated_question": False, "no_tool_errors": True}
    trace = mlflow.get_trace(str(case.trace_id))
    [repeated] = [each for each in trace.info.assessments if each.name == "no_repeated_question"]
    assert repeated.metadata["mlflow.trace.session"] == trace.info.trace_metadata["mlflow.trace.session"]
    assert repeated.metadata["mlflow.assessment.sourceRunId"]


def shopkeeper(body: dict[str, Any]) -> Answer:
    """Look up the orders by whatever stands where the address was, then say what was found."""
    last = body["input"][-1]
    if last.get("type") == "function_call_output":
        return f"I found: {last['output']}"
    text = str(last["content"])
    tool = "track_shipment" if "track" in text else "list_orders"
    found = EMAIL.search(text)
    return [
        ToolCall(tool, {"order_id": "A-1009"} if tool == "track_shipment" else {"email": found[0] if found else ""})
    ]


@contextmanager
def shop(make_settings: Callable[..., Settings]) -> Iterator[Settings]:
    """Serve the support agent with a model that uses its tools."""
    with ScriptedOpenAI(shopkeeper) as server:
        yield make_settings(
            default_agent="support", model="scripted-1", OPENAI_API_KEY="sk-test", OPENAI_BASE_URL=server.url
        )


async def test_rows_that_cannot_be_asked_again(serve, make_settings, opened, mlflow_uri, tmp_path) -> None:
    """With an address redacted, recorded results or the recorded answer stand in, and each case says which.

    The tool finds nothing under a placeholder; its recording does. A call that was not recorded is in error.
    """
    with shop(make_settings) as settings:
        async with serve(settings) as client:
            await say(client, "List my orders, I am leila.marchetti@example.com", "s-1")
        [live] = traces(settings).values()
        experiment_id = opened(settings)
        store = MlflowStore(mlflow_uri, mlflow.get_experiment(experiment_id).name)
        redactor = Redactor(load_keys(settings).derive("redaction"))
        store.write_traces([to_mlflow(redactor.trace(live), experiment_id, {})])
        root = live.spans[0]
        question = root.inputs["messages"][0]["content"]
        assert "<EMAIL:" in question

        def record(text: str, replay: str, **more: Any) -> dict[str, Any]:
            about = {"agent": "support", "gateway.replay": replay, "trace_id": live.trace_id}
            return {"inputs": {"messages": [{"role": "user", "content": text}]}, "tags": about, **more}

        name = f"rows-{uuid.uuid4().hex[:6]}"
        dataset = datasets.create_dataset(name=name, experiment_id=[experiment_id])
        dataset.merge_records(
            [
                record(question, "recorded_tools"),
                record(f"{question}!", "recorded_answer", outputs=root.outputs),
                record(f"track it, {question}", "recorded_tools"),
                record(question + "?", "live"),
                {"inputs": {"messages": [{"role": "user", "content": "2+2"}]}, "tags": {"agent": "math"}},
            ]
        )
        evaluation = prepare(settings, Options("support", name, ["no_tool_errors", "answer_uses_tool_result"]))
        assert evaluation.replays == {"recorded_tools": 2, "recorded_answer": 1, "live": 1}
        assert any("1 rows" in note for note in evaluation.notes)
        by_question = {case.inputs["messages"][-1]["content"]: case for case in evaluation.run().cases}
    replayed, recalled = by_question[question], by_question[f"{question}!"]
    assert (replayed.replay, replayed.state) == ("recorded_tools", "passed")
    assert replayed.outputs == root.outputs
    assert "A-1009" in json.dumps(replayed.outputs)
    assert (recalled.replay, recalled.state, recalled.outputs) == ("recorded_answer", "passed", root.outputs)
    unknown = by_question[f"track it, {question}"]
    assert unknown.state == "error"
    assert "track_shipment" in unknown.reasons[0]
    assert by_question[f"{question}?"].outputs == {"messages": [{"role": "assistant", "content": "I found: []"}]}
    tags = mlflow.get_trace(str(replayed.trace_id)).info.tags
    assert tags["gateway.replay"] == "recorded_tools"


@pytest.fixture
def _logging_as_before() -> Iterator[None]:
    """Put back what a command does to the logs of its process."""
    root, config = logging.getLogger(), structlog.get_config()
    handlers, level, last_resort = root.handlers[:], root.level, logging.lastResort
    hooks = sys.excepthook, threading.excepthook, sys.unraisablehook
    others = [logging.getLogger(name) for name in list(root.manager.loggerDict)]
    theirs = [(each, each.handlers[:], each.level) for each in others]
    yield
    logging.captureWarnings(capture=False)
    sys.excepthook, threading.excepthook, sys.unraisablehook = hooks
    for each, own, its_level in theirs:
        each.handlers[:] = own
        each.setLevel(its_level)
    root.handlers[:], logging.lastResort = handlers, last_resort
    root.setLevel(level)
    structlog.configure(**config)


@pytest.mark.usefixtures("_logging_as_before")
def test_the_command(mlflow_uri, tmp_path, monkeypatch, capfd) -> None:
    """`gateway gate` needs no server but MLflow: it prints the verdict, writes the reports and ends with its code."""
    lines = [json.dumps({"question": "What is 12 plus 30?", "expected_response": answer}) for answer in ("42", "43")]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    place = {"AGENTS_DIR": ROOT / "agents", "SCORERS_DIR": ROOT / "scorers"}
    own = {"MLFLOW_TRACKING_URI": mlflow_uri, "HOME": tmp_path / "home"}
    for name, value in (place | own).items():
        monkeypatch.setenv(f"GATEWAY_{name}", str(value))
    monkeypatch.setenv("TQDM_DISABLE", "1")  # the command sets it: so it is taken back
    monkeypatch.chdir(tmp_path)
    app = App()
    register(app)
    arguments = ["gate", "--agent", "math", "--dataset", "rows.jsonl", "--experiment", f"cli-{uuid.uuid4().hex[:6]}"]
    with pytest.raises(SystemExit) as ended:
        app([*arguments, "--scorer", "exact_match", "--pass-rate", "0.9"])
    said = capfd.readouterr()
    *_, last = said.out.splitlines()
    assert last == "✗ OVERALL: FAIL - pass_rate >= 0.9: 0.5"
    assert ended.value.code == 1
    assert "offline model" in said.out
    assert "rows.jsonl:2" in said.out
    bar = "Evaluating:"  # MLflow's own; what turns it off is read when MLflow is imported, which here was long ago
    assert [line for line in said.err.splitlines() if line.strip() and bar not in line] == []
    assert {path.name for path in (tmp_path / "gate-report").iterdir()} == {"junit.xml", "summary.md"}
