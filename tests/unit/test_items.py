"""Output items and their events: what the SDK streams, as one Responses stream that the OpenAI client accepts."""

import asyncio
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import agents
import openai
import pytest
import uvicorn
from agents import Agent, ModelSettings, RunConfig, Runner, function_tool
from agents.models.chatcmpl_stream_handler import ChatCmplStreamHandler
from agents.testing import ModelStep, ScriptedModel
from litestar import Litestar, post
from litestar.response import Stream
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from gateway.runs.items import ItemTranslator, item_id_of, output_items
from gateway.runs.offline import Call, OfflineModel
from gateway.testing import ScriptedOpenAI, Slow, ToolCall

Fields = dict[str, Any]
Servers = Callable[..., ScriptedOpenAI]
Models = Callable[..., agents.Model]

NO_TRACING = RunConfig(tracing_disabled=True)
EVENT = TypeAdapter(ResponseStreamEvent)
ADD = ToolCall("add", {"a": 1, "b": 2})
JOURNEY = [[ADD, ToolCall("fail", {})], [ToolCall("transfer_to_closer", {})], [ADD], "All is  done now."]
"""Parallel calls of which one fails, a handoff, a call of the next agent, a text."""

BRACKETS = {
    "response.output_item.added": "(",
    "response.output_item.done": ")",
    "response.content_part.added": "[",
    "response.content_part.done": "]",
    "response.reasoning_summary_part.added": "[",
    "response.reasoning_summary_part.done": "]",
}
GRAMMAR = {"message": r"\[\+*\.\]", "reasoning": r"\[\+*\.\]", "function_call": r"\+*\."}
"""Events of one part of an item, or of all of it between its first and last: `+` is a delta, `.` any other event."""

STEM = "ab12"


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@function_tool
def fail() -> str:
    """Raise an error."""
    raise ValueError("no")


@function_tool(needs_approval=True)
def delete(name: str) -> str:
    """Delete something, if someone approves."""
    return f"{name} is gone"


@function_tool
def look() -> list[agents.ToolOutputText | agents.ToolOutputImage]:
    """Return a text and an image."""
    return [agents.ToolOutputText(text="seen"), agents.ToolOutputImage(image_url="data:image/png;base64,AA==")]


@pytest.fixture
def servers() -> Iterator[Servers]:
    """Start a model server that gives these answers one after the other."""
    with ExitStack() as running:
        yield lambda *answers: running.enter_context(ScriptedOpenAI(one_by_one(answers)))


@pytest.fixture(params=["offline", "chat", "responses"])
def models(request: pytest.FixtureRequest, servers: Servers) -> Models:
    """A model of each kind that gives these answers one after the other."""

    def make(*answers: Any) -> agents.Model:
        if request.param != "offline":
            return openai_model(servers(*answers), request.param)
        decisions = [text if isinstance(text, str) else [Call(name, **args) for name, args in text] for text in answers]
        return OfflineModel(one_by_one(decisions))

    return make


def one_by_one(answers: Sequence[Any]) -> Callable[[Any], Any]:
    left = list(answers)
    return lambda _asked: left.pop(0)


def openai_model(server: ScriptedOpenAI, kind: str) -> agents.Model:
    client = openai.AsyncOpenAI(api_key="sk-test", base_url=server.url, max_retries=0)
    model = agents.OpenAIChatCompletionsModel if kind == "chat" else agents.OpenAIResponsesModel
    return model("scripted-1", client)


def desk(model: agents.Model) -> Agent:
    closer = Agent(name="closer", model=model, tools=[add])
    return Agent(name="desk", model=model, tools=[add, fail, delete, look], handoffs=[closer])


async def streamed(agent: Agent, translator: ItemTranslator, **options: Any) -> tuple[list[Fields], Any]:
    """Run the agent; return the events, and the SDK's result."""
    result = Runner.run_streamed(agent, "hi", run_config=NO_TRACING, **options)
    events = [event async for raw in result.stream_events() for event in translator.feed(raw)]
    assert translator.close() == []
    return events, result


def from_model(*events: Fields) -> list[Any]:
    """Return events of a model, written here as the API has them."""
    return [EVENT.validate_python({"sequence_number": 0} | event) for event in events]


def fed(translator: ItemTranslator, *events: Fields) -> list[Fields]:
    return [out for event in from_model(*events) for out in translator.feed(agents.RawResponsesStreamEvent(event))]


