"""The offline model: what a decider sees, and what the SDK gets to see of its decisions."""

import time
from typing import Any

import pytest
from agents import Agent, ModelSettings, ModelTracing, RunConfig, Runner, function_tool
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage

from gateway.runs.offline import Call, OfflineModel, ToolResult, View

NO_TRACING = RunConfig(tracing_disabled=True)

TOOL_CALL_HISTORY: list[Any] = [
    {"role": "user", "content": "first"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "one"}]},
    {"role": "user", "content": [{"type": "input_text", "text": "sec"}, {"type": "input_text", "text": "ond"}]},
    {"type": "function_call", "call_id": "c1", "name": "find", "arguments": '{"q": "x"}'},
    {"type": "function_call_output", "call_id": "c1", "output": "{'hits': [1, 2]}"},
    {"type": "function_call", "call_id": "c2", "name": "find", "arguments": "{broken"},
    {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "plain words"}]},
]


@function_tool
async def shout(text: str) -> str:
    """Return the text in capitals."""
    return text.upper()


def shouting(view: View) -> str | Call | list[Call]:
    """Shout each word of the user's message with a call of its own, then say them all."""
    results = view.tool_results_this_turn
    if not results:
        return [Call("shout", text=word) for word in view.last_user.split()]
    return " ".join(result.output for result in results)


async def events_of(model: OfflineModel, model_input: str | list[Any]) -> list[Any]:
    """Stream one answer and collect its events."""
    stream = model.stream_response(
        "instructions",
        model_input,
        ModelSettings(),
        [],
        None,
        [],
        ModelTracing.DISABLED,
        previous_response_id=None,
        conversation_id=None,
        prompt=None,
    )
    return [event async for event in stream]


async def response_of(model: OfflineModel, model_input: str | list[Any], instructions: str | None = None) -> Any:
    """Ask for one answer in one piece."""
    return await model.get_response(
        instructions,
        model_input,
        ModelSettings(),
        [],
        None,
        [],
        ModelTracing.DISABLED,
        previous_response_id=None,
        conversation_id=None,
        prompt=None,
    )


def test_view_of_a_text() -> None:
    """A bare text is one user message."""
    view = View.of("hello")

    assert (view.last_user, view.user_texts, view.tool_results_this_turn) == ("hello", ["hello"], [])


def test_view_of_items() -> None:
    """Messages in either notation and finished tool calls are read from the Responses items."""
    view = View.of(TOOL_CALL_HISTORY)

    assert view.user_texts == ["first", "second"]
    assert view.assistant_texts == ["one"]
    assert view.tool_results_this_turn == [
        ToolResult("find", {"q": "x"}, "{'hits': [1, 2]}"),
        ToolResult("find", {}, "plain words"),
    ]
    assert list(view.history) == TOOL_CALL_HISTORY


def test_view_starts_over_with_each_user_message() -> None:
    """Tool results from before the last user message do not count for this turn."""
    view = View.of([*TOOL_CALL_HISTORY, {"role": "user", "content": "third"}])

    assert (view.last_user, view.tool_results_this_turn) == ("third", [])


def test_view_of_nothing() -> None:
    """An empty input has no last user message, and is no error."""
    assert View.of([]).last_user == ""


@pytest.mark.parametrize(
    ("output", "value"),
    [("{'a': None}", {"a": None}), ('{"a": null}', {"a": None}), ("36.0", 36.0), ("Error: no", "Error: no")],
)
def test_tool_result_as_data(output: str, value: object) -> None:
    """A tool's output is read as JSON, then as Python data, and else stays text."""
    assert ToolResult("any", {}, output).value() == value


async def test_a_text_becomes_a_message() -> None:
    """A decision to say something is one assistant message."""
    response = await response_of(OfflineModel(lambda view: f"you said {view.last_user}"), "hi")

    (message,) = response.output
    assert isinstance(message, ResponseOutputMessage)
    assert [part.to_dict()["text"] for part in message.content] == ["you said hi"]


async def test_call_ids_never_repeat() -> None:
    """Two equal decisions give tool calls with different call ids."""
    model = OfflineModel(lambda _view: [Call("shout", text="a"), Call("shout", text="a")])

    calls = [*(await response_of(model, "x")).output, *(await response_of(model, "x")).output]

    assert all(isinstance(call, ResponseFunctionToolCall) for call in calls)
    assert len({call.call_id for call in calls}) == 4


async def test_usage_is_an_estimate_by_length() -> None:
    """Usage counts about one token per 4 characters of instructions, input and output, rounded up."""
    response = await response_of(OfflineModel(lambda _view: "123456789"), "12345678", instructions="1234")

    assert (response.usage.requests, response.usage.input_tokens, response.usage.output_tokens) == (1, 3, 3)
    assert response.usage.total_tokens == 6


async def test_text_stream() -> None:
    """A streamed text comes word by word, between the events that open and close its item."""
    events = await events_of(OfflineModel(lambda _view: "two  words here"), "x")

    assert [event.type.removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.delta",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert deltas == ["two  ", "words ", "here"]
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_stream_ids_agree() -> None:
    """Every event of an item carries the item's id, and the last response holds that item and the usage."""
    events = await events_of(OfflineModel(lambda _view: [Call("shout", text="a"), Call("shout", text="b")]), "x")

    completed = events[-1].response
    assert events[0].response.id == completed.id
    assert (events[0].response.status, completed.status) == ("in_progress", "completed")
    assert completed.usage.output_tokens > 0
    for index, item in enumerate(completed.output):
        assert item.id.startswith("fc_")
        of_item = [event for event in events if getattr(event, "output_index", None) == index]
        assert {getattr(event, "item_id", None) or event.item.id for event in of_item} == {item.id}


async def test_stream_and_response_say_the_same() -> None:
    """Streaming changes how an answer arrives, neither its text nor its usage."""
    model = OfflineModel(lambda _view: "the same answer")

    response, events = await response_of(model, "x", "instructions"), await events_of(model, "x")

    assert events[-1].response.output[0].content[0].text == response.output[0].content[0].text
    assert events[-1].response.usage.total_tokens == response.usage.total_tokens


async def test_run_with_parallel_calls() -> None:
    """The SDK's runner executes every call of a decision and comes back with the results in order."""
    agent = Agent(name="shouter", tools=[shout], model=OfflineModel(shouting))

    result = await Runner.run(agent, "not so loud", run_config=NO_TRACING)

    assert result.final_output == "NOT SO LOUD"
    assert result.context_wrapper.usage.requests == 2


async def test_streamed_run_with_parallel_calls() -> None:
    """The SDK's runner gives the same answer when the run is streamed, with the text in deltas."""
    agent = Agent(name="shouter", tools=[shout], model=OfflineModel(shouting))

    result = Runner.run_streamed(agent, "not so loud", run_config=NO_TRACING)
    deltas = [
        event.data.delta
        async for event in result.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]

    assert "".join(deltas) == result.final_output == "NOT SO LOUD"
    assert len(deltas) == 3


async def test_a_call_is_cheap() -> None:
    """A model call with a long history costs well under a millisecond, so that load tests measure the gateway."""
    model = OfflineModel(lambda _view: "an answer of a few words")
    history = TOOL_CALL_HISTORY * 5

    durations_s = []
    for _ in range(50):
        started = time.perf_counter()
        await events_of(model, history)
        durations_s.append(time.perf_counter() - started)

    assert min(durations_s) < 0.001
