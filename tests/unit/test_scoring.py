"""Scores: verdicts, ids, failures as values, and which scorers run live."""

import math
import sys
from textwrap import dedent

import pytest
from mlflow.entities import AssessmentError, AssessmentSource, Feedback
from mlflow.genai.scorers import scorer

from gateway.errors import ConfigurationError
from gateway.evaluation.scoring import LiveScorer, load_scorers, passed, score_conversation, score_id, score_trace
from gateway.settings import ScorerRule, Settings


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
    """A list gives one score each, with ids of their own; of equal names the last one counts."""
    feedbacks = [
        Feedback(name="tone", value="no"),
        Feedback(name="length", value=12),
        Feedback(name="tone", value="yes"),
    ]
    scores = score_trace(returning(feedbacks), turn, "math")
    assert {score.name: (score.value, score.passed) for score in scores} == {
        "tone": ("yes", True),
        "length": (12, None),
    }
    assert len({score.score_id for score in scores}) == 2
    assert {score.scorer for score in scores} == {"check"}


def test_feedback_details(turn):
    """Rationale, source and metadata of a feedback are kept."""
    source = AssessmentSource(source_type="LLM_JUDGE", source_id="a-model")
    feedback = Feedback(name="tone", value="no", rationale="rude", source=source, metadata={"cost": 0.5})
    (score,) = score_trace(returning(feedback), turn, "math")
    assert (score.rationale, score.source_type, score.source_id) == ("rude", "LLM_JUDGE", "a-model")
    assert score.details == {"cost": "0.5"}


@pytest.mark.parametrize("error", [ValueError("no such field"), KeyError("x"), RuntimeError()])
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


def test_conversation(traces):
    """A conversation's score belongs on its first trace, names its session, and counts its turns."""

    @scorer
    def length(session):
        return len(session)

    turns = traces.conversation(("1 + 1?", "2"), ("and 2 more?", "4"))
    each = LiveScorer(length, "v1", ScorerRule(pass_at_least=2))
    (score,) = score_conversation(each, turns, "s-1", "math")
    (longer,) = score_conversation(each, [*turns, turns[1]], "s-1", "math")

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
        score_id("tr-2", one, "check"),
        score_id("tr-1", live(other), "check"),
        score_id("tr-1", LiveScorer(one.scorer, "v2", one.rule), "check"),
        score_id("tr-1", one, "tone"),
    ]
    assert len(set(ids)) == 5
    assert all(len(each) <= 50 for each in ids)
    assert (
        score_id("tr-1", returning(None, share=0.1), "check") == ids[0] == "a-2a85c9d6c4d051ae30657625e768360482b396a5"
    )


def test_share():
    """A scorer draws its share of subjects, always the same ones, independent of what another scorer draws."""

    def other(trace):
        return None

    subjects = [f"tr-{number}" for number in range(10_000)]
    one, two = returning(None, share=0.5), live(other, share=0.5)
    first = {subject for subject in subjects if one.draws(b"key", "math", subject)}
    second = {subject for subject in subjects if two.draws(b"key", "math", subject)}
    assert first == {subject for subject in subjects if one.draws(b"key", "math", subject)}
    assert abs(len(first) - 5_000) < 250
    assert abs(len(first & second) - 2_500) < 250
    everything, nothing = returning(None, share=1.0), returning(None, share=0.0)
    assert all(everything.draws(b"key", "math", subject) for subject in subjects)
    assert not any(nothing.draws(b"key", "math", subject) for subject in subjects)


def test_agents_of_a_rule():
    """A scorer with a list of agents scores no other's runs; an empty list is nobody."""
    assert returning(None, agents=["math"]).draws(b"key", "math", "tr-1")
    assert not returning(None, agents=["math"]).draws(b"key", "support", "tr-1")
    assert not returning(None, agents=[]).draws(b"key", "math", "tr-1")