def response(status: str, *output: Fields) -> Fields:
    shared = {"id": "resp_1", "object": "response", "created_at": 1, "model": "m", "parallel_tool_calls": True}
    return shared | {"status": status, "output": list(output), "tool_choice": "auto", "tools": []}


def completed(*output: Fields) -> Fields:
    return {"type": "response.completed", "response": response("completed", *output)}


def added(item: Fields) -> Fields:
    return {"type": "response.output_item.added", "output_index": 0, "item": item}


def done(item: Fields) -> Fields:
    return {"type": "response.output_item.done", "output_index": 0, "item": item}


def message(*texts: str, **fields: Any) -> Fields:
    content = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    return {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": content} | fields


def steps(events: list[Fields]) -> str:
    """Return a character for each event."""
    return "".join(BRACKETS.get(event["type"], "+" if event["type"].endswith(".delta") else ".") for event in events)


def check(events: list[Fields], output: list[Fields]) -> None:
    """Check what must hold for every stream, whatever the model."""
    assert json.loads(json.dumps(events)) == events
    begun = [event["output_index"] for event in events if event["type"] == "response.output_item.added"]
    assert begun == list(range(len(output)))
    assert len({item["id"] for item in output} - {"__fake_id__"}) == len(output)
    for index, item in enumerate(output):
        of_item = [event for event in events if event["output_index"] == index]
        assert {event.get("item_id") or event["item"]["id"] for event in of_item} == {item["id"]}
        assert steps([of_item[0], of_item[-1]]) == "()"
        assert of_item[-1]["item"] == item
        parts = defaultdict(list)
        for event in of_item[1:-1]:
            parts[event.get("content_index"), event.get("summary_index")].append(event)
        assert all(re.fullmatch(GRAMMAR[item["type"]], steps(part)) for part in parts.values()), of_item
        final = item.get("summary", []) + item.get("content", [])
        assert len(parts) == (len(final) or item["type"] == "function_call")
        texts = [item.get("arguments", ""), *(part.get("text") or part.get("refusal", "") for part in final)]
        assert "".join(event.get("delta", "") for event in of_item) == "".join(texts)


def anonymous(items: list[Fields]) -> list[Fields]:
    """Return the items without what differs between two equal runs: ids, and call ids but for their order."""
    calls = list(dict.fromkeys(item["call_id"] for item in items if "call_id" in item))
    return [item | {"id": None, "call_id": "call_id" in item and calls.index(item["call_id"])} for item in items]


@asynccontextmanager
async def client_of(events: list[Fields], output: list[Fields]) -> AsyncIterator[openai.AsyncOpenAI]:
    """Serve the events as a gateway does, in the frame of one response; yield a client for it."""
    begun = {"response": response("in_progress")}
    frame = [{"type": "response.created"} | begun, {"type": "response.in_progress"} | begun]
    numbered = enumerate([*frame, *events, completed(*output)])
    body = [f"data: {json.dumps(event | {'sequence_number': number})}\n\n".encode() for number, event in numbered]

    @post("/responses", status_code=200)
    async def answer() -> Stream:
        return Stream(body, media_type="text/event-stream")

    server = uvicorn.Server(uvicorn.Config(Litestar([answer]), port=0, log_config=None))
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    async with openai.AsyncOpenAI(api_key="sk-test", base_url=url) as client:
        yield client
    server.should_exit = True
    await serving


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - another thread makes it true
            await asyncio.sleep(0.01)


async def test_a_run_is_one_stream_of_whole_items(models: Models) -> None:
    """Several model calls, parallel and failing tools and a handoff make one stream, and its items are the run's."""
    translator = ItemTranslator(STEM)

    events, result = await streamed(desk(models(*JOURNEY)), translator)

    check(events, translator.output)
    call, output = "function_call", "function_call_output"
    expected = [call, call, output, output, call, output, call, output, "message"]
    assert [item["type"] for item in translator.output] == expected
    assert {item["status"] for item in translator.output} == {"completed"}
    assert [item["output"] for item in translator.output if item["type"] == output][::3] == ["3", "3"]
    assert translator.output[-1]["content"][0]["text"] == result.final_output == "All is  done now."
    assert anonymous(output_items(result.new_items, STEM)) == anonymous(translator.output)


async def test_a_streamed_run_and_one_in_one_piece_have_the_same_items(models: Models) -> None:
    """Streaming changes how items arrive, not what they are."""
    translator = ItemTranslator(STEM)
    await streamed(desk(models(*JOURNEY)), translator)

    result = await Runner.run(desk(models(*JOURNEY)), "hi", run_config=NO_TRACING)

    items = output_items(result.new_items, STEM)
    assert anonymous(items) == anonymous(translator.output)
    assert len({item["id"] for item in items} - {"__fake_id__"}) == len(items)


async def test_the_openai_client_accepts_the_stream(models: Models) -> None:
    """OpenAI's client follows the stream of a run with tools to its end and finds every item in the response."""
    translator = ItemTranslator(STEM)
    events, _ = await streamed(desk(models(*JOURNEY)), translator)

    async with (
        client_of(events, translator.output) as client,
        client.responses.stream(model="m", input="hi") as stream,
    ):
        text = "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])
        final = await stream.get_final_response()

    assert text == final.output_text == "All is  done now."
    assert [item.id for item in final.output] == [item["id"] for item in translator.output]


async def test_outputs_of_a_clients_tools_are_hidden(models: Models) -> None:
    """The call of a hidden tool is shown and its output is not, streamed or in one piece; other tools show both."""
    translator = ItemTranslator(STEM, frozenset({"add"}))

    events, result = await streamed(desk(models([ADD, ToolCall("fail", {})], "done")), translator)

    check(events, translator.output)
    (_, failing, output, _) = translator.output
    assert [item.get("name") for item in translator.output] == ["add", "fail", None, None]
    assert output["call_id"] == failing["call_id"]
    assert anonymous(output_items(result.new_items, STEM, frozenset({"add"}))) == anonymous(translator.output)


@pytest.mark.parametrize("kind", ["chat", "responses"])
async def test_deltas_leave_as_they_arrive(servers: Servers, kind: str) -> None:
    """Words are passed on while the model is still at work, and the rest once it goes on."""
    gate = threading.Event()
    agent = desk(openai_model(servers(Slow("one two three", gate, after=2)), kind))
    result = Runner.run_streamed(agent, "hi", run_config=NO_TRACING)
    translator = ItemTranslator(STEM)

    deltas: list[str] = []
    async for raw in result.stream_events():
        deltas += [event["delta"] for event in translator.feed(raw) if "delta" in event]
        if deltas == ["one ", "two "]:
            gate.set()

    assert gate.is_set()
    assert deltas == ["one ", "two ", "three"]


@pytest.mark.parametrize("kind", ["chat", "responses"])
@pytest.mark.parametrize(("answer", "written"), [("one two three", "one two "), ([ADD], '{"a": 1, ')])
async def test_a_cancelled_run_ends_its_open_items(servers: Servers, kind: str, answer: Any, written: str) -> None:
    """What a cancelled run had begun is ended as incomplete with what was written, and its model sees the client go."""
    server = servers([ADD], Slow(answer, after=2))
    result = Runner.run_streamed(desk(openai_model(server, kind)), "hi", run_config=NO_TRACING)
    translator = ItemTranslator(STEM)

    events: list[Fields] = []
    async for raw in result.stream_events():
        events += translator.feed(raw)
        if [event["output_index"] for event in events[-2:] if "delta" in event] == [2, 2]:
            result.cancel()
    events += translator.close()

    check(events, translator.output)
    assert [item["status"] for item in translator.output] == ["completed", "completed", "incomplete"]
    assert written in (translator.output[-1].get("arguments"), events[-2].get("part", {}).get("text"))
    assert translator.close() == []
    await until(lambda: server.cancelled == 1)


async def test_a_call_that_waits_for_approval_is_shown_once(models: Models) -> None:
    """A run that stops for an approval shows the call without an output, once, streamed or not."""
    translator = ItemTranslator(STEM)

    events, result = await streamed(desk(models([ToolCall("delete", {"name": "x"}), ADD])), translator)

    assert [item.tool_name for item in result.interruptions] == ["delete"]
    check(events, translator.output)
    assert [item.get("name", item["type"]) for item in translator.output] == ["delete", "add", "function_call_output"]
    assert anonymous(output_items(result.new_items, STEM)) == anonymous(translator.output)


async def test_an_output_of_parts_stays_one(models: Models) -> None:
    """A tool that returns text and images has the content parts that the model reads as its output."""
    translator = ItemTranslator(STEM)

    await streamed(desk(models([ToolCall("look", {})], "done")), translator)

    assert [part["type"] for part in translator.output[1]["output"]] == ["input_text", "input_image"]


async def test_a_message_that_no_model_wrote_is_shown() -> None:
    """The message of a handler that answers for a run without turns left is streamed like any other."""
    model = OfflineModel(lambda _view: Call("add", a=1, b=2))
    translator = ItemTranslator(STEM)

    events, _ = await streamed(
        desk(model), translator, max_turns=1, error_handlers={"max_turns": lambda _failed: "Enough."}
    )

    check(events, translator.output)
    assert [item["type"] for item in translator.output] == ["function_call", "function_call_output", "message"]
    assert translator.output[-1]["content"][0]["text"] == "Enough."


async def test_a_model_that_streams_nothing_is_told_in_one_piece() -> None:
    """Items that a model only gives with its whole response have all their events, with one delta for each text."""
    call = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "add", "arguments": '{"a": 1, "b": 2}'}
    responses = [completed(call), completed(message("Three. ", "Yes. "), message("Done.", id="__fake_id__"))]
    translator = ItemTranslator(STEM)

    events, result = await streamed(
        desk(ScriptedModel([ModelStep.stream(from_model(each)) for each in responses])), translator
    )

    check(events, translator.output)
    assert steps(events) == "(+.)()([+.][+.])([+.])"
    assert anonymous(output_items(result.new_items, STEM)) == anonymous(translator.output)


