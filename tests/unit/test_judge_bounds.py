"""What one judge call may hold: what fits passes as it is, what does not is shortened, and that is said."""

import json

import pytest
from mlflow.genai.scorers import (
    ConversationalSafety,
    ConversationalToolCallEfficiency,
    RetrievalRelevance,
    Safety,
    ToolCallCorrectness,
)
from mlflow.genai.utils.trace_utils import (
    extract_available_tools_from_trace,
    extract_tools_called_from_trace,
    resolve_conversation_from_session,
)

from gateway.evaluation.bounds import Bounds, bounded_session, shown_trace, shrink, spans_read
from gateway.evaluation.definitions import with_definitions


@pytest.mark.parametrize(
    "value",
    [
        "x" * 5_000,
        {"a": "x" * 5_000, "b": "short", "c": ["y" * 3_000]},
        [{"role": "user", "content": "z" * 500} for _ in range(100)],
        list(range(5_000)),
        {"deep": {"deeper": ["w" * 4_000, {"deepest": "v" * 4_000}]}},
        "é\n" * 3_000,
    ],
)
@pytest.mark.parametrize("most", [400, 1_000, 3_000])
def test_shrunk_values_fit(value, most) -> None:
    """Whatever its form, a value is cut to about the size, keeps its form, and says that something is missing."""
    found = shrink(value, most)
    text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
    assert len(text) <= most * 1.3
    assert "left out here" in text
    assert type(found) is type(value)


def test_what_fits_is_the_same(traces) -> None:
    """A value, a trace or a conversation that fits is passed on as the very object that it is."""
    value = {"a": [1, "two"]}
    assert shrink(value, 100) is value
    turns = traces.conversation(("1 + 1?", "2"), ("and 2 more?", "4"))
    shown, left_out = bounded_session(turns, spans_read(ConversationalSafety()), 1_000)
    assert ([one is other for one, other in zip(shown, turns, strict=True)], left_out) == ([True, True], None)
    assert shown_trace(Safety(), turns[0], Bounds()) == (turns[0], None)


def test_short_parts_stay_whole() -> None:
    """Only what is long is cut: a short argument beside a long text stays as it is."""
    found = shrink({"order_id": "A-1", "note": "x" * 5_000}, 500)
    assert found["order_id"] == "A-1"
    assert found["note"].startswith("xxx")
    assert found["note"].endswith("xxx")


def test_messages_stay_messages() -> None:
    """Where messages are left out stands a message, since judges read the role and the content of each."""
    messages = [{"role": "user", "content": f"message {number} {'x' * 300}"} for number in range(50)]
    found = shrink({"messages": messages}, 2_000)["messages"]
    assert all(set(message) == {"role", "content"} for message in found)
    assert found[0]["content"].startswith("message 0 ")
    assert found[-1]["content"].endswith("x")


def test_a_long_result_of_a_tool(traces) -> None:
    """A judge of tool calls is shown long results in short; the stored trace stays as it is."""
    call = traces.Call("export", {"table": "orders"}, {"rows": ["x" * 100] * 1_000})
    trace = traces.trace("Export it.", "Done.", call, tools=[traces.tool("export")])
    shown, left_out = shown_trace(ToolCallCorrectness(), trace, Bounds(call_characters=5_000))
    [called] = extract_tools_called_from_trace(shown)
    assert called.arguments == {"table": "orders"}
    assert len(json.dumps(called.outputs)) < 5_000
    assert left_out == "texts shortened to 5000 characters"
    [stored] = extract_tools_called_from_trace(trace)
    assert len(stored.outputs["rows"]) == 1_000
    assert shown.data.spans[0].name == trace.data.spans[0].name
    # A judge of the answer does not read them, so nothing is left out for it.
    assert shown_trace(Safety(), trace, Bounds(call_characters=5_000)) == (trace, None)


def test_the_first_documents(traces) -> None:
    """Each document costs a call of the judge, so it is shown the first ones only, and the score says so."""
    call = traces.Call("search", {}, [], documents=[f"text {number}" for number in range(9)])
    trace = traces.trace("Find it.", "Found.", call)
    shown, left_out = shown_trace(RetrievalRelevance(), trace, Bounds(documents=4))
    [retrieval] = shown.search_spans(span_type="RETRIEVER")
    assert [each["page_content"] for each in retrieval.outputs] == ["text 0", "text 1", "text 2", "text 3"]
    assert left_out == "5 documents left out"


def test_a_long_conversation(traces) -> None:
    """The first turn and the last ones stay, in order, and in between stands how many turns are missing."""
    turns = traces.conversation(*((f"question {number} {'x' * 80}", f"answer {number}") for number in range(30)))
    shown, left_out = bounded_session(list(reversed(turns)), spans_read(ConversationalSafety()), 2_000)
    said = [message["content"] for message in resolve_conversation_from_session(shown)]
    assert said[:2] == [f"question 0 {'x' * 80}", "answer 0"]
    assert said[-2:] == [f"question 29 {'x' * 80}", "answer 29"]
    missing = 30 - (len(said) - 1) // 2
    assert said[2] == f"[{missing} turns of this conversation are left out here, since it is too long]"
    assert left_out == f"{missing} of 30 turns left out"
    assert 0 < missing < 29
    assert sum(map(len, said)) <= 2_000


def test_one_giant_turn(traces) -> None:
    """A turn that is too long by itself is shortened, and pushes the others out no further than a quarter would."""
    call = traces.Call("export", {}, "y" * 50_000)
    turns = traces.conversation(("begin", "yes"), ("more", "x" * 50_000, call), ("end", "bye"))
    shown, left_out = bounded_session(turns, spans_read(ConversationalToolCallEfficiency()), 4_000)
    said = resolve_conversation_from_session(shown, include_tool_calls=True)
    assert [message["role"] for message in said] == [
        "user",
        "assistant",
        "user",
        "tool",
        "assistant",
        "user",
        "assistant",
    ]
    assert sum(len(message["content"]) for message in said) < 2_000
    assert left_out == "1 turns shortened"


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object"},
        {"type": "object", "properties": {"order_id": {"type": "string"}}, "additionalProperties": {"type": "string"}},
        {"type": "object", "properties": {"order_id": True, "kind": {"enum": [None, "a"]}}},
        None,
    ],
)
def test_definitions_that_mlflow_refuses(traces, parameters) -> None:
    """A tool whose schema MLflow leaves out is shown with what there is to show; the others stay as they are."""
    odd = {"type": "function", "function": {"name": "odd", "description": "It is odd.", "parameters": parameters}}
    plain = traces.tool("plain", required=["a"], a={"type": "integer", "description": "a number"})
    trace = with_definitions(traces.trace("Go.", "Gone.", traces.Call("odd", {}, 1), tools=[odd, plain]))
    found = {tool.function.name: tool.function for tool in extract_available_tools_from_trace(trace)}
    assert set(found) == {"odd", "plain"}
    assert found["odd"].description == "It is odd."
    assert found["plain"].parameters.properties["a"].type == "integer"


def test_no_definitions(traces) -> None:
    """Where a trace has no definitions, the tools that were called stand for them, and no model has to guess."""
    bare = traces.trace("Go.", "Gone.", traces.Call("one", {}, 1), traces.Call("two", {}, 2), traces.Call("one", {}, 1))
    assert [tool.function.name for tool in extract_available_tools_from_trace(with_definitions(bare))] == ["one", "two"]
    defined = traces.trace("Go.", "Gone.", traces.Call("one", {}, 1), tools=[traces.tool("one")])
    assert with_definitions(defined) is defined
