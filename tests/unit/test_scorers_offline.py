"""The scorers that are of use offline: `exact_match`, and MLflow's judges, which must load without a model."""

import inspect
import socket

import pytest
from mlflow.genai.scorers import Scorer

JUDGES = {
    "conversation_completeness": True,
    "knowledge_retention": True,
    "tool_call_correctness": False,
    "tool_call_efficiency": False,
    "user_frustration": True,
}


@pytest.fixture
def matches(shipped_scorers):
    """Score `exact_match` as MLflow calls it."""

    def score(outputs, expectations):
        feedback = shipped_scorers("exact_match").exact_match.run(outputs=outputs, expectations=expectations)
        return None if feedback is None else feedback.value

    return score


@pytest.mark.parametrize(
    "outputs",
    [
        "42",
        " 42\n",
        {"messages": [{"role": "user", "content": "6 * 7?"}, {"role": "assistant", "content": "42"}]},
        {"output": [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "42"}]}]},
        {"choices": [{"message": {"role": "assistant", "content": "42"}}]},
    ],
)
def test_exact_match(matches, outputs):
    """The answer is read from each form that an agent's output takes."""
    assert matches(outputs, {"expected_response": "42 "}) is True
    assert matches(outputs, {"expected_response": "43"}) is False


@pytest.mark.parametrize("outputs", [None, {}, {"messages": []}, {"messages": [{"role": "user", "content": "42"}]}, 42])
def test_exact_match_without_answer(matches, outputs):
    """A run without an answer does not match."""
    assert matches(outputs, {"expected_response": "42"}) is False


@pytest.mark.parametrize("expectations", [None, {}, {"expected_facts": ["42"]}, {"expected_response": None}])
def test_exact_match_without_expectation(matches, expectations):
    """Live traffic has no expectation, and is not judged."""
    assert matches("42", expectations) is None


def test_judges(shipped_scorers, monkeypatch):
    """The judges load without key, model or network, under these names, for a turn or a session."""

    def refuse(*_args, **_kwargs):
        raise AssertionError("a judge opened a connection while it was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    for name in ("OPENAI_API_KEY", "MLFLOW_GENAI_JUDGE_DEFAULT_MODEL"):
        monkeypatch.delenv(name, raising=False)
    judges = [value for _, value in inspect.getmembers(shipped_scorers("judges")) if isinstance(value, Scorer)]
    assert {judge.name: judge.is_session_level_scorer for judge in judges} == JUDGES
    assert all(getattr(shipped_scorers("judges"), judge.name) is judge for judge in judges)
    assert all(judge.model is None for judge in judges)


def test_level(shipped_scorers):
    """Each scorer is called like the name it is defined by, and reads a turn or a session as its file says."""
    levels = {}
    for stem in ("tool_calls", "results", "answers", "conversation", "outcomes", "exact_match"):
        for name, value in inspect.getmembers(shipped_scorers(stem)):
            if isinstance(value, Scorer):
                assert value.name == name
                levels[name] = value.is_session_level_scorer
    assert {name for name, of_session in levels.items() if of_session} == {
        "errors_resolved",
        "makes_progress",
        "no_broken_promise",
        "no_frustration",
        "no_information_asked_twice",
        "no_repeated_question",
        "no_rephrased_question",
    }
    assert len(levels) == 17
