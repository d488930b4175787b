"""The known mistakes: each is found, with its place and what to do, and what is right is left alone."""

from pathlib import Path
from typing import Any

import pytest
from mlflow.genai.judges import make_judge
from mlflow.genai.scorers import (
    ConversationalToolCallEfficiency,
    ConversationCompleteness,
    Correctness,
    Guidelines,
    RetrievalGroundedness,
    Safety,
    ToolCallCorrectness,
    scorer,
)

from gateway.errors import ConfigurationError
from gateway.evaluation.doctor import Record, examine, needs_expectations, of_records, of_traces, read_records
from gateway.evaluation.judge_models import what_model_lacks
from gateway.evaluation.mistakes import Finding, mistakes_of_scorers, mistakes_of_settings
from gateway.evaluation.scoring import LiveScorer
from gateway.rules import ScorerRule
from gateway.settings import Settings


@scorer
def equal(outputs, expectations):
    """Compare with what was expected."""
    return outputs == expectations["expected_response"]


@scorer
def long_enough(session):
    """Score a conversation."""
    return len(session) > 1


def live(made: Any, model: str | None = None, **rule: Any) -> LiveScorer:
    return LiveScorer(made, "v1", ScorerRule(**rule), model, "gateway.toml, line 3")


def said(findings: list[Finding]) -> str:
    """Return the one finding as a line, with its severity."""
    [finding] = findings
    return f"{finding.severity} {finding}"


def judge(instructions: str, kind: Any = bool) -> LiveScorer:
    return live(make_judge(name="tone", instructions=instructions, feedback_value_type=kind))


@pytest.mark.parametrize("word", ["question", "answer", "inputs", "outputs.text", "expected_response", " trace "])
def test_single_braces(word: str) -> None:
    """A variable in single braces can never be replaced: an error that says what to write."""
    text = said(mistakes_of_scorers([judge(f"Given {{{word}}}, is {{{{ outputs }}}} polite?")]))
    assert text.startswith(f"error gateway.toml, line 3: the template has {{{word}}}, which nothing replaces")
    assert "Write {{ " in text


@pytest.mark.parametrize("word", ["name", "user.name"])
def test_single_braces_that_may_be_meant(word: str) -> None:
    """Any other word in braces may be meant as it is: a warning."""
    assert said(mistakes_of_scorers([judge(f"No {{{word}}} may be left in {{{{ outputs }}}}.")])).startswith("warning")


@pytest.mark.parametrize(
    "instructions",
    ['{{outputs}} as {"result": true}', "{{ outputs }} costs ${amount}", "{{ inputs }}{{ outputs }} {} { }"],
)
def test_braces_that_are_no_variable(instructions: str) -> None:
    """JSON, shell variables and empty braces are left alone."""
    assert mistakes_of_scorers([judge(instructions)]) == []


def test_guidelines_take_no_variables() -> None:
    """A variable in a guideline is told, whatever its braces."""
    text = said(mistakes_of_scorers([live(Guidelines(guidelines=["Be polite.", "Answer {{ question }} in full."]))]))
    assert text.startswith("warning gateway.toml, line 3: the guideline has {{ question }}, which nothing replaces")


def test_any_text() -> None:
    """A judge that may answer with any text is told; those with choices, and MLflow's own, are not."""
    assert "feedback_value_type=str" in said(mistakes_of_scorers([judge("Is {{ outputs }} polite?", str)]))
    assert mistakes_of_scorers([live(Safety()), live(equal), judge("{{ outputs }}?", int)]) == []


@pytest.mark.parametrize(
    ("model", "environment", "lacks"),
    [
        ("openai:/gpt-4o", {}, "OPENAI_API_KEY is not set"),
        ("openai:/gpt-4o", {"OPENAI_API_KEY": "sk"}, None),
        ("anthropic:/claude", {"OPENAI_API_KEY": "sk"}, "ANTHROPIC_API_KEY is not set"),
        ("azure:/gpt", {"AZURE_API_KEY": "k"}, "AZURE_API_BASE and AZURE_API_VERSION are not set"),
        ("opnai:/gpt-4o", {}, "did you mean openai:/gpt-4o?"),
        ("ollama:/llama3", {}, None),
        ("gateway:/my-endpoint", {}, None),
        ("databricks", {}, None),
        ("gpt-4o", {}, "write provider:/model"),
        ("openai://gpt-4o", {}, "write provider:/model"),
    ],
)
def test_judge_models(model: str, environment: dict[str, str], lacks: str | None) -> None:
    """A model is told whose form, provider or key is missing, with the variable to set."""
    found = what_model_lacks(model, environment)
    assert found is None if lacks is None else lacks in str(found)


def test_a_model_without_a_key() -> None:
    """A judge that cannot be asked can never work: an error that says which, and what to set."""
    judges = [live(Safety(), "openai:/gpt-4o"), live(Correctness(), "openai:/gpt-4o")]
    text = said(mistakes_of_settings(Settings(), judges, {}))
    assert text.startswith(
        "error GATEWAY_JUDGE_MODEL: safety, correctness cannot ask openai:/gpt-4o. OPENAI_API_KEY is"
    )
    assert mistakes_of_settings(Settings(judge_api_key="sk"), judges, {}) == []


