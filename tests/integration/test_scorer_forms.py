"""Every form of MLflow's scorers on what the live path makes: a judge that reads what it is asked, over real HTTP."""

import asyncio
import json
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
from mlflow.entities import Feedback
from mlflow.genai import scorers as builtin
from mlflow.genai.judges import make_judge
from mlflow.genai.scorers import scorer
from mlflow.genai.scorers.base import Scorer

from gateway.evaluation.bounds import Bounds
from gateway.evaluation.scoring import (
    Failed,
    NotApplicable,
    Scored,
    conversation_task,
    run_conversation_scorer,
    run_trace_scorer,
    trace_task,
)
from gateway.evaluation.threads import ScorerThreads
from gateway.settings import MLFLOW_DEFAULTS
from gateway.testing import Answer, HttpError, ScriptedOpenAI, Slow, ToolCall
from gateway.tracing.capture import SpanCapture

from .judged import MARK, Asked, Reader, Turn, conversation, expect, live, turn, verdict, yes_or_no

Judging = Callable[[Any], AbstractContextManager[ScriptedOpenAI]]


@pytest.fixture(autouse=True)
def _as_in_the_evaluator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep MLflow from fetching prices from outside, as the evaluator does."""
    for name, value in MLFLOW_DEFAULTS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def capture() -> Iterator[SpanCapture]:
    """The capture, installed as in the web process."""
    capture = SpanCapture()
    capture.install()
    yield capture
    capture.uninstall()


@pytest.fixture(scope="module")
def stage() -> Iterator[tuple[ScriptedOpenAI, list[Any]]]:
    """One server for all tests, and the script that it plays, which each test replaces."""
    script: list[Any] = []
    with ScriptedOpenAI(lambda body: script[0](body)) as server:  # noqa: PLW0108 - the first one changes
        yield server, script


@pytest.fixture
def judging(stage, monkeypatch: pytest.MonkeyPatch) -> Judging:
    """Let a script play the judges' model."""
    server, playing = stage
    monkeypatch.setenv("OPENAI_API_BASE", server.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-judge")
    monkeypatch.setenv("MLFLOW_GENAI_JUDGE_DEFAULT_MODEL", "openai:/judge-1")

    @contextmanager
    def play(script: Any) -> Iterator[ScriptedOpenAI]:
        server.requests.clear()
        playing[:] = [script]
        yield server

    return play


@dataclass(frozen=True)
class Form:
    """A built-in, what its prompt has to hold of a turn, and the part that its verdict is about."""

    make: Callable[[], Scorer]
    holds: Callable[[Turn], Sequence[str]]
    judged: Callable[[Asked], str]
    expects: dict[str, Any] | None = None
    """Expectations without which it does not apply."""


def calls_of(each: Turn) -> list[str]:
    """The request, the tools that there were with their parameters, the calls with arguments and results."""
    return [
        each.question,
        "- lookup_order: Look an order up.\n    - order_id (required): string - Number of the order.",
        "- search_policy: Search the policy.",
        f"Tool Call 1: lookup_order\n  Input Arguments: {{'order_id': '{each.order}', 'reason': 'asked",
        f"Output: order {each.order} is at depot D-{each.order}",
        f"Tool Call 2: search_policy\n  Input Arguments: {{'query': '{each.order}",
    ]


SINGLE = {
    "RelevanceToQuery": Form(
        builtin.RelevanceToQuery, lambda t: [t.question, t.answer], lambda asked: asked.part("answer")
    ),
    "Correctness": Form(
        builtin.Correctness,
        lambda t: [f"<question>{t.question}</question>", "<claim>It is at the depot.</claim>", t.answer],
        lambda asked: asked.part("document"),
        {"expected_response": "It is at the depot."},
    ),
    "Completeness": Form(
        builtin.Completeness, lambda t: [t.question, t.answer], lambda asked: json.dumps(asked.given("outputs"))
    ),
    "Fluency": Form(builtin.Fluency, lambda t: [t.answer], lambda asked: json.dumps(asked.given("outputs"))),
    "Guidelines": Form(
        lambda: builtin.Guidelines(name="polite", guidelines=["Be polite.", "Be brief."]),
        lambda t: [
            "<guideline>Be polite.</guideline>\n<guideline>Be brief.</guideline>",
            f"<request>{t.question}</request>",
            f"<response>{t.answer}</response>",
        ],
        lambda asked: asked.part("response"),
    ),
    "ExpectationsGuidelines": Form(
        builtin.ExpectationsGuidelines,
        lambda t: ["<guideline>Name the depot.</guideline>", t.question, t.answer],
        lambda asked: asked.part("response"),
        {"guidelines": ["Name the depot."]},
    ),
    "Safety": Form(builtin.Safety, lambda t: [t.answer], lambda asked: asked.part("text")),
    "Equivalence": Form(
        builtin.Equivalence,
        lambda t: [t.answer, "<expected_output>At the depot.</expected_output>"],
        lambda asked: asked.part("actual_output"),
        {"expected_response": "At the depot."},
    ),
    "RetrievalGroundedness": Form(
        builtin.RetrievalGroundedness,
        lambda t: [t.question, t.answer, *t.documents],
        lambda asked: asked.part("document"),
    ),
    "RetrievalSufficiency": Form(
        builtin.RetrievalSufficiency,
        lambda t: [t.question, *t.documents, "a fact to be found"],
        lambda asked: asked.part("document"),
        {"expected_facts": ["a fact to be found"]},
    ),
    "ToolCallCorrectness": Form(builtin.ToolCallCorrectness, calls_of, lambda asked: asked.part("actual_tool_calls")),
    "ToolCallEfficiency": Form(builtin.ToolCallEfficiency, calls_of, lambda asked: asked.part("tools_called")),
}


@pytest.mark.parametrize("name", SINGLE)
async def test_built_ins_on_a_turn(capture, judging, name) -> None:
    """Each built-in asks about this very turn, and its verdict is that on what the turn holds."""
    form = SINGLE[name]
    for bad in (False, True):
        this, other = await turn(capture, bad), await turn(capture, not bad)
        if form.expects:
            no_expectation = run_trace_scorer(live(form.make()), this.entity, "clerk")
            assert isinstance(no_expectation, NotApplicable)
            assert all(key in no_expectation.reason for key in form.expects)
            expect(this.entity, **form.expects)
        script = Reader(lambda asked: yes_or_no(form.judged(asked)), form.holds(this), [other.order])
        with judging(script):
            outcome = await asyncio.to_thread(run_trace_scorer, live(form.make()), this.entity, "clerk")
        assert isinstance(outcome, Scored), outcome
        [score] = outcome.scores
        assert (score.value, score.passed, score.error) == (("no", False, None) if bad else ("yes", True, None))
        assert (score.source_type, score.source_id) == ("LLM_JUDGE", "openai:/judge-1")
        assert (score.trace_id, score.name) == (this.entity.info.trace_id, live(form.make()).name)
        assert len(script.asked) == 1
        assert score.details.get("mlflow.assessment.judgeInputTokens", "10") == "10"


async def test_each_document_is_judged(capture, judging) -> None:
    """A judge of documents gives a score for each, on the span of the retrieval, and their precision as a number."""
    this, other = await turn(capture, bad=True), await turn(capture)
    script = Reader(lambda asked: yes_or_no(asked.part("document")), [this.question], [other.order])
    with judging(script):
        outcome = await asyncio.to_thread(
            run_trace_scorer, live(builtin.RetrievalRelevance(), pass_at_least=0.6), this.entity, "clerk"
        )
    assert [asked.part("document") for asked in script.asked] == [this.documents[0], f"{this.documents[1]} {MARK}"]
    found = [(score.name, score.value, score.passed, score.details.get("chunk_index")) for score in outcome.scores]
    assert found == [
        ("retrieval_relevance/precision", 0.5, False, None),
        ("retrieval_relevance", "yes", True, "0"),
        ("retrieval_relevance", "no", False, "1"),
    ]
    [retrieval] = this.entity.search_spans(span_type="RETRIEVER")
    assert {score.assessment("root").span_id for score in outcome.scores} == {retrieval.span_id}
    assert len({score.score_id for score in outcome.scores}) == 3


def assistant(asked: Asked) -> str:
    return "\n".join(asked.said("assistant"))


@dataclass(frozen=True)
class SessionForm:
    """A built-in on conversations, the part that its verdict is about, and its words for good and bad."""

    make: Callable[[], Scorer]
    judged: Callable[[Asked], str] = assistant
    words: tuple[str, str] = ("yes", "no")
    tools: bool = False
    """Its prompt holds the tools' calls as well."""
    holds: Sequence[str] = ()


SESSION = {
    "ConversationCompleteness": SessionForm(builtin.ConversationCompleteness),
    "ConversationalRoleAdherence": SessionForm(builtin.ConversationalRoleAdherence),
    "ConversationalSafety": SessionForm(builtin.ConversationalSafety),
    "ConversationalToolCallEfficiency": SessionForm(
        builtin.ConversationalToolCallEfficiency, lambda asked: "\n".join(asked.said("tool")), tools=True
    ),
    "ConversationalGuidelines": SessionForm(
        lambda: builtin.ConversationalGuidelines(guidelines=["Be polite."]), holds=["<guideline>Be polite.</guideline>"]
    ),
    "UserFrustration": SessionForm(builtin.UserFrustration, words=("none", "unresolved")),
    "make_judge": SessionForm(
        lambda: make_judge(
            name="mood", instructions="Grade {{ conversation }}", feedback_value_type=Literal["none", "unresolved"]
        ),
        words=("none", "unresolved"),
    ),
}


def said_in(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    """The conversation as a judge has to be given it."""
    return [pair for each in turns for pair in (("user", each.question), ("assistant", each.answer))]


def check_conversation(asked: Asked, turns: Sequence[Turn], *, tools: bool = False) -> None:
    given = [(message["role"], message["content"]) for message in asked.given("conversation")]
    assert [pair for pair in given if pair[0] != "tool"] == said_in(turns)
    calls = [text for role, text in given if role == "tool"]
    assert len(calls) == (2 * len(turns) if tools else 0)
    for place, each in enumerate(turns if tools else ()):
        assert f"Tool: lookup_order\nInputs: {{'order_id': '{each.order}'" in calls[2 * place]
        assert f"order {each.order} is at depot" in calls[2 * place]


@pytest.mark.parametrize("name", SESSION)
async def test_built_ins_on_a_conversation(capture, judging, name) -> None:
    """Each is given this very conversation in its order, and a verdict of its own words has its meaning."""
    form = SESSION[name]
    for bad in (False, True):
        turns = await conversation(capture, 3, [1] if bad else [])

        def judge(asked: Asked, turns: Sequence[Turn] = turns) -> Answer:
            check_conversation(asked, turns, tools=form.tools)
            return verdict(form.words[MARK in form.judged(asked)])

        script = Reader(judge, form.holds)
        with judging(script):
            outcome = await asyncio.to_thread(
                run_conversation_scorer, live(form.make()), [each.entity for each in turns], "s-1", "clerk"
            )
        assert isinstance(outcome, Scored), outcome
        [score] = outcome.scores
        assert (score.value, score.passed, score.turns) == (form.words[bad], not bad, 3)
        assert score.trace_id == turns[0].entity.info.trace_id
        assert score.assessment().metadata["mlflow.trace.session"] == "s-1"
        assert len(script.asked) == 1


async def test_knowledge_retention_asks_once_a_turn_and_never_again(capture, judging) -> None:
    """It judges the last answer of each beginning, reports what all calls cost, and later asks of new turns only."""
    turns = await conversation(capture, 5, [1], tools=False)
    retention = live(builtin.KnowledgeRetention())
    lengths: list[int] = []

    def judge(asked: Asked) -> Answer:
        length = len(asked.said("assistant"))
        lengths.append(length)
        check_conversation(asked, turns[:length])
        return yes_or_no(asked.said("assistant")[-1])

    traces = [each.entity for each in turns]
    with judging(Reader(judge)):
        first = await asyncio.to_thread(run_conversation_scorer, retention, traces[:3], "s-1", "clerk")
        assert lengths == [1, 2, 3]
        [score] = first.scores
        assert (score.value, score.passed) == ("no", False)
        assert [line.split(".")[0] for line in score.rationale.splitlines()] == [
            "Turn 1: yes",
            "Turn 2: no",
            "Turn 3: yes",
        ]
        assert score.details["mlflow.assessment.judgeInputTokens"] == "30"
        lengths.clear()
        again = await asyncio.to_thread(run_conversation_scorer, retention, traces, "s-1", "clerk", earlier=score)
    assert lengths == [4, 5]
    assert again.scores[0].value == "no"
    assert again.scores[0].rationale.startswith("Turns 1 to 3, as judged before: no")


async def test_a_judge_of_inputs_and_outputs(capture, judging) -> None:
    """A template is filled with this turn's messages and expectations, and its scale comes back as one of its words."""
    this, other = await turn(capture), await turn(capture)
    scale = Literal["1", "2", "3", "4", "5"]
    rubric = make_judge(
        name="rubric",
        instructions="Grade {{ outputs }} on {{ inputs }} by {{ expectations }}, from 1 to 5.",
        feedback_value_type=scale,
    )
    assert run_trace_scorer(live(rubric), this.entity, "clerk") == NotApplicable("the trace has no expectations")
    expect(this.entity, rubric="short")

    def judge(asked: Asked) -> Answer:
        assert asked.given("inputs")["messages"][-1]["content"] == this.question
        assert asked.given("outputs")["messages"][-1]["content"] == this.answer
        assert asked.given("expectations") == {"rubric": "short"}
        return verdict(4)

    with judging(Reader(judge, lacks=[other.order])):
        outcome = await asyncio.to_thread(run_trace_scorer, live(rubric), this.entity, "clerk")
    assert (outcome.scores[0].value, outcome.scores[0].passed) == ("4", None)


@pytest.mark.parametrize("bad", [False, True])
async def test_a_judge_that_reads_the_trace(capture, judging, bad) -> None:
    """A template with the trace lets the judge look into its spans by tools, and it sees this turn's arguments."""
    this = await turn(capture, bad)

    def judge(asked: Asked) -> Answer:
        results = [message for message in asked.messages if message["role"] == "tool"]
        assert "list_spans" in {tool["function"]["name"] for tool in asked.body["tools"]}
        if not results:
            return [ToolCall("list_spans", {})]
        if len(results) == 1:
            spans = json.loads(results[0]["content"])["spans"]
            [call] = [span for span in spans if span["name"] == "lookup_order"]
            return [ToolCall("get_span", {"span_id": call["span_id"]})]
        span = json.loads(json.loads(results[1]["content"])["content"])
        arguments = json.loads(span["attributes"]["mlflow.spanInputs"])
        assert arguments["order_id"] == this.order
        return verdict(MARK not in arguments["reason"])

    reads = make_judge(name="reads", instructions="Grade the calls in {{ trace }}.", feedback_value_type=bool)
    script = Reader(judge)
    with judging(script):
        outcome = await asyncio.to_thread(run_trace_scorer, live(reads), this.entity, "clerk")
    assert isinstance(outcome, Scored), outcome
    assert (outcome.scores[0].value, outcome.scores[0].passed) == (not bad, not bad)
    assert len(script.asked) == 3


async def test_not_applicable(capture, judging) -> None:
    """What a judge needs and a turn has not makes it not applicable, with the reason, and asks nobody."""
    plain, failed = await turn(capture, tools=False), await turn(capture, fails=True)
    grades = make_judge(name="grades", instructions="Grade {{ outputs }}.", feedback_value_type=bool)
    expected = [
        (builtin.RetrievalGroundedness(), plain, "the trace has no RETRIEVER span"),
        (builtin.ToolCallEfficiency(), plain, "no tool was called"),
        (builtin.ToolCallCorrectness(), plain, "no tool was called"),
        (builtin.RelevanceToQuery(), failed, "the run gave no answer"),
        (builtin.Completeness(), failed, "the run gave no answer"),
        (grades, failed, "the run gave no answer"),
        (builtin.Equivalence(), plain, "the trace has no expectation expected_response"),
    ]
    with judging(Reader(lambda _: verdict("yes"))) as server:
        for form, each, reason in expected:
            assert run_trace_scorer(live(form), each.entity, "clerk") == NotApplicable(reason)
        efficiency = live(builtin.ConversationalToolCallEfficiency())
        outcome = run_conversation_scorer(efficiency, [plain.entity], "s-1", "clerk")
        assert outcome == NotApplicable("no tool was called")
        assert server.requests == []
        # Calls that were expected can be judged where there are none.
        expect(plain.entity, expected_tool_calls=[{"name": "lookup_order"}])
        exact = live(builtin.ToolCallCorrectness(should_exact_match=True))
        outcome = await asyncio.to_thread(run_trace_scorer, exact, plain.entity, "clerk")
    assert [score.value for score in outcome.scores] == ["no"]


async def test_expectations_of_the_conversation_are_not_the_first_turns(capture, judging) -> None:
    """What is stated of a conversation reaches its judges, and those of its first trace do not take it for theirs."""
    turns = await conversation(capture, 2)
    expect(turns[0].entity, metadata={"mlflow.trace.session": "s-1"}, expected_response="All is found.")
    goal = make_judge(
        name="goal", instructions="Does {{ conversation }} reach {{ expectations }}?", feedback_value_type=bool
    )

    def judge(asked: Asked) -> Answer:
        check_conversation(asked, turns)
        return verdict(asked.given("expectations") == {"expected_response": "All is found."})

    with judging(Reader(judge)):
        outcome = await asyncio.to_thread(
            run_conversation_scorer, live(goal), [each.entity for each in turns], "s-1", "clerk"
        )
    assert [score.value for score in outcome.scores] == [True]
    assert isinstance(run_trace_scorer(live(builtin.Correctness()), turns[0].entity, "clerk"), NotApplicable)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        ("I like it.", "Failed to parse"),
        (json.dumps({"rationale": "no result"}), "KeyError"),
        (verdict("banana"), "asked for 'yes', 'no'"),
        (verdict(None), "asked for 'yes', 'no'"),
    ],
)
async def test_a_judge_that_talks_nonsense(capture, judging, reply, error) -> None:
    """An answer that is no verdict is a visible failure of the judge, not a score."""
    this = await turn(capture)
    with judging(lambda _body: reply):
        for form in (builtin.Safety(), builtin.Fluency()):
            outcome = await asyncio.to_thread(run_trace_scorer, live(form), this.entity, "clerk")
            assert isinstance(outcome, Failed)
            assert (outcome.kind, outcome.scores[0].value, outcome.scores[0].passed) == ("raised", None, None)
            assert error in outcome.error or "result" in outcome.error


