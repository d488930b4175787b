"""The whole journey over HTTP: answered, traced, scored by code and by judges, collected, shown."""

import json
import signal
from typing import Any

from .conftest import Gateway, Judge, eventually

TRACE_JUDGES = {"tool_call_correctness", "tool_call_efficiency"}
CONVERSATION_JUDGES = {"user_frustration", "conversation_completeness", "knowledge_retention"}
TOOL_SCORERS = {"no_tool_errors", "valid_tool_arguments", "no_redundant_calls"}


def all_scored(gateway: Gateway, trace_ids: list[str], expected: set[str]) -> dict[str, dict[str, list[Any]]] | None:
    """Return the assessments of the traces once each has the expected ones."""
    found: dict[str, dict[str, list[Any]]] = {}
    for trace_id in reversed(trace_ids):  # the last one is scored last: while it is not, the others are not asked for
        found[trace_id] = gateway.assessments(trace_id)
        if not expected <= set(found[trace_id]):
            return None
    return found


def test_the_whole_journey(gateway: Gateway, judge: Judge) -> None:
    """A good conversation passes every scorer; a bad one fails some and is in the dataset; both are on the page."""
    good = gateway.converse("What is the status of order A-1001?", "And of A-1002?")
    [bad] = gateway.converse("Do you offer gift wrapping? I am ann@example.com.")

    scored = eventually(lambda: all_scored(gateway, [good[1]["trace_id"]], TOOL_SCORERS | TRACE_JUDGES))
    assert scored[good[1]["trace_id"]]["tool_call_correctness"] == ["yes"]
    first = eventually(
        lambda: all_scored(gateway, [good[0]["trace_id"]], CONVERSATION_JUDGES | {"no_repeated_question"})
    )[good[0]["trace_id"]]
    assert first["user_frustration"] == ["none"]
    assert first["no_repeated_question"] == [True]

    expected = TOOL_SCORERS | TRACE_JUDGES | CONVERSATION_JUDGES | {"answer_uses_tool_result", "no_empty_answer"}
    verdicts = eventually(lambda: all_scored(gateway, [bad["trace_id"]], expected))[bad["trace_id"]]
    failed = {name for name, values in verdicts.items() if values[0] in (False, "no", "unresolved")}
    assert failed == expected - {"no_tool_errors", "valid_tool_arguments"}
    assert all(len(values) == 1 for values in verdicts.values())

    def collected() -> list[dict[str, Any]]:
        rows = [row for row in gateway.dataset() if row["tags"]["trace_id"] == bad["trace_id"]]
        return rows if rows and set(rows[0]["tags"]["scorers"].split(", ")) == failed else []

    [row] = eventually(collected)
    assert "ann@example.com" not in json.dumps(row)
    assert not [row for row in gateway.dataset() if row["tags"]["trace_id"] in {each["trace_id"] for each in good}]

    quality = gateway.api.get("/v1/quality").json()
    named = [each for each in quality["hour"]["scorers"] if each["scorer"] == "tool_call_correctness"]
    assert [(each["agent"], each["passed"], each["failed"]) for each in named] == [("support", 2, 1)]
    links = {each["trace_id"]: each["mlflow_url"] for each in quality["failures"]}
    assert links[bad["trace_id"]].startswith(f"{gateway.mlflow.base_url}/#/experiments/")
    page = gateway.api.get("/ops").text
    assert bad["trace_id"] in page
    assert "tool_call_correctness" in page

    prompts = [json.dumps(request["messages"]) for request in judge.requests]
    assert not [prompt for prompt in prompts if "ann@example.com" in prompt]
    assert [prompt for prompt in prompts if "<EMAIL:" in prompt and "search_return_policy" in prompt]


def test_a_killed_evaluator_loses_and_doubles_no_score(gateway: Gateway) -> None:
    """The evaluator is killed in the middle of the work; when it is back, every run has each of its scores once."""
    killed = gateway.evaluator()
    assert killed is not None
    answers = []
    for number in range(30):
        answers += gateway.converse(f"What is {number} plus {number}?", f"And times {number}?", agent="math")
        if number == 15:
            killed.send_signal(signal.SIGKILL)
    eventually(lambda: gateway.evaluator() not in {None, killed})
    trace_ids = [answer["trace_id"] for answer in answers]
    expected = TOOL_SCORERS | TRACE_JUDGES
    verdicts = eventually(lambda: all_scored(gateway, trace_ids, expected), within_s=120)
    firsts = eventually(lambda: all_scored(gateway, trace_ids[::2], CONVERSATION_JUDGES), within_s=120)
    assert [values for each in (verdicts | firsts).values() for values in each.values() if len(values) != 1] == []
    eventually(lambda: "pending" not in gateway.states())