@pytest.mark.parametrize("uri", ["./mlruns", "mlruns", "file:///data/mlruns"])
def test_file_store(uri: str) -> None:
    """A file store is refused, with what to name instead."""
    text = said(mistakes_of_settings(Settings(mlflow_tracking_uri=uri), [], {}))
    assert text.startswith(f"error GATEWAY_MLFLOW_TRACKING_URI: {uri} is a file store")
    assert "sqlite:///mlflow.db" in text


@pytest.mark.parametrize(
    "uri", [None, "sqlite:///mlflow.db", "postgresql://db/mlflow", "http://mlflow:5000", "databricks"]
)
def test_other_stores(uri: str | None) -> None:
    """A database, a server and our own are left alone."""
    assert mistakes_of_settings(Settings(mlflow_tracking_uri=uri), [], {}) == []


def test_s3_without_an_endpoint() -> None:
    """A bucket with no endpoint is told, unless a region says that it is Amazon's."""
    bucket = {"MLFLOW_ARTIFACTS_DESTINATION": "s3://models"}
    text = said(mistakes_of_settings(Settings(), [], bucket))
    assert text.startswith("warning MLFLOW_ARTIFACTS_DESTINATION: artifacts go to s3://models, and no endpoint is set")
    assert "MLFLOW_S3_ENDPOINT_URL" in text
    for known in ({"MLFLOW_S3_ENDPOINT_URL": "http://minio:9000"}, {"AWS_REGION": "eu-west-1"}):
        assert mistakes_of_settings(Settings(), [], bucket | known) == []


def test_retrieval_without_a_retriever(traces) -> None:
    """A retrieval scorer is told where no trace has a RETRIEVER span, and left alone where one has."""
    judges = [live(RetrievalGroundedness())]
    without = [traces.trace("Where?", "Here", traces.Call("search", {}, "x"), index=index) for index in range(3)]
    text = said(of_traces(without, judges))
    assert "retrieval_groundedness judges retrieval, and none of the latest 3 traces has a RETRIEVER span" in text
    assert 'set_span_type("RETRIEVER")' in text
    searched = traces.trace("Where?", "Here", traces.Call("search", {}, "x", documents=["Here."]), index=3)
    assert of_traces([*without, searched], judges) == []


@pytest.mark.parametrize("kind", [ToolCallCorrectness, ConversationalToolCallEfficiency])
def test_tool_calls_without_a_tool(traces, kind: Any) -> None:
    """A scorer of tool calls is told where no tool span arrives, and left alone where one does."""
    without = traces.conversation(("Hello", "Hi"), ("Bye", "Bye"))
    assert "none of the latest 2 traces has a TOOL span" in said(of_traces(without, [live(kind())]))
    assert of_traces([*without, traces.trace("1 + 1", "2", traces.Call("add", {}, 2), index=2)], [live(kind())]) == []


def test_a_filter_for_a_tool_that_nobody_calls(traces) -> None:
    """A filter that lets nothing through is told with the tools that were called."""
    turn = [traces.trace("1 + 1", "2", traces.Call("add", {}, 2))]
    text = said(of_traces(turn, [live(equal, filter={"tools": ["plus"]})]))
    assert "equal is for runs that called plus, and none of the latest 1 did" in text
    assert "called were add" in text
    assert of_traces(turn, [live(equal, filter={"tools": ["a*"]})]) == []


def test_only_the_traces_of_its_agents_count(traces) -> None:
    """What a scorer's agents never do is told, whatever others do; with no trace of theirs, nothing is said."""
    theirs, other = traces.trace("Hello", "Hi"), traces.trace("1 + 1", "2", traces.Call("add", {}, 2), index=1)
    theirs.info.trace_metadata["gateway.agent"] = "chat"
    other.info.trace_metadata["gateway.agent"] = "math"
    assert "latest 1 traces" in said(of_traces([theirs, other], [live(ToolCallCorrectness(), agents=["chat"])]))
    assert of_traces([theirs, other], [live(ToolCallCorrectness(), agents=["math"])]) == []
    assert of_traces([theirs, other], [live(ToolCallCorrectness(), agents=["none"])]) == []


@pytest.mark.parametrize("made", [ConversationCompleteness(), long_enough])
def test_conversations_without_a_session(traces, made: Any) -> None:
    """A scorer of conversations is told of traces that have no session, with the call that sets it."""
    alone = traces.trace("Hello", "Hi")
    del alone.info.trace_metadata["mlflow.trace.session"]
    text = said(of_traces([alone, traces.trace("Hello", "Hi", index=1)], [live(made)]))
    assert "1 of the latest 2 traces have no session" in text
    assert 'update_current_trace(metadata={"mlflow.trace.session": session_id})' in text
    assert of_traces([alone], [live(equal)]) == []