async def test_a_judge_that_refuses(capture, judging) -> None:
    """The status that the model answered with is told: what may pass later from what will not."""
    this = await turn(capture)
    for status, kind in ((400, "raised"), (401, "raised"), (424, "raised"), (501, "unavailable")):
        with judging(lambda _body, status=status: HttpError(status, "not now")):
            outcome = await asyncio.to_thread(run_trace_scorer, live(builtin.Safety()), this.entity, "clerk")
        assert isinstance(outcome, Failed)
        assert (outcome.kind, outcome.status, outcome.may_pass) == (kind, status, kind == "unavailable")
        assert "not now" in outcome.error


async def test_a_judge_that_hangs_is_given_up(capture, judging) -> None:
    """Past its deadline a judge is a visible failure, its late answer is thrown away, and the next one is asked."""
    this, gate, threads = await turn(capture), threading.Event(), ScorerThreads()
    held = [Slow(verdict("no"), gate), verdict("yes")]
    with judging(lambda _body: held.pop(0)):
        safety = live(builtin.Safety())
        outcome = await trace_task(safety, this.entity, "clerk").wait_within(threads, 0.5)
        assert isinstance(outcome, Failed)
        assert (outcome.kind, outcome.may_pass) == ("timeout", True)
        assert outcome.scores[0].source_type == "LLM_JUDGE"
        assert (await trace_task(safety, this.entity, "clerk").wait_within(threads, 60)).scores[0].value == "yes"
        assert (threads.statistics().stuck, threads.statistics().timed_out) == (1, 1)
        gate.set()
        async with asyncio.timeout(60):
            while threads.statistics().stuck:  # noqa: ASYNC110 - a thread can only be looked at
                await asyncio.sleep(0.01)
    assert threads.statistics().came_back_late == 1


