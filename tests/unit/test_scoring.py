"""Scores: verdicts, ids, failures as values."""

import math
from typing import Literal

import pytest
from mlflow.entities import AssessmentError, AssessmentSource, Expectation, Feedback
from mlflow.genai.scorers import scorer

from gateway.evaluation.applicability import expectations_of
from gateway.evaluation.filters import TraceFacts
from gateway.evaluation.scoring import (
    LiveScorer,
    Scored,
    passed,
    run_conversation_scorer,
    run_trace_scorer,
    score_id,
    score_trace,
)
from gateway.evaluation.selection import select
from gateway.evaluation.values import Nonsense, as_declared
from gateway.rules import ScorerRule


def live(function, version="v1", **rule) -> LiveScorer:
    """Make a live scorer of a function over a trace."""
    return LiveScorer(scorer(function), version, ScorerRule(**rule))


def returning(value, **rule) -> LiveScorer:
    def check(trace):
        return value

    return live(check, **rule)


@pytest.fixture
def turn(traces):
    """One answered turn."""
    return traces.trace("1 + 1?", "2", session="s-1")


@pytest.mark.parametrize(
    ("value", "rule", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"pass_at_least": 2}, True),
        ("yes", {}, True),
        (" No ", {}, False),
        ("Pass", {}, True),
        ("fail", {}, False),
        ("true", {}, True),
        ("none", {}, True),
        ("resolved", {}, True),
        ("unresolved", {}, False),
        ("maybe", {}, None),
        ("", {}, None),
        (0.7, {}, None),
        (0.7, {"pass_at_least": 0.7}, True),
        (0.69, {"pass_at_least": 0.7}, False),
        (0, {"pass_at_least": 0}, True),
        (3, {"pass_at_least": 4}, False),
        (math.nan, {"pass_at_least": 0}, False),
        (None, {"pass_at_least": 0}, None),
        ({"a": 1}, {"pass_at_least": 0}, None),
        ([True], {}, None),
    ],
)
def test_verdict(value, rule, expected):
    """Booleans and the judges' words are verdicts; numbers are with a limit; nothing else is."""
    assert passed(returning(None, **rule), value) is expected


def test_one_feedback(turn):
    """A plain value becomes one score with the scorer's name, of a trace and not of a conversation."""
    (score,) = score_trace(returning(True), turn, "math")
    assert (score.name, score.scorer, score.value, score.passed, score.error) == ("check", "check", True, True, None)
    assert (score.trace_id, score.agent, score.session_id, score.turns) == (turn.info.trace_id, "math", None, None)
    assert (score.source_type, score.source_id) == ("CODE", "check")


def test_what_a_scorer_is_given(turn):
    """A scorer may ask for the turn's inputs and outputs as well as the whole trace."""
    seen = {}

    def check(inputs, outputs, trace):
        seen.update(inputs=inputs, outputs=outputs, trace=trace)
        return True

    score_trace(live(check), turn, "math")
    assert seen["inputs"] == {"messages": [{"role": "user", "content": "1 + 1?"}]}
    assert seen["outputs"]["messages"][0]["content"] == "2"
    assert seen["trace"] is turn


def test_not_applicable(turn):
    """A scorer that returns nothing gives no score."""
    assert score_trace(returning(None), turn, "math") == []
    assert score_trace(returning([]), turn, "math") == []


def test_list_of_feedbacks(turn):
    """A list gives one score each, with ids of their own, also where several have one name."""
    feedbacks = [
        Feedback(name="tone", value="no"),
        Feedback(name="length", value=12),
        Feedback(name="tone", value="yes"),
    ]
    scores = score_trace(returning(feedbacks), turn, "math")
    assert [(score.name, score.value, score.passed) for score in scores] == [
        ("tone", "no", False),
        ("length", 12, None),
        ("tone", "yes", True),
    ]
    again = [score.score_id for score in score_trace(returning(feedbacks), turn, "math")]
    assert [score.score_id for score in scores] == again
    assert len(set(again)) == 3
    assert again[0] == score_id(turn.info.trace_id, returning(None), "tone")
    assert {score.scorer for score in scores} == {"check"}