@pytest.mark.parametrize("key", ["session.id", "mlflow.trace.session"])
def test_a_session_as_a_span_attribute_only(traces, key: str) -> None:
    """A session that is on a span and not in the trace's metadata is told as that."""
    alone = traces.trace("Hello", "Hi", traces.Call("add", {}, 2))
    del alone.info.trace_metadata["mlflow.trace.session"]
    alone.data.spans[1]._span._attributes = {**alone.data.spans[1]._span._attributes, key: '"s-1"'}
    assert f"have a session as the span attribute `{key}` only" in said(of_traces([alone], [live(long_enough)]))


ASKED = {"messages": [{"role": "user", "content": "1 + 1?"}]}
RIGHT = {"inputs": ASKED, "expectations": {"expected_response": "2"}}


def checked(*contents: Any) -> list[Finding]:
    records = [Record(f"line {number}", content) for number, content in enumerate(contents, 1)]
    return of_records("golden.jsonl", records, [live(equal), live(Safety())])


@pytest.mark.parametrize(
    ("content", "severity", "told"),
    [
        ({"question": "1 + 1?", "outputs": 1}, "error", "has no `inputs`"),
        (RIGHT | {"inputs": "1 + 1?"}, "error", "has no chat messages in `inputs`"),
        (RIGHT | {"inputs": {"question": "1 + 1?"}}, "error", "has no chat messages in `inputs`"),
        (RIGHT | {"expectations": "2"}, "error", "has `expectations` that are no object"),
        ({"inputs": ASKED}, "warning", "has neither `outputs` nor `expectations`"),
        (
            {"inputs": ASKED, "outputs": "2"},
            "warning",
            "has no `expectations`. Without them these do not apply: equal.",
        ),
        ("{'inputs'", "error", "has no JSON object"),
        ([RIGHT], "error", "has no JSON object"),
    ],
)
def test_records(content: Any, severity: str, told: str) -> None:
    """A record that cannot be asked, or says nothing of what is right, is told with the first one's place."""
    findings = [f"{each.severity} {each}" for each in checked(RIGHT, content, RIGHT)]
    expected = f"{severity} golden.jsonl, line 2: 1 of 3 records {told}"
    assert any(each.startswith(expected) for each in findings), findings


def test_right_records() -> None:
    """A record with what is asked and what is expected is left alone, and so is one made of a trace."""
    assert checked(RIGHT, {"trace": "{}", "expectations": {"expected_response": "2"}}) == []


def test_what_needs_expectations() -> None:
    """Functions, templates and built-ins that compare are known from those that do not."""
    expecting = make_judge(name="t", instructions="{{ outputs }} like {{ expectations }}?", feedback_value_type=bool)
    assert all(needs_expectations(each) for each in (equal, expecting, Correctness()))
    assert not any(needs_expectations(each) for each in (long_enough, Safety(), ToolCallCorrectness()))


def test_a_file_of_records(tmp_path: Path) -> None:
    """Lines that are no JSON keep their numbers, and a file that is not there is refused."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"inputs": 1}\n\noops\n')
    assert list(read_records(path)) == [Record("line 1", {"inputs": 1}), Record("line 3", "oops")]
    with pytest.raises(ConfigurationError, match=r"no file .*nowhere\.jsonl"):
        list(read_records(tmp_path / "nowhere.jsonl"))


def test_all_together_on_a_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a store that cannot be asked, everything else is looked at still, the agents' golden sets included."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GATEWAY_CONFIG")
    (tmp_path / "scorers").mkdir()
    (tmp_path / "agents" / "math").mkdir(parents=True)
    (tmp_path / "agents" / "math" / "golden.jsonl").write_text('{"question": "1 + 1?"}\n')
    settings = Settings(mlflow_tracking_uri="./mlruns", judge_model="opnai:/x", scorers={"Safety": {}})
    text = "\n".join(str(finding) for finding in examine(settings))
    assert "no scorer nobody" in "\n".join(map(str, examine(Settings(scorers={"nobody": {}}), away="It is down.")))
    assert "GATEWAY_MLFLOW_TRACKING_URI: ./mlruns is a file store" in text
    assert "safety cannot ask opnai:/x" in text
    assert "agents/math/golden.jsonl, line 1: 1 of 1 records has no `inputs`" in text


def test_a_datasets_rule_for_what_is_not_there() -> None:
    """A scorer or an agent that is not there is named, with the rule's place and what there is."""
    rules = {"golden": {"when": "passed", "scorers": ["typo"]}, "other": {"agents": ["nobody", "math"]}}
    golden, other = mistakes_of_settings(Settings(datasets=rules), [], {})
    assert str(golden) == ("[datasets.golden]: scorers names typo, and nothing of that name runs live. There are none.")
    assert str(other) == (
        "[datasets.other]: agents names nobody, and nothing of that name runs live. There are math, support."
    )
