"""Rules of scorers: what they may say, what a mistake in one is told, and which traces their filters let through."""

import os
from pathlib import Path

import pytest
from mlflow.entities import TraceState
from mlflow.genai.scorers import scorer

from gateway.errors import ConfigurationError
from gateway.evaluation.filters import TraceFacts
from gateway.evaluation.scoring import LiveScorer
from gateway.rules import ScorerFilter, ScorerRule
from gateway.settings import load_settings


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Return what is said about a `gateway.toml`, without the headline."""
    path = tmp_path / "gateway.toml"
    monkeypatch.setenv("GATEWAY_CONFIG", str(path))

    def read(text: str) -> str:
        path.write_text(text)
        with pytest.raises(ConfigurationError) as caught:
            load_settings()
        return str(caught.value).partition("\n")[2].replace(f"{tmp_path}{os.sep}", "")

    return read


@pytest.mark.parametrize(
    ("rule", "line", "said"),
    [
        ("share = 2", 3, "[scorers.tone] share: Input should be less than or equal to 1"),
        ("\n\nfilter = { status = 'odd' }", 5, "[scorers.tone] filter status: Input should be 'ok' or 'error'"),
        ("judge_model = 'gpt-4o'", 3, "[scorers.tone] judge_model: String should match"),
        ("filter = { slower_than_s = 5, faster_than_s = 2 }", 3, "no run takes 5 s or more and less than 2 s"),
        ("filter = { tools = [] }", 3, "[scorers.tone] filter tools: List should have at least 1 item"),
        ("filter = { tags = { beta = true } }", 3, "[scorers.tone] filter tags beta: Input should be a valid string"),
        ("filters = {}", 3, "[scorers.tone] filters: Extra inputs are not permitted"),
    ],
)
def test_a_mistake_names_its_line(refused, rule: str, line: int, said: str) -> None:
    """A rule that is not valid is told with its file, its line and its key."""
    text = refused(f"port = 8100\n[scorers.tone]\n{rule}\n[scorers.other]\nshare = 0.5\n")
    assert said in text
    assert text.endswith(f"(gateway.toml, line {line})")


def test_what_the_environment_says_is_not_blamed_on_the_file(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that the environment overrides is told without a line of the file."""
    monkeypatch.setenv("GATEWAY_SCORERS", '{"tone": {"share": 7}}')
    assert "line" not in refused("[scorers.tone]\nshare = 0.5\n")


def facts(traces, *turns, **info) -> TraceFacts:
    """Return the facts of a conversation."""
    made = traces.conversation(*turns)
    for trace in made:
        for name, value in info.items():
            setattr(trace.info, name, value)
    return TraceFacts(made)


def why_not(given: TraceFacts, **rule) -> str | None:
    @scorer
    def check(trace):
        return True

    return LiveScorer(check, "v1", ScorerRule(**rule)).applies(given)


def test_a_rule_without_a_filter_lets_everything_through(traces) -> None:
    """By default a scorer is for every trace."""
    assert why_not(facts(traces, ("Hello", None))) is None


@pytest.mark.parametrize(("answer", "status"), [("Hi", "ok"), (None, "error")])
def test_status(traces, answer: str | None, status: str) -> None:
    """A scorer for failed runs leaves the answered ones out, and the other way around."""
    given = facts(traces, ("Hello", answer))
    assert why_not(given, filter={"status": status}) is None
    assert why_not(given, filter={"status": "ok" if status == "error" else "error"}) == "status"


def test_tags(traces) -> None:
    """All tags of a filter must be there, with their values."""
    given = facts(traces, ("Hello", "Hi"), tags={"channel": "app", "beta": "yes"})
    assert why_not(given, filter={"tags": {"channel": "app"}}) is None
    assert why_not(given, filter={"tags": {"channel": "app", "beta": "yes"}}) is None
    assert why_not(given, filter={"tags": {"channel": "app", "beta": "no"}}) == "tag"
    assert why_not(given, filter={"tags": {"market": "eu"}}) == "tag"


def test_tools(traces) -> None:
    """One of the tools must have been called; patterns stand for several."""
    given = facts(traces, ("Refund 1", "Done", traces.Call("refund_order", {"order": "1"}, "ok")))
    assert why_not(given, filter={"tools": ["lookup", "refund_order"]}) is None
    assert why_not(given, filter={"tools": ["refund_*"]}) is None
    assert why_not(given, filter={"tools": ["refund"]}) == "tool"
    assert why_not(facts(traces, ("Hello", "Hi")), filter={"tools": ["*"]}) == "tool"


def test_latency(traces) -> None:
    """The bounds meet: each duration is within exactly one of two filters that share a bound."""
    for took_ms, slow in ((1999, False), (2000, True), (None, False)):
        given = facts(traces, ("Hello", "Hi"), execution_duration=took_ms)
        assert (why_not(given, filter={"slower_than_s": 2}) is None) == slow
        assert (why_not(given, filter={"faster_than_s": 2}) is None) != slow


def test_agents(traces) -> None:
    """A scorer of some agents is for none of the others."""
    given = facts(traces, ("Hello", "Hi"), trace_metadata={"gateway.agent": "math"})
    assert why_not(given, agents=["math", "support"]) is None
    assert why_not(given, agents=["support"]) == "agent"
    assert why_not(given, agents=[]) == "agent"


def test_a_conversation_counts_as_its_turns(traces) -> None:
    """One failed turn, one slow turn, one call or one tag is the whole conversation's."""
    made = traces.conversation(("Refund 1", "Done", traces.Call("refund", {}, "ok")), ("And 2", None), ("Bye", "Bye"))
    made[0].info.tags = {"channel": "app"}
    made[1].info.execution_duration = 5000
    given = TraceFacts(made)
    whole = ScorerFilter(status="error", tags={"channel": "app"}, tools=["refund"], slower_than_s=5)
    assert [trace.info.state for trace in made] == [TraceState.OK, TraceState.ERROR, TraceState.OK]
    assert why_not(given, filter=whole.model_dump()) is None
    assert why_not(given, filter={"faster_than_s": 5}) == "latency"
