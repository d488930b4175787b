"""Chat chunks of a run, and that the OpenAI client makes the right completion of them."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
import uvicorn
from agents import Agent, RunConfig, Runner, function_tool
from litestar import Litestar, post
from litestar.response import Stream

from gateway.http.chunks import ChatChunks
from gateway.runs.items import ItemTranslator
from gateway.runs.offline import Call, OfflineModel

FRAME = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
CLIENT_TOOLS = frozenset({"open_door", "close_door"})


@function_tool
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@function_tool
def open_door(room: str) -> str:
    """Stand for a tool that the client has."""
    return room


def message(*parts: tuple[str, str]) -> dict[str, Any]:
    """Return a message of parts, each a type and its text."""
    fields = {"output_text": "text", "refusal": "refusal"}
    return {"type": "message", "content": [{"type": kind, fields[kind]: text} for kind, text in parts]}


def call(name: str, call_id: str, arguments: str) -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def chunks_of(*items: dict[str, Any], usage: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Return all chunks of a run with these items."""
    translator, chunks = ItemTranslator("ab12", CLIENT_TOOLS), ChatChunks(FRAME, CLIENT_TOOLS)
    events = [event for item in items for event in translator.add(item)]
    return [chunks.start(), *(chunk for event in events for chunk in chunks.feed(event)), *chunks.finish(usage)]


def deltas(chunks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]


@asynccontextmanager
async def completion_of(chunks: list[dict[str, Any]]) -> AsyncIterator[Any]:
    """Serve the chunks; yield the OpenAI client's stream of them."""

    @post("/chat/completions", status_code=200)
    async def answer() -> Stream:
        lines = [*map(json.dumps, chunks), "[DONE]"]
        return Stream([f"data: {line}\n\n" for line in lines], media_type="text/event-stream")

    server = uvicorn.Server(uvicorn.Config(Litestar([answer]), port=0, log_config=None))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    async with (
        openai.AsyncOpenAI(api_key="sk-test", base_url=url) as client,
        client.chat.completions.stream(model="m", messages=[{"role": "user", "content": "hi"}]) as stream,
    ):
        yield stream
    server.should_exit = True
    await serving


async def test_a_run_as_a_chat_completion() -> None:
    """OpenAI's client reads a run with tools as one answer: the text in deltas, the agent's own calls left out."""
    decisions = [[Call("add", a=1, b=2)], "It is three."]
    agent = Agent(name="adder", tools=[add], model=OfflineModel(lambda _view: decisions.pop(0)))
    result = Runner.run_streamed(agent, "hi", run_config=RunConfig(tracing_disabled=True))
    translator, chunks = ItemTranslator("ab12"), ChatChunks(FRAME, frozenset())
    sent = [chunks.start()]
    async for raw in result.stream_events():
        sent += [chunk for event in translator.feed(raw) for chunk in chunks.feed(event)]

    async with completion_of(sent + chunks.finish(USAGE)) as stream:
        texts = [event.delta async for event in stream if event.type == "content.delta"]
        completion = await stream.get_final_completion()

    assert [text for text in texts if text] == ["It ", "is ", "three."]
    (choice,) = completion.choices
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("It is three.", None, "stop")
    assert completion.usage.total_tokens == 5


async def test_calls_of_the_clients_tools() -> None:
    """Calls of the client's tools reach OpenAI's client as tool calls, numbered without those of the agent."""
    chunks = chunks_of(
        message(("output_text", "One moment.")),
        call("open_door", "call_1", '{"room": "a"}'),
        call("add", "call_2", "{}"),
        call("close_door", "call_3", '{"room": "b"}'),
        {"type": "function_call_output", "call_id": "call_2", "output": "3"},
    )

    async with completion_of(chunks) as stream:
        completion = await stream.get_final_completion()

    (choice,) = completion.choices
    calls = [(each.id, each.function.name, each.function.arguments) for each in choice.message.tool_calls]
    assert calls == [("call_1", "open_door", '{"room": "a"}'), ("call_3", "close_door", '{"room": "b"}')]
    assert choice.message.content == "One moment."
    assert choice.finish_reason == "tool_calls"


async def test_a_hidden_output_of_a_run_is_no_answer() -> None:
    """A run whose last word is a call of the client's tool ends with that call."""
    model = OfflineModel(lambda _view: Call("open_door", room="a"))
    agent = Agent(name="porter", tools=[open_door], model=model, tool_use_behavior="stop_on_first_tool")
    result = Runner.run_streamed(agent, "hi", run_config=RunConfig(tracing_disabled=True))
    translator, chunks = ItemTranslator("ab12", CLIENT_TOOLS), ChatChunks(FRAME, CLIENT_TOOLS)

    sent = [
        chunk async for raw in result.stream_events() for event in translator.feed(raw) for chunk in chunks.feed(event)
    ]

    assert [delta["tool_calls"][0]["function"] for delta in deltas(sent)] == [
        {"name": "open_door", "arguments": ""},
        {"arguments": '{"room": "a"}'},
    ]
    assert [item["type"] for item in translator.output] == ["function_call"]


def test_messages_are_set_apart() -> None:
    """A further message begins a new paragraph, parts of one message do not, and refusals have their own field."""
    texts = message(("output_text", "one"), ("output_text", " two"))

    chunks = chunks_of(texts, call("add", "call_1", "{}"), message(("output_text", "three"), ("refusal", "no")))

    assert deltas(chunks) == [
        {"role": "assistant", "content": ""},
        {"content": "one"},
        {"content": " two"},
        {"content": "\n\nthree"},
        {"refusal": "no"},
        {},
    ]


@pytest.mark.parametrize("usage", [None, USAGE])
def test_every_chunk_has_the_frame(usage: dict[str, Any] | None) -> None:
    """Every chunk repeats the frame and has one choice, but for that of the usage, which is there only if given."""
    chunks = chunks_of(message(("output_text", "one")), usage=usage)

    with_choice = chunks if usage is None else chunks[:-1]
    assert all(chunk.items() >= FRAME.items() for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in with_choice]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    assert {(choice["index"], choice["logprobs"]) for choice in choices} == {(0, None)}
    assert usage is None or chunks[-1] == FRAME | {"choices": [], "usage": USAGE}
