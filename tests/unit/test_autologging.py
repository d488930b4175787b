"""Autologging, and other listeners, beside the capture: it stays on, and nothing is seen twice."""

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import mlflow
import pytest
from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    TracingProcessor,
    add_trace_processor,
    function_tool,
    set_trace_processors,
)
from agents.testing import assistant_message
from agents.tracing import get_trace_provider
from langchain_core.language_models import FakeListChatModel
from langchain_core.prompts import ChatPromptTemplate
from openai import AsyncOpenAI, OpenAI

from gateway.tracing.capture import TOKEN_USAGE, SpanCapture
from gateway.tracing.capture.content import ANSWERED_BY, CHAT_TOOLS

from .recorded import Captured, add, asks, calculator, is_whole, record

PLAIN = [("AGENT", "calc"), ("CHAT_MODEL", "scripted"), ("TOOL", "add"), ("CHAT_MODEL", "scripted")]


@pytest.fixture
def capture() -> Iterator[SpanCapture]:
    """The capture, installed as in the web process."""
    capture = SpanCapture()
    capture.install()
    yield capture
    capture.uninstall()


@pytest.fixture
def autolog(capture) -> Iterator[None]:
    """An agent's module that switches autologging on."""
    mlflow.openai.autolog()
    yield
    mlflow.openai.autolog(disable=True)


def kinds(got: Captured) -> list[tuple[str, str]]:
    return [(span.kind, span.name) for span in got.trace.spans]


def completion(asked: httpx.Request) -> httpx.Response:
    """Answer on the chat API, as a server does."""
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    choice = {"index": 0, "message": {"role": "assistant", "content": "pong"}, "finish_reason": "stop"}
    body = {"id": "c", "object": "chat.completion", "created": 1, "model": "gpt-x", "choices": [choice], "usage": usage}
    return httpx.Response(200, json=body)


def response(asked: httpx.Request) -> httpx.Response:
    """Answer on the Responses API with a newer model than was asked."""
    text = {"type": "output_text", "text": "pong", "annotations": []}
    message = {"type": "message", "id": "m", "role": "assistant", "status": "completed", "content": [text]}
    usage = {
        "input_tokens": 5,
        "output_tokens": 2,
        "total_tokens": 7,
        "input_tokens_details": {"cached_tokens": 3},
        "output_tokens_details": {"reasoning_tokens": 1},
    }
    body = {"id": "r", "object": "response", "created_at": 1, "model": "gpt-x-2026", "status": "completed"}
    more = {"output": [message], "usage": usage, "parallel_tool_calls": True, "tool_choice": "auto", "tools": []}
    return httpx.Response(200, json=body | more)


def client(answer: Callable[[httpx.Request], httpx.Response]) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="sk-1", http_client=httpx.AsyncClient(transport=httpx.MockTransport(answer)))


@pytest.mark.usefixtures("autolog")
@pytest.mark.parametrize("streamed", [False, True])
async def test_one_tree(capture, streamed):
    """Autologging of agents neither ends the capture nor adds anything to the tree."""

    @function_tool
    async def act() -> str:
        """Act, in a span of its own."""
        mlflow.get_current_active_span().set_attribute("mine", 1)
        with mlflow.start_span("acting"):
            return mlflow.get_active_trace_id()

    steps = [[asks("add"), asks("act", "{}", "c2")], [assistant_message("3")]]
    got = await record(capture, calculator(add, act), steps, streamed=streamed)
    assert is_whole(got)
    assert kinds(got) == [*PLAIN[:3], ("TOOL", "act"), ("CHAIN", "acting"), PLAIN[3]]
    act_span = got.trace.spans[3]
    assert (got.trace.spans[4].parent_id, act_span.attributes["mine"]) == (act_span.span_id, 1)
    assert not any("context" in span.attributes for span in got.trace.spans)


@pytest.mark.usefixtures("autolog")
@pytest.mark.parametrize(
    ("model", "answered_by"),
    [
        (OpenAIChatCompletionsModel("gpt-x", client(completion)), None),
        (OpenAIResponsesModel("gpt-x", client(response)), "gpt-x-2026"),
    ],
    ids=["chat", "responses"],
)
async def test_client_of_the_model(capture, model, answered_by):
    """A call that our span stands for is not seen again as a call of the client."""
    got = await record(capture, calculator(), model)
    assert kinds(got) == [("AGENT", "calc"), ("CHAT_MODEL", "scripted")]
    call = got.trace.spans[1]
    assert call.outputs["choices"][0]["message"]["content"] == "pong"
    assert call.attributes.get(ANSWERED_BY) == answered_by
    assert call.attributes[TOKEN_USAGE]["total_tokens"] == 7