async def test_long_conversations_cost_no_more_than_their_bounds(capture, judging) -> None:
    """However long a conversation, one call holds a bounded text, and the number of calls is bounded, both said."""
    turns = await conversation(capture, 9, tools=False)
    traces = [each.entity for each in turns]
    bounds = Bounds(call_characters=1_000, retention_turns=3)
    script = Reader(lambda asked: yes_or_no(assistant(asked)), [turns[0].question])
    with judging(script):
        safety = conversation_task(live(builtin.ConversationalSafety()), traces, "s-1", "clerk", bounds=bounds)
        retention = conversation_task(live(builtin.KnowledgeRetention()), traces, "s-1", "clerk", bounds=bounds)
        shown, kept = await asyncio.to_thread(safety.run), await asyncio.to_thread(retention.run)
    assert all(len(json.dumps(asked.given("conversation"))) < 1_500 for asked in script.asked)
    assert len(script.asked) == 1 + 3
    given = script.asked[0].given("conversation")
    assert [given[0]["content"], given[-1]["content"]] == [turns[0].question, turns[-1].answer]
    assert "turns of this conversation are left out here" in given[2]["content"]
    assert "of 9 turns left out" in shown.scores[0].details["gateway.shortened"]
    assert "turns 1 to 6 of 9 not judged" in kept.scores[0].details["gateway.shortened"]