async def test_a_model_whose_list_at_the_end_is_empty_is_told_once() -> None:
    """Items that were streamed are not repeated when a model leaves the response at its end empty."""
    model = ScriptedModel([ModelStep.stream(from_model(done(message("Hello.")), completed()))])
    translator = ItemTranslator(STEM)

    events, result = await streamed(desk(model), translator)

    assert result.final_output == "Hello."
    assert steps(events) == "([+.])"


def test_ids_say_where_an_item_is() -> None:
    """An item's id is made of its type, the response's digits and its place, whatever the model called it."""
    translator = ItemTranslator(STEM)

    fed(translator, *(completed(message("x", id=each)) for each in ("msg_1", "msg_1", "__fake_id__", "")))

    assert [item["id"] for item in translator.output] == [item_id_of("message", STEM, index) for index in range(4)]


def test_ids_that_change_in_between_make_no_new_items() -> None:
    """A model that gives an item another id at the end than while it streamed has written one item."""
    translator = ItemTranslator(STEM)
    texts = [message("Hello.", id=item_id) for item_id in ("msg_2", "msg_3")]

    events = fed(translator, added(message()), done(texts[0]), completed(texts[1]))

    check(events, translator.output)
    assert len(translator.output) == 1


def test_an_item_announced_twice_is_one() -> None:
    """A model that says twice that an item begins has begun one item."""
    events = fed(ItemTranslator(STEM), added(message()), added(message()), done(message("Hello.")))

    assert steps(events) == "([+.])"


