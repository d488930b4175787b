"""The offline model: what a decider sees, and what the SDK gets to see of its decisions."""

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from agents import Agent, ModelSettings, ModelTracing, RunConfig, Runner, function_tool, handoff
from agents.agent_output import AgentOutputSchemaBase
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage
from pydantic import BaseModel

from gateway.runs.offline import Call, OfflineModel, ToolResult, View
from gateway.runs.requests import ClientSchema, ClientTool, client_tool

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


def clients(name: str, description: str = "", **properties: Any) -> ClientTool:
    """A tool that a client brings along; all its parameters are required."""
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return client_tool(name, description, parameters, strict=False)


WEATHER = clients("get_weather", "Tells how warm it is outside.", location={"type": "string"})
TASK = clients("createTask", "Writes down what is to be done.", title={"type": "string"})


def arguments_of_a_call(
    model_input: str | list[Any],
    instructions: str | None,
    tools: Sequence[Any],
    schema: AgentOutputSchemaBase | None,
    tool_choice: str | None,
) -> tuple[list[Any], dict[str, Any]]:
    """What the SDK passes to a model, by place and by name."""
    settings = ModelSettings(tool_choice=tool_choice)
    placed = [instructions, model_input, settings, list(tools), schema, [], ModelTracing.DISABLED]
    return placed, {"previous_response_id": None, "conversation_id": None, "prompt": None}


async def events_of(model: OfflineModel, model_input: str | list[Any]) -> list[Any]:
    """Stream one answer and collect its events."""
    placed, named = arguments_of_a_call(model_input, "instructions", [], None, None)
    return [event async for event in model.stream_response(*placed, **named)]


async def response_of(
    model: OfflineModel,
    model_input: str | list[Any],
    instructions: str | None = None,
    tools: Sequence[Any] = (),
    schema: AgentOutputSchemaBase | None = None,
    tool_choice: str | None = None,
) -> Any:
    """Ask for one answer in one piece."""
    placed, named = arguments_of_a_call(model_input, instructions, tools, schema, tool_choice)
    return await model.get_response(*placed, **named)


async def decision_of(model: OfflineModel, model_input: str | list[Any], *tools: Any, **options: Any) -> Any:
    """The model's answer, as a text or as the name and the arguments of its call."""
    (item,) = (await response_of(model, model_input, tools=tools, **options)).output
    return item.content[0].text if item.type == "message" else (item.name, json.loads(item.arguments))


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


def test_view_of_an_output_without_its_call() -> None:
    """The output of a call that is not in the history is left out."""
    view = View.of([{"role": "user", "content": "hi"}, {"type": "function_call_output", "call_id": "?", "output": "x"}])

    assert (view.last_user, view.tool_results_this_turn) == ("hi", [])


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


SILENT = OfflineModel(lambda _view: "I have nothing to say.")
REFUNDING = OfflineModel(lambda _view: Call("refund_order", order_id="A-1001"))


@pytest.mark.parametrize(
    ("text", "decision"),
    [
        ("What is the weather in San Francisco?", ("get_weather", {"location": "San Francisco"})),
        ("A task: water the plants for Ann", ("createTask", {"title": "Ann"})),
        ("Two tasks in any weather", ("get_weather", {"location": "any weather"})),
        ("Is it warm outside in Oslo?", ("get_weather", {"location": "Oslo"})),
        ("Get me one of those", "I have nothing to say."),
    ],
)
async def test_client_tool_the_text_speaks_of(text: str, decision: object) -> None:
    """A client's tool is called, arguments filled, if a telling word of its name or description is in the text."""
    assert await decision_of(SILENT, text, WEATHER, TASK) == decision


@pytest.mark.parametrize(
    ("text", "called"),
    [
        ("I want a refund for the bad weather", "get_weather"),
        ("Refund my order for the bad weather", "refund_order"),
        ("A refund for whoever is warm outside", "refund_order"),
    ],
)
async def test_client_tool_against_the_decider(text: str, called: str) -> None:
    """A tool named in the text goes before the decider's unless that is named more; one merely described does not."""
    name, _arguments = await decision_of(REFUNDING, text, WEATHER)
    assert name == called