def test_part_of_a_list_fails(turn):
    """Where one of several feedbacks is nonsense, that one is a visible failure and the others are scores."""
    feedbacks = [Feedback(name="share", value=math.nan), Feedback(name="tone", value="yes")]
    outcome = run_trace_scorer(returning(feedbacks), turn, "math")
    assert isinstance(outcome, Scored)
    assert [(score.name, score.passed, score.error is None) for score in outcome.scores] == [
        ("share", None, False),
        ("tone", True, True),
    ]


def test_feedback_on_a_span(turn):
    """A feedback on one span becomes an assessment on that span; every other is on the root."""
    feedbacks = [Feedback(name="one", value=True, span_id="ab" * 8), Feedback(name="other", value=True)]
    one, other = (score.assessment(span_id="root") for score in score_trace(returning(feedbacks), turn, "math"))
    assert (one.span_id, other.span_id) == ("ab" * 8, "root")
    assert set(one.metadata) == set(other.metadata)


def test_feedback_details(turn):
    """Rationale, source and metadata of a feedback are kept."""
    source = AssessmentSource(source_type="LLM_JUDGE", source_id="a-model")
    feedback = Feedback(name="tone", value="no", rationale="rude", source=source, metadata={"cost": 0.5})
    (score,) = score_trace(returning(feedback), turn, "math")
    assert (score.rationale, score.source_type, score.source_id) == ("rude", "LLM_JUDGE", "a-model")
    assert score.details == {"cost": "0.5"}


class Unspeakable(Exception):
    """An error that cannot even say what it is."""

    def __str__(self):
        """Fail."""
        raise RuntimeError


@pytest.mark.parametrize(
    "error", [ValueError("no such field"), KeyError("x"), RuntimeError(), SystemExit(1), Unspeakable()]
)
def test_scorer_that_raises(turn, error):
    """A scorer that raises becomes a score without a value or verdict, and an assessment with the error."""

    def check(trace):
        raise error

    (score,) = score_trace(live(check), turn, "math")
    assert (score.value, score.passed, score.name) == (None, None, "check")
    assert score.error.startswith(type(error).__name__)
    assessment = score.assessment()
    assert assessment.error.error_message == score.error
    assert assessment.value is None


def test_scorer_that_returns_nonsense(turn):
    """A value that can be no feedback is a failure as well."""
    (score,) = score_trace(returning(object()), turn, "math")
    assert score.error
    assert score.passed is None


def test_feedback_with_an_error(turn):
    """A feedback that reports an error has no verdict, even from a scorer with a limit."""
    feedback = Feedback(name="tone", error=AssessmentError("RATE_LIMIT", "later"))
    (score,) = score_trace(returning(feedback, pass_at_least=0), turn, "math")
    assert (score.error, score.passed) == ("RATE_LIMIT: later", None)


def test_assessment(turn):
    """The assessment carries the score's id, so that writing it twice makes one, and says which scorer it was."""
    (score,) = score_trace(returning(Feedback(value=False, rationale="wrong")), turn, "math")
    assessment = score.assessment(span_id="ab", overrides=None)
    assert (assessment.assessment_id, assessment.trace_id, assessment.span_id) == (score.score_id, score.trace_id, "ab")
    assert (assessment.name, assessment.value, assessment.rationale) == (score.name, False, "wrong")
    assert assessment.metadata == {"gateway.scorer": "check", "gateway.scorer_version": "v1"}


def test_expectations(turn):
    """What is expected of a trace is what stands now, whoever stated it; feedback is no expectation."""
    expected = [
        Expectation(name="expected_response", value="3"),
        Expectation(name="expected_response", value="2"),
        Expectation(name="kind", value="exact", source=AssessmentSource(source_type="CODE", source_id="import")),
        Expectation(name="goal", value="all", metadata={"mlflow.trace.session": "s-1"}),
        Feedback(name="tone", value="yes"),
    ]
    expected[0].valid = False  # as MLflow marks what was corrected
    turn.info.assessments += expected
    assert expectations_of(turn) == {"expected_response": "2", "kind": "exact"}
    assert expectations_of(turn, of_session=True) == {"goal": "all"}