PLAIN = "from mlflow.genai.scorers import scorer\n\n@scorer\ndef {name}(trace):\n    return True\n"
JUDGE = "from mlflow.genai.scorers import Safety, scorer\nsafety = Safety()\n"


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """Write scorer files, and load them with some settings, anew each time."""
    monkeypatch.delenv("GATEWAY_CONFIG", raising=False)
    monkeypatch.chdir(tmp_path)  # away from the project's own gateway.toml
    folder = tmp_path / "scorers"
    folder.mkdir()

    def load(files=None, **settings):
        for name, text in (files or {}).items():
            (folder / f"{name}.py").write_text(dedent(text))
        for name in [name for name in sys.modules if name.startswith("scorer_plugins")]:
            monkeypatch.delitem(sys.modules, name)
        return {each.name: each for each in load_scorers(Settings(scorers_dir=folder, **settings))}

    return load


def test_load(loaded):
    """Every scorer of every file runs live by default; a rule that says otherwise is followed."""
    files = {"one": PLAIN.format(name="a") + PLAIN.format(name="b"), "two": PLAIN.format(name="c")}
    found = loaded(files, scorers={"b": {"enabled": False}, "c": {"share": 0.5}})
    assert set(found) == {"a", "c"}
    assert found["a"].rule == ScorerRule()
    assert found["c"].rule.share == 0.5
    assert found["a"].version != found["c"].version


def test_judges_need_a_model(loaded):
    """Judges are left out without a judge model, whose name is part of every version."""
    files = {"one": PLAIN.format(name="a"), "judges": JUDGE}
    without, one, other = (loaded(files, judge_model=model) for model in (None, "openai:/one", "openai:/two"))
    assert set(without) == {"a"}
    assert set(one) == {"a", "safety"}
    assert one["safety"].is_judge
    assert not one["a"].is_judge
    assert one["safety"].version != other["safety"].version


def test_version_follows_the_helpers(loaded):
    """A scorer's version follows its own file and the folder's helpers, not the other scorers."""
    before = loaded({"one": PLAIN.format(name="a"), "_shared": "X = 1\n"})["a"].version
    assert loaded({"two": PLAIN.format(name="b")})["a"].version == before
    assert loaded({"_shared": "X = 2\n"})["a"].version != before


def test_rule_for_an_unknown_scorer(loaded):
    """A rule that names no scorer is refused by name: it is most likely misspelled."""
    with pytest.raises(ConfigurationError, match=r"rules for aa, but .* it holds a\."):
        loaded({"one": PLAIN.format(name="a")}, scorers={"aa": {}})


def test_rule_for_a_judge_without_a_model(loaded):
    """A rule for a judge may stay while no judge model is set."""
    assert set(loaded({"judges": JUDGE}, scorers={"safety": {"share": 0.1}})) == set()


def test_two_scorers_of_one_name(loaded):
    """Two scorers of one name are refused, with the file."""
    with pytest.raises(ConfigurationError, match=r"two\.py: another file has a scorer named a already"):
        loaded({"one": PLAIN.format(name="a"), "two": PLAIN.format(name="a")})


def test_scorer_that_another_file_imports(loaded):
    """A scorer that a second file imports is still one scorer, with its own file's version."""
    alone = loaded({"one": PLAIN.format(name="a")})["a"].version
    found = loaded({"two": "from .one import a\n" + PLAIN.format(name="b")})
    assert set(found) == {"a", "b"}
    assert found["a"].version == alone


def test_no_folder(tmp_path):
    """A missing folder is named, with the ways out."""
    with pytest.raises(ConfigurationError, match=r"no scorers folder .*GATEWAY_SCORERS_DIR"):
        load_scorers(Settings(scorers_dir=tmp_path / "nowhere"))


@pytest.mark.parametrize("value", [math.nan, math.inf, "a text that the rule below cannot compare"])
def test_a_value_that_cannot_be_judged_or_stored_is_a_failure(turn, value) -> None:
    """A value that is no JSON, or that the scorer's own rule chokes on, becomes a failed score, not an exception."""

    @scorer(pass_if=lambda given: given >= 0.8)
    def odd(trace):
        return value

    [score] = score_trace(LiveScorer(odd, "v1", ScorerRule()), turn, "math")
    assert (score.value, score.passed) == (None, None)
    assert score.error