@pytest.mark.parametrize(
    ("tool_choice", "text", "called"),
    [
        ("auto", "The weather?", "get_weather"),
        ("none", "The weather?", "shout"),
        ("createTask", "The weather?", "createTask"),
        ("shout", "The weather?", "shout"),
        ("required", "My tasks?", "createTask"),
        ("required", "Hello?", "get_weather"),
    ],
)
async def test_tool_choice(tool_choice: str, text: str, called: str) -> None:
    """The request's tool choice forbids the client's tools, asks for any or for one of them, or leaves it open."""
    model = OfflineModel(lambda _view: Call("shout", text="a"))
    name, _arguments = await decision_of(model, text, shout, WEATHER, TASK, tool_choice=tool_choice)
    assert name == called


@pytest.mark.parametrize("tools", [(WEATHER, TASK, shout), (shout,), ()])
@pytest.mark.parametrize("tool_choice", [None, "required"])
async def test_outputs_of_client_tools_are_repeated(tools: tuple[Any, ...], tool_choice: str | None) -> None:
    """What the client's tools gave is said in words, also when the client does not bring the tools again."""
    history: list[Any] = [{"role": "user", "content": "The weather and my tasks?"}]
    for call_id, name, output in [("1", "get_weather", "18 degrees."), ("2", "createTask", '{"id": 7}')]:
        history.append({"type": "function_call", "call_id": call_id, "name": name, "arguments": "{}"})
        history.append({"type": "function_call_output", "call_id": call_id, "output": output})

    answer = await decision_of(SILENT, history, *tools, tool_choice=tool_choice)

    assert answer == 'get_weather says: 18 degrees. createTask says: {"id": 7}.'


async def test_own_tools_beside_those_of_a_client() -> None:
    """Where the text speaks of no tool of the client, the decider calls its own and answers from their results."""
    agent = Agent(name="shouter", tools=[shout, WEATHER], model=OfflineModel(shouting))

    result = await Runner.run(agent, "not so loud", run_config=NO_TRACING)

    assert result.final_output == "NOT SO LOUD"


async def test_a_handoff_is_no_tool_of_a_client() -> None:
    """After a handoff the decider goes on, although the new agent has no such tool."""
    second = Agent(name="second", model=OfflineModel(lambda _view: "second here"))
    first = Agent(
        name="first",
        model=OfflineModel(lambda _view: Call("over_to_you")),
        handoffs=[handoff(second, tool_name_override="over_to_you")],
    )

    assert (await Runner.run(first, "hi", run_config=NO_TRACING)).final_output == "second here"


class Total(BaseModel):
    """What a client may want an answer as."""

    words: str
    amount: float
    paid: bool


async def test_structured_answer() -> None:
    """With an output type a run ends with an object of it, made from the decider's text."""
    agent = Agent(
        name="total", output_type=Total, model=OfflineModel(lambda _view: "Right, 2 of them cost 49.90 dollars.")
    )

    result = await Runner.run(agent, "hi", run_config=NO_TRACING)

    assert result.final_output == Total(words="Right, 2 of them cost 49.90 dollars.", amount=49.9, paid=True)


@pytest.mark.parametrize(
    ("schema", "answer"),
    [({"type": "object", "properties": {"n": {"type": "integer"}}}, '{"n": 5}'), (None, '{"answer": "5 °C"}')],
)
async def test_schema_of_a_client(schema: dict[str, Any] | None, answer: str) -> None:
    """A text becomes JSON by the client's schema; a tool call stays what it is."""
    wanted = ClientSchema("any", schema, strict=True)

    assert await decision_of(OfflineModel(lambda _view: "5 °C"), "hi", schema=wanted) == answer
    assert await decision_of(REFUNDING, "hi", schema=wanted) == ("refund_order", {"order_id": "A-1001"})


async def test_streams_take_turns() -> None:
    """Two streams that run at once come word by word in turn, even without a pause."""
    placed, named = arguments_of_a_call("hi", None, [], None, None)
    order: list[str] = []

    async def read(text: str) -> None:
        async for event in OfflineModel(lambda _view: text).stream_response(*placed, **named):
            if event.type == "response.output_text.delta":
                order.append(event.delta.strip())  # noqa: PERF401 - each word when it comes

    await asyncio.gather(read("a b c"), read("1 2 3"))

    assert order == ["a", "1", "b", "2", "c", "3"]


async def test_a_pause_slows_the_stream() -> None:
    """With a pause, a stream takes that long for each word."""
    started = time.perf_counter()

    await events_of(OfflineModel(lambda _view: "one two three", pause_s=0.01), "x")

    assert time.perf_counter() - started >= 0.03