@pytest.mark.usefixtures("autolog")
async def test_client_of_a_tool(capture):
    """A call that a tool makes itself has a span below the tool; what it sends beside the messages stays out."""

    @function_tool
    async def ping() -> str:
        """Ask another model."""
        asked: Any = [{"role": "user", "content": "ping"}]
        made = await client(completion).chat.completions.create(
            model="gpt-x", messages=asked, extra_headers={"X-Api-Key": "k"}
        )
        return str(made.choices[0].message.content)

    @function_tool
    def ping_in_a_thread() -> str:
        """Ask another model, in a thread."""
        http_client = httpx.Client(transport=httpx.MockTransport(completion))
        asked: Any = [{"role": "user", "content": "ping"}]
        made = OpenAI(api_key="sk-1", http_client=http_client).chat.completions.create(model="gpt-x", messages=asked)
        return str(made.choices[0].message.content)

    calls = [asks("ping", "{}", "c1"), asks("ping_in_a_thread", "{}", "c2")]
    got = await record(capture, calculator(ping, ping_in_a_thread), [calls, [assistant_message("done")]])
    assert is_whole(got)
    names = {span.span_id: span.name for span in got.trace.spans}
    made = [span for span in got.trace.spans if span.kind == "CHAT_MODEL" and span.name != "scripted"]
    assert {names[span.parent_id or ""] for span in made} == {"ping", "ping_in_a_thread"}
    for span in made:
        assert span.inputs["messages"] == [{"role": "user", "content": "ping"}]
        assert span.attributes[TOKEN_USAGE]["total_tokens"] == 7
        assert "k" not in [*span.attributes.values(), span.inputs.get("extra_headers")]


@pytest.mark.usefixtures("autolog")
@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_agent_of_a_tool(capture, api):
    """An agent that a tool runs with a model of its own is below the tool, its calls with tools and usage."""
    model: Any = (
        OpenAIChatCompletionsModel("gpt-x", client(completion))
        if api == "chat"
        else OpenAIResponsesModel("gpt-x", client(response))
    )
    inner = Agent(name="Second", instructions="Help.", model=model)

    @function_tool
    async def ask() -> str:
        """Ask a second agent."""
        return str((await Runner.run(inner, "ping")).final_output)

    got = await record(capture, calculator(ask), [[asks("ask", "{}")], [assistant_message("done")]])
    assert is_whole(got)
    agent, call = got.trace.spans[3:5]
    assert [kind for kind, _ in kinds(got)] == ["AGENT", "CHAT_MODEL", "TOOL", "AGENT", "CHAT_MODEL", "CHAT_MODEL"]
    assert (agent.parent_id, call.parent_id) == (got.trace.spans[2].span_id, agent.span_id)
    assert agent.inputs["messages"][-1] == {"role": "user", "content": "ping"}
    assert agent.outputs["messages"][0]["content"] == "pong"
    assert call.attributes[TOKEN_USAGE]["total_tokens"] == 7


async def test_langchain(capture):
    """What LangChain does inside a tool is below the tool, as its autologging tells it."""
    mlflow.langchain.autolog()
    chain = ChatPromptTemplate.from_messages([("user", "{question}")]) | FakeListChatModel(responses=["pong"])

    @function_tool
    async def ask(question: str) -> str:
        """Ask a chain."""
        with mlflow.start_span("around"):
            return str((await chain.ainvoke({"question": question})).content)

    @function_tool
    def ask_in_a_thread(question: str) -> str:
        """Ask a chain, in a thread."""
        return str(chain.invoke({"question": question}).content)

    try:
        calls = [asks("ask", '{"question": "ping"}', "c1"), asks("ask_in_a_thread", '{"question": "ping"}', "c2")]
        got = await record(capture, calculator(ask, ask_in_a_thread), [calls, [assistant_message("done")]])
    finally:
        mlflow.langchain.autolog(disable=True)
    assert is_whole(got)
    names = {span.span_id: span.name for span in got.trace.spans}
    places = {(span.name, names[span.parent_id]) for span in got.trace.spans if span.parent_id}
    assert {("RunnableSequence", "around"), ("RunnableSequence", "ask_in_a_thread")} <= places
    models = [span for span in got.of("CHAT_MODEL") if span.name == "FakeListChatModel"]
    assert [names[span.parent_id or ""] for span in models] == ["RunnableSequence"] * 2
    assert all(span.outputs for span in models)


class Listener(TracingProcessor):
    """What the author of an agent adds."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def on_trace_start(self, trace: Any) -> None: ...
    def on_trace_end(self, trace: Any) -> None: ...
    def on_span_start(self, span: Any) -> None: ...
    def on_span_end(self, span: Any) -> None:
        self.heard.append(span.export()["span_data"]["type"])

    def shutdown(self) -> None: ...
    def force_flush(self) -> None: ...


async def test_other_listeners(capture):
    """Processors that an agent's author adds hear of every span, and the capture goes on whatever they set."""
    first, second = Listener(), Listener()
    add_trace_processor(first)
    steps = [[asks("add")], [assistant_message("3")]]
    assert kinds(await record(capture, calculator(), steps)) == PLAIN
    set_trace_processors([second])
    assert kinds(await record(capture, calculator(), steps)) == PLAIN
    set_trace_processors([])
    assert kinds(await record(capture, calculator(), steps)) == PLAIN
    assert first.heard == second.heard == ["generation", "function", "generation", "agent"]


async def test_two_captures_at_once(capture):
    """A second web process in the same interpreter takes nothing from the first, nor does its end."""
    second = SpanCapture()
    second.install()
    steps = [[asks("add")], [assistant_message("3")]]
    assert kinds(await record(second, calculator(), steps)) == PLAIN
    assert kinds(await record(capture, calculator(), steps)) == PLAIN
    second.uninstall()
    assert kinds(await record(capture, calculator(), steps)) == PLAIN
    provider: Any = get_trace_provider()
    assert provider.captures == [capture]
    assert CHAT_TOOLS