def test_a_call_that_is_tried_again_ends_what_it_had_begun() -> None:
    """A model call that breaks off and begins anew leaves an incomplete item, before the new one."""
    translator = ItemTranslator(STEM)
    created = {"type": "response.created", "response": response("in_progress")}

    fed(translator, created, added(message()), created, added(message()), completed(message("Hello.")))

    assert [item["status"] for item in translator.output] == ["incomplete", "completed"]
    assert len({item["id"] for item in translator.output}) == 2


def test_events_of_other_items_are_passed_on() -> None:
    """Events that are unknown here keep their fields and get the index and the id of the item as it is streamed."""
    translator = ItemTranslator(STEM)
    translator.add(message("before", id="ws_1"))
    search = {
        "type": "web_search_call",
        "id": "ws_1",
        "status": "completed",
        "action": {"type": "search", "query": "x"},
    }
    searching = {"type": "response.web_search_call.searching", "output_index": 0, "item_id": "ws_1"}

    events = fed(translator, added(search), searching, done(search))

    item = translator.output[1]
    assert events[1] == searching | {"output_index": 1, "item_id": item["id"]}
    assert item == search | {"id": item["id"]}
    assert item["id"] != "ws_1"


async def test_reasoning_is_an_item_like_others() -> None:
    """Reasoning with its summary, its content and what is encrypted is streamed with all its events."""
    parts = {"summary": [{"type": "summary_text", "text": "In short."}]}
    parts |= {"content": [{"type": "reasoning_text", "text": "At length."}]}
    thought = {"type": "reasoning", "id": "rs_1", "encrypted_content": "gAAA", **parts}
    items = TypeAdapter(Response).validate_python(response("completed", thought, message("Hello."))).output
    translator = ItemTranslator(STEM)

    events, _ = await streamed(desk(ScriptedModel([items])), translator)

    check(events, translator.output)
    assert translator.output[0] == thought | {"id": item_id_of("reasoning", STEM, 0)}