@pytest.mark.parametrize(
    ("value", "declared", "expected"),
    [
        ("yes", Literal["yes", "no"], "yes"),
        (" Yes", Literal["yes", "no"], "yes"),
        (4, Literal["1", "2", "3", "4", "5"], "4"),
        ("4", int, 4),
        ("0.5", float, 0.5),
        ("true", bool, True),
        (4, str, "4"),
        (["a"], list[str], ["a"]),
        ({"tone": 2}, dict[str, int], {"tone": 2}),
    ],
)
def test_what_a_judge_was_asked_for(value, declared, expected):
    """Models are loose with types and capitals: what they mean is one of the values that they were asked for."""
    found = as_declared(value, declared)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "declared"),
    [
        ("maybe", Literal["yes", "no"]),
        (None, Literal["yes", "no"]),
        ("6", Literal["1", "2", "3", "4", "5"]),
        ("high", int),
        (4.5, int),
        ("perhaps", bool),
        ({"tone": "b"}, dict[str, int]),
        (None, str),
    ],
)
def test_what_a_judge_was_not_asked_for(value, declared):
    """Any other value is nonsense, and says what was asked for."""
    with pytest.raises(Nonsense, match="was asked for"):
        as_declared(value, declared)


def test_conversation(traces):
    """A conversation's score belongs on its first trace, names its session, and counts its turns."""

    @scorer
    def length(session):
        return len(session)

    turns = traces.conversation(("1 + 1?", "2"), ("and 2 more?", "4"))
    each = LiveScorer(length, "v1", ScorerRule(pass_at_least=2))
    (score,) = run_conversation_scorer(each, turns, "s-1", "math").scores
    (longer,) = run_conversation_scorer(each, [*turns, turns[1]], "s-1", "math").scores

    assert each.scores_conversations
    assert not each.is_judge
    assert (score.trace_id, score.session_id, score.turns) == (turns[0].info.trace_id, "s-1", 2)
    assert (score.value, score.passed) == (2, True)
    assert score.assessment().metadata["mlflow.trace.session"] == "s-1"
    assert score.score_id != longer.score_id


def test_score_ids():
    """An id is the same for the same work, short enough for MLflow, and differs in each part of what was done."""

    def other(trace):
        return None

    one = returning(None)
    ids = [
        score_id("tr-1", one, "check"),
        score_id("tr-1", one, "check", nth=1),
        score_id("tr-2", one, "check"),
        score_id("tr-1", live(other), "check"),
        score_id("tr-1", LiveScorer(one.scorer, "v2", one.rule), "check"),
        score_id("tr-1", one, "tone"),
    ]
    assert len(set(ids)) == 6
    assert all(len(each) <= 50 for each in ids)
    assert (
        score_id("tr-1", returning(None, share=0.1), "check") == ids[0] == "a-2a85c9d6c4d051ae30657625e768360482b396a5"
    )


def test_share(turn):
    """A scorer draws its share of subjects, always the same ones, independent of what another scorer draws."""

    def other(trace):
        return None

    facts, subjects = TraceFacts([turn]), [f"tr-{number}" for number in range(10_000)]

    def drawn(each):
        return {subject for subject in subjects if select([each], b"key", facts, subject).in_code}

    one, two = returning(None, share=0.5), live(other, share=0.5)
    first, second = drawn(one), drawn(two)
    assert first == drawn(one)
    assert abs(len(first) - 5_000) < 250
    assert abs(len(first & second) - 2_500) < 250
    assert drawn(returning(None, share=1.0)) == set(subjects)
    assert drawn(returning(None, share=0.0)) == set()


def test_agents_of_a_rule(turn):
    """A scorer with a list of agents scores no other's runs, and says nothing of them; an empty list is nobody."""
    facts = TraceFacts([turn])
    agent = facts.agent

    def selected(agents):
        return select([returning(None, agents=agents)], b"key", facts, "tr-1")

    assert [each.live.name for each in selected([agent]).in_code] == ["check"]
    assert selected(["another"]) == selected([]) == ([], [], {})


@pytest.mark.parametrize("value", [math.nan, math.inf, "a text that the rule below cannot compare"])
def test_a_value_that_cannot_be_judged_or_stored_is_a_failure(turn, value) -> None:
    """A value that is no JSON, or that the scorer's own rule chokes on, becomes a failed score, not an exception."""

    @scorer(pass_if=lambda given: given >= 0.8)
    def odd(trace):
        return value

    [score] = score_trace(LiveScorer(odd, "v1", ScorerRule()), turn, "math")
    assert (score.value, score.passed) == (None, None)
    assert score.error