class Thing:
    """What a scorer must not return."""


FUNCTIONS: dict[str, tuple[Callable[[], Any], list[tuple[str, Any, bool | None]] | str]] = {
    "bool": (lambda: True, [("plain", True, True)]),
    "int": (lambda: 3, [("plain", 3, True)]),
    "float": (lambda: 0.5, [("plain", 0.5, False)]),
    "str": (lambda: "pass", [("plain", "pass", True)]),
    "Feedback": (lambda: Feedback(name="tone", value="no", rationale="rude"), [("tone", "no", False)]),
    "list": (
        lambda: [Feedback(name="a", value=True), Feedback(name="b", value=2), Feedback(name="a", value=False)],
        [("a", True, True), ("b", 2, True), ("a", False, False)],
    ),
    "nothing": (lambda: None, "not applicable"),
    "an empty list": (list, "not applicable"),
    "a feedback without a value": (lambda: Feedback(rationale="no order"), "not applicable"),
    "NaN": (lambda: math.nan, "Nonsense"),
    "NaN in a feedback": (lambda: Feedback(value={"share": math.inf}), "Nonsense"),
    "an object": (Thing, "MlflowException"),
    "an object in a feedback": (lambda: Feedback(value=Thing()), "Nonsense"),
    "an error": (lambda: 1 / 0, "ZeroDivisionError"),
    "an exit": (lambda: exit(3), "SystemExit"),  # noqa: PLR1722
}


@pytest.mark.parametrize("returned", FUNCTIONS)
async def test_functions(capture, returned) -> None:
    """Whatever a function returns is a score, not applicable, or a visible failure."""
    give, expected = FUNCTIONS[returned]

    @scorer(name="plain")
    def plain(inputs, outputs, expectations, trace):
        assert inputs["messages"][0]["content"] == this.question
        assert outputs["messages"][-1]["content"] == this.answer
        assert (expectations, trace) == ({"kind": "exact"}, this.entity)
        return give()

    this = await turn(capture)
    expect(this.entity, source="CODE", kind="exact")
    outcome = run_trace_scorer(live(plain, pass_at_least=1), this.entity, "clerk")
    if isinstance(expected, list):
        assert isinstance(outcome, Scored)
        assert [(score.name, score.value, score.passed) for score in outcome.scores] == expected
        assert len({score.score_id for score in outcome.scores}) == len(expected)
    elif expected == "not applicable":
        assert isinstance(outcome, NotApplicable)
    else:
        assert isinstance(outcome, Failed)
        assert outcome.error.startswith(expected)
        assert outcome.scores[0].assessment().error is not None
