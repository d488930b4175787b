"""`KnowledgeRetention` on long conversations, with a judge in plain code."""

from typing import Any

import pytest
from mlflow.entities import Feedback
from mlflow.genai.scorers import KnowledgeRetention, scorer

from gateway.evaluation.bounds import Bounds
from gateway.evaluation.retention import Earlier, judge_retention
from gateway.evaluation.values import Nonsense

BOUNDS = Bounds(retention_turns=20)


@pytest.fixture
def asked() -> list[int]:
    """How many turns each call was given."""
    return []


@pytest.fixture
def retention(asked, monkeypatch) -> KnowledgeRetention:
    """The built-in, whose judge finds that the turns that say so have forgotten something."""
    monkeypatch.setenv("MLFLOW_GENAI_JUDGE_DEFAULT_MODEL", "openai:/judge-1")

    @scorer(name="last_turn")
    def last_turn(session: list[Any]) -> Feedback:
        asked.append(len(session))
        answer = session[-1].data.spans[0].outputs["messages"][-1]["content"]
        metadata = {"mlflow.assessment.judgeCost": 0.5, "mlflow.assessment.judgeInputTokens": 7}
        value = {"forgot": "no", "odd": "perhaps"}.get(answer, "yes")
        return Feedback(value=value, rationale=answer, metadata=metadata)

    return KnowledgeRetention(last_turn_scorer=last_turn)


def talk(traces, *answers: str) -> list[Any]:
    """Return a conversation with these answers."""
    return traces.conversation(*((f"question {number}", answer) for number, answer in enumerate(answers)))


def test_a_short_conversation(traces, retention, asked) -> None:
    """Every turn is asked about with all before it; one that forgot is enough for a no, and the costs are summed."""
    found = judge_retention(retention, talk(traces, "ok", "forgot", "ok"), BOUNDS)
    assert asked == [1, 2, 3]
    assert (found.value, found.name) == ("no", "knowledge_retention")
    assert found.rationale.splitlines() == ["Turn 1: yes. ok", "Turn 2: no. forgot", "Turn 3: yes. ok"]
    assert (found.source.source_type, found.source.source_id) == ("LLM_JUDGE", "openai:/judge-1")
    assert found.metadata["mlflow.assessment.judgeCost"] == 1.5
    assert found.metadata["mlflow.assessment.judgeInputTokens"] == 21
    assert "gateway.shortened" not in found.metadata
    assert judge_retention(retention, talk(traces, "ok", "ok"), BOUNDS).value == "yes"


@pytest.mark.parametrize(
    ("forgot", "last", "value"), [(True, "ok", "no"), (False, "ok", "yes"), (False, "forgot", "no")]
)
def test_a_conversation_that_goes_on(traces, retention, asked, forgot, last, value) -> None:
    """What was judged before is not asked again, and stays part of the verdict."""
    turns = talk(traces, "ok", "ok", "ok", last)
    found = judge_retention(retention, turns, BOUNDS, Earlier(turns[2].info.trace_id, forgot))
    assert (asked, found.value) == ([4], value)
    assert found.metadata["gateway.judged_until"] == turns[3].info.trace_id


def test_earlier_turns_that_are_gone(traces, retention, asked) -> None:
    """If the last turn that was judged was erased, nothing of what was said before counts."""
    found = judge_retention(retention, talk(traces, "ok", "ok"), BOUNDS, Earlier("tr-gone", forgot=True))
    assert (asked, found.value) == ([1, 2], "yes")


def test_the_cost_of_a_conversation_grows_with_its_turns(traces, retention, asked) -> None:
    """Scored again after each turn, a conversation costs one call a turn, where MLflow takes their square."""
    turns = talk(traces, *["ok"] * 40)
    earlier = None
    for length in range(1, 41):
        found = judge_retention(retention, turns[:length], BOUNDS, earlier)
        earlier = Earlier(found.metadata["gateway.judged_until"], found.value == "no")
    assert asked == list(range(1, 41))


def test_many_turns_at_once(traces, retention, asked) -> None:
    """Of many new turns the newest are asked about, and the score says which are not."""
    found = judge_retention(retention, talk(traces, "forgot", *["ok"] * 49), BOUNDS)
    assert asked == list(range(31, 51))
    assert found.value == "yes"  # the first one was not looked at
    assert found.metadata["gateway.shortened"] == "turns 1 to 30 of 50 not judged"
    assert found.rationale.splitlines()[0] == "turns 1 to 30 of 50 not judged"


def test_nonsense(traces, retention) -> None:
    """MLflow takes whatever is no "no" for a yes; here it is a failure."""
    with pytest.raises(Nonsense, match="perhaps"):
        judge_retention(retention, talk(traces, "ok", "odd"), BOUNDS)