async def chat_output(*deltas: Fields) -> list[Fields]:
    """Return the items that the SDK makes of a chat model's deltas, their events checked."""

    async def chunks() -> AsyncIterator[ChatCompletionChunk]:
        frame = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        for delta in deltas:
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            yield ChatCompletionChunk.model_validate(frame | {"choices": [choice]})

    begun = Response.model_validate(response("in_progress"))
    translator = ItemTranslator(STEM)
    raw = [agents.RawResponsesStreamEvent(each) async for each in ChatCmplStreamHandler.handle_stream(begun, chunks())]
    check([event for each in raw for event in translator.feed(each)], translator.output)
    assert translator.close() == []
    return translator.output


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
@pytest.mark.parametrize("late", [False, True])
async def test_reasoning_of_chat_models(name: str, late: bool) -> None:
    """Reasoning of either notation is an item of its own, also when it comes after the text has begun."""
    thought, begin, end = {name: "Hmm."}, {"content": "So "}, {"content": "it is."}

    items = await chat_output(*([begin, thought, end] if late else [thought, begin, end]))

    texts = {item["type"]: [*item.get("summary", []), *item.get("content", [])][0]["text"] for item in items}
    assert texts == {"message": "So it is.", "reasoning": "Hmm."}


async def test_refusals_of_chat_models() -> None:
    """A refusal after a text is another part of the same message."""
    (item,) = await chat_output({"content": "Well. "}, {"refusal": "I will "}, {"refusal": "not."})

    assert [part["type"] for part in item["content"]] == ["output_text", "refusal"]
    assert item["content"][1] == {"type": "refusal", "refusal": "I will not."}


def test_an_item_of_our_own() -> None:
    """A whole item that the gateway adds is streamed with all events, after those of the run so far."""
    translator = ItemTranslator(STEM)
    fed(translator, completed(message("first")))

    events = translator.add({"type": "message", "content": [{"type": "output_text", "text": "second"}]})

    assert steps(events) == "([+.])"
    assert {event["output_index"] for event in events} == {1}
    assert translator.output[1].items() >= {"role": "assistant", "status": "completed"}.items()


def test_a_delta_is_cheap() -> None:
    """A delta costs well under a tenth of a millisecond, however long the text before it is."""
    translator = ItemTranslator(STEM)
    fed(translator, added(message()))
    place = {"output_index": 0, "item_id": "msg_1", "content_index": 0}
    (delta,) = from_model({"type": "response.output_text.delta", "delta": "word " * 10, "logprobs": [], **place})
    event = agents.RawResponsesStreamEvent(delta)

    durations_s = []
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(1000):
            translator.feed(event)
        durations_s.append(time.perf_counter() - started)

    assert min(durations_s[10:]) < 0.1


@pytest.mark.parametrize("kind", ["chat", "responses"])
async def test_a_held_answer_in_one_piece_waits(servers: Servers, kind: str) -> None:
    """The scripted server holds an answer that is not streamed as a whole, and counts the client that leaves."""
    gate = threading.Event()
    server = servers(Slow("done", gate), Slow("never"))
    agent = desk(openai_model(server, kind))

    waiting = asyncio.create_task(Runner.run(agent, "hi", run_config=NO_TRACING))
    await until(lambda: server.requests)
    assert not waiting.done()
    gate.set()
    assert (await waiting).final_output == "done"
    assert server.cancelled == 0
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(Runner.run(agent, "hi", run_config=NO_TRACING), 0.3)
    await until(lambda: server.cancelled == 1)


@pytest.mark.parametrize(("include", "tokens"), [(True, 15), (None, 0)])
async def test_streamed_chat_answers_count_tokens_on_request(servers: Servers, include: Any, tokens: int) -> None:
    """The scripted server streams a chat answer's usage when it is asked to, and only then."""
    agent = desk(openai_model(servers("one"), "chat"))
    agent.model_settings = ModelSettings(include_usage=include)

    _, result = await streamed(agent, ItemTranslator(STEM))

    assert result.context_wrapper.usage.total_tokens == tokens
