"""What spans say beyond their shape: guardrails, hosted tools, arguments, usage, ends that were cut off."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import mlflow
import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    OpenAIResponsesModel,
    ToolGuardrailFunctionOutput,
    ToolInputGuardrailTripwireTriggered,
    Usage,
    function_tool,
    input_guardrail,
    output_guardrail,
    tool_input_guardrail,
    tool_output_guardrail,
)
from agents.testing import ScriptedModel, assistant_message
from openai import AsyncOpenAI
from openai.types.responses import (
    ResponseCodeInterpreterToolCall,
    ResponseFileSearchToolCall,
    ResponseFunctionWebSearch,
    ResponseTextDeltaEvent,
    response_file_search_tool_call,
    response_function_web_search,
)
from openai.types.responses.response_output_item import McpCall
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails

from gateway.runs.models import provider_of
from gateway.tracing.capture import TOKEN_USAGE, SpanCapture, outcome
from gateway.tracing.capture.arguments import ERROR, VALID, check_arguments
from gateway.tracing.capture.assembly import CANCELLED, CUT_OFF
from gateway.tracing.capture.content import FIRST_TOKEN_S, REASONING_TOKENS, TRIGGERED
from gateway.tracing.spans import Outcome

from .recorded import asks, calculator, is_whole, record, scripted


@pytest.fixture
def capture() -> Iterator[SpanCapture]:
    """The capture, installed as in the web process."""
    capture = SpanCapture()
    capture.install()
    yield capture
    capture.uninstall()


class Streaming(ScriptedModel):
    """Streams a text piece by piece, and waits at a gate in the middle if it is given one."""

    gate: asyncio.Event | None = None
    waits: asyncio.Event | None = None

    async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for event in super().stream_response(*args, **kwargs):
            if event.type == "response.completed" and event.response.output[0].type == "message":
                if self.gate is not None and self.waits is not None:
                    self.waits.set()
                    await self.gate.wait()
                yield ResponseTextDeltaEvent(
                    content_index=0, delta="3", item_id="m", logprobs=[], output_index=0, sequence_number=9,
                    type="response.output_text.delta",
                )  # fmt: skip
            yield event


async def test_guardrails_of_every_kind(capture):
    """Guardrails of agent and tools are spans, a tool's below the tool; one that stopped something says so."""

    @input_guardrail(name="asked politely")
    async def polite(context: Any, agent: Any, question: Any) -> GuardrailFunctionOutput:
        return GuardrailFunctionOutput(None, False)

    @output_guardrail(name="answers politely")
    async def answers(context: Any, agent: Any, answer: Any) -> GuardrailFunctionOutput:
        return GuardrailFunctionOutput(None, False)

    @tool_input_guardrail(name="no big numbers")
    def small(data: Any) -> ToolGuardrailFunctionOutput:
        if "100" in data.context.tool_arguments:
            return ToolGuardrailFunctionOutput.reject_content("too big")
        return ToolGuardrailFunctionOutput.allow()

    @tool_output_guardrail(name="no secrets")
    async def open_only(data: Any) -> ToolGuardrailFunctionOutput:
        return ToolGuardrailFunctionOutput.allow()

    @function_tool(tool_input_guardrails=[small], tool_output_guardrails=[open_only])
    async def double(a: int) -> int:
        """Double."""
        return 2 * a

    agent = calculator(double, input_guardrails=[polite], output_guardrails=[answers])
    calls = [asks("double", '{"a": 100}', "c1"), asks("double", '{"a": 1}', "c2")]
    got = await record(capture, agent, [calls, [assistant_message("done")]])
    assert is_whole(got)
    names = {span.span_id: span.name for span in got.trace.spans}
    found = [(span.name, names[span.parent_id or ""], span.attributes) for span in got.of("GUARDRAIL")]
    assert ("asked politely", "calc", {}) in found
    assert ("answers politely", "calc", {}) in found
    assert sorted(found[i][:2] for i in range(len(found)) if found[i][1] == "double") == [
        ("no big numbers", "double"),
        ("no big numbers", "double"),
        ("no secrets", "double"),
    ]
    assert [each[0] for each in found if TRIGGERED in each[2]] == ["no big numbers"]
    assert outcome(got.trace)[:3] == (False, False, True)


async def test_guardrail_of_a_tool_that_ends_the_run(capture):
    """A tool's guardrail that raises is marked, and the run failed."""

    @tool_input_guardrail
    def never(data: Any) -> ToolGuardrailFunctionOutput:
        return ToolGuardrailFunctionOutput.raise_exception()

    @function_tool(tool_input_guardrails=[never])
    async def act() -> str:
        """Act."""
        return "acted"

    got = await record(capture, calculator(act), [[asks("act", "{}")]])
    (span,) = got.of("GUARDRAIL")
    assert isinstance(got.error, ToolInputGuardrailTripwireTriggered)
    assert (span.name, span.attributes) == ("never", {TRIGGERED: True})
    assert outcome(got.trace).failed


async def test_hosted_tools(capture):
    """Tools that the model's provider ran are spans below the model's call, and no part of its text."""
    source = response_file_search_tool_call.Result(file_id="f1", filename="a.md", score=0.5, text="about x")
    search = response_function_web_search.ActionSearch(type="search", query="x")
    items = [
        ResponseFileSearchToolCall(
            id="1", queries=["x"], results=[source], status="completed", type="file_search_call"
        ),
        ResponseFunctionWebSearch(id="2", action=search, status="failed", type="web_search_call"),
        ResponseCodeInterpreterToolCall(
            id="3", code="1 + 1", container_id="c", outputs=[], status="completed", type="code_interpreter_call"
        ),
        McpCall(id="4", name="lookup", server_label="crm", arguments='{"a": 1}', output="found", type="mcp_call"),
        assistant_message("done"),
    ]
    got = await record(capture, calculator(), [items])
    model_call, *tools = got.trace.spans[1:]
    assert is_whole(got)
    assert {span.parent_id for span in tools} == {model_call.span_id}
    assert [(span.kind, span.name, span.error is None) for span in tools] == [
        ("RETRIEVER", "file_search", True),
        ("TOOL", "web_search", False),
        ("TOOL", "code_interpreter", True),
        ("TOOL", "lookup", True),
    ]
    assert tools[0].inputs == {"queries": ["x"]}
    about = {"doc_uri": "a.md", "score": 0.5}
    assert tools[0].outputs == [{"page_content": "about x", "metadata": about, "id": "f1"}]
    assert (tools[3].inputs, tools[3].outputs) == ({"server_label": "crm", "arguments": {"a": 1}}, "found")
    assert model_call.outputs["choices"][0]["message"] == {"role": "assistant", "content": "done"}


@pytest.mark.parametrize(
    ("arguments", "attributes"),
    [
        ('{"a": 1, "b": 2}', {VALID: True}),
        ('{"a": "secret", "b": 2}', {VALID: False, ERROR: "a: type"}),
        ('{"a": 1}', {VALID: False, ERROR: "arguments: required b"}),
        ('{"a": 1, "b": 2, "secret": 3}', {VALID: False, ERROR: "arguments: additionalProperties"}),
        ('{"a": 1,', {VALID: False, ERROR: "not JSON"}),
    ],
)
async def test_arguments_are_checked(capture, arguments, attributes):
    """A tool's span says whether its arguments fit its schema, and if not, where, without the value."""
    got = await record(capture, calculator(), [[asks("add", arguments)], [assistant_message("done")]])
    assert got.of("TOOL")[0].attributes == attributes


@pytest.mark.parametrize(
    "schema", [{"type": 7}, {"$ref": "http://127.0.0.1:1/schema"}, {"pattern": "(?=a)(?!b)"}, object()]
)
def test_schema_that_cannot_be_used(schema):
    """A schema that is not one, or would need a request or a slow pattern, gives no verdict."""
    assert check_arguments({"a": 1}, schema) == {}


def test_pattern_takes_linear_time():
    """A pattern that backtracking engines choke on is checked at once."""
    schema = {"properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}}
    assert check_arguments({"a": "a" * 100_000 + "b"}, schema)[VALID] is False


async def test_tool_that_is_not_there(capture):
    """A call of a tool that the model was not offered is a failed span; calls of the others are seen as ever."""
    got = await record(capture, calculator(), [[asks("add"), asks("subtract", '{"a": 1}', "c2")]])
    failed = [span for span in got.of("TOOL") if span.error]
    assert is_whole(got)
    assert [(span.name, span.inputs) for span in failed] == [("subtract", {"a": 1})]
    assert failed[0].error.type == "UnknownTool"
    assert got.root.error is not None
    assert outcome(got.trace).tool_failed


@pytest.mark.parametrize("streamed", [False, True])
async def test_usage_in_detail(capture, streamed):
    """Cached and reasoning tokens are kept, streamed or not."""
    usage = Usage(
        input_tokens=10,
        output_tokens=4,
        total_tokens=14,
        input_tokens_details=InputTokensDetails(cached_tokens=6, cache_write_tokens=2),
        output_tokens_details=OutputTokensDetails(reasoning_tokens=3),
    )
    model = ScriptedModel([[assistant_message("3")]], default_usage=usage)
    call = (await record(capture, calculator(), model, streamed=streamed)).trace.spans[1]
    assert call.attributes[TOKEN_USAGE] == {
        "input_tokens": 10,
        "output_tokens": 4,
        "total_tokens": 14,
        "cache_read_input_tokens": 6,
        "cache_creation_input_tokens": 2,
    }
    assert call.attributes[REASONING_TOKENS] == 3


async def test_time_to_first_token(capture):
    """A streamed call says when its first token came, the root when the client's first text did."""
    model = Streaming([[asks("add")], [assistant_message("3")]])
    got = await record(capture, calculator(), model, streamed=True)
    second = got.of("CHAT_MODEL")[1]
    assert 0 <= second.attributes[FIRST_TOKEN_S] <= (second.end_ns - second.start_ns) / 1e9
    from_begin = (second.start_ns - got.root.start_ns) / 1e9
    assert got.root.attributes[FIRST_TOKEN_S] == pytest.approx(from_begin + second.attributes[FIRST_TOKEN_S])
    silent = await record(capture, calculator(), scripted([assistant_message("3")]))
    assert not any(FIRST_TOKEN_S in span.attributes for span in silent.trace.spans)


@pytest.mark.parametrize("streamed", [False, True])
async def test_cancelled_in_a_tool(capture, streamed):
    """A run that is cancelled says so on its root and on what was cut off; its tree is whole."""
    waits = asyncio.Event()

    @function_tool
    async def wait() -> str:
        """Wait."""
        with mlflow.start_span("waiting"):
            waits.set()
            await asyncio.Event().wait()
        return "never"

    task = asyncio.create_task(record(capture, calculator(wait), [[asks("wait", "{}")]], streamed=streamed))
    await waits.wait()
    task.cancel()
    got = await task
    tool, waiting = got.trace.spans[2:]
    assert is_whole(got)
    assert (got.root.error.type, got.root.attributes) == ("CANCELLED", {CANCELLED: True})
    assert (tool.name, tool.error.type, tool.attributes[CUT_OFF]) == ("wait", "CANCELLED", True)
    assert (waiting.name, waiting.parent_id) == ("waiting", tool.span_id)


async def test_cancelled_in_a_stream(capture):
    """A model call that was cut off in the middle of its stream says so, and when its text began if it had."""
    model = Streaming([[assistant_message("3")]])
    model.gate, model.waits = asyncio.Event(), asyncio.Event()
    task = asyncio.create_task(record(capture, calculator(), model, streamed=True))
    await model.waits.wait()
    task.cancel()
    got = await task
    call = got.trace.spans[1]
    assert is_whole(got)
    assert (call.kind, call.error.type, call.attributes[CUT_OFF]) == ("CHAT_MODEL", "CANCELLED", True)


async def test_outcome(capture):
    """A run that went well gives no grounds to keep it."""
    got = await record(capture, calculator(), [[assistant_message("3")]])
    duration_s = (got.trace.ended_ns - got.trace.started_ns) / 1e9
    assert outcome(got.trace) == Outcome(False, False, False, duration_s)


async def test_first_agent_again(capture):
    """An agent that gets the conversation back has a span of its own, below the root."""
    poet = Agent(name="Poet")
    first = calculator(handoffs=[poet])
    poet.handoffs = [first]
    steps = [[asks("transfer_to_poet", "{}")], [asks("transfer_to_calculator", "{}", "c2")], [assistant_message("3")]]
    got = await record(capture, first, steps)
    names = {span.span_id: span.name for span in got.trace.spans}
    assert is_whole(got)
    assert [(span.name, names[span.parent_id or ""]) for span in got.of("AGENT")[1:]] == [
        ("Poet", "calc"),
        ("Calculator", "calc"),
    ]
    assert [span.outputs is not None for span in got.of("AGENT")] == [True, True, True]
    assert not [span for span in got.trace.spans if span.error]


async def test_two_hundred_streams_at_once(capture):
    """Two hundred streams, all in their tools at once and then all in their answers, give as many whole trees."""
    count = 200
    in_tools, in_answers = asyncio.Barrier(count), asyncio.Barrier(count)

    class Gated(Streaming):
        async def stream_response(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            async for event in super().stream_response(*args, **kwargs):
                if event.type.endswith("text.delta"):
                    await in_answers.wait()
                yield event

    @function_tool
    async def work(number: int) -> int:
        """Work in a span of one's own, while all others do."""
        with mlflow.start_span(f"work {number}") as span:
            span.set_inputs({"number": number})
            await in_tools.wait()
            mlflow.update_current_trace(tags={"number": str(number)})
            return await asyncio.to_thread(square, number)

    @mlflow.trace
    def square(number: int) -> int:
        return number * number

    runs = [
        record(
            capture,
            calculator(work),
            Gated([[asks("work", f'{{"number": {number}}}')], [assistant_message(str(number))]]),
            question=str(number),
            streamed=True,
        )
        for number in range(count)
    ]
    for number, got in enumerate(await asyncio.gather(*runs)):
        names = {span.span_id: span.name for span in got.trace.spans}
        assert is_whole(got)
        assert [(span.name, names.get(span.parent_id or "")) for span in got.trace.spans] == [
            ("calc", None),
            ("scripted", "calc"),
            ("work", "calc"),
            (f"work {number}", "work"),
            ("square", f"work {number}"),
            ("scripted", "calc"),
        ]
        assert (got.trace.spans[4].outputs, got.trace.tags) == (number * number, {"number": str(number)})
        assert got.root.inputs["messages"][0]["content"] == str(number)
        assert not any(span.error for span in got.trace.spans)


@pytest.mark.parametrize(
    ("base_url", "provider"),
    [
        (None, "openai"),
        ("https://eu.api.openai.com/v1", "openai"),
        ("https://shop.openai.azure.com/openai/v1", "azure"),
        ("https://api.groq.com/openai/v1", "groq"),
        ("https://notopenai.com/v1", "notopenai.com"),
        ("http://localhost:8080/v1", "localhost"),
    ],
)
def test_provider(base_url, provider):
    """Who runs a model is told by its client's host."""
    model = OpenAIResponsesModel("gpt-x", AsyncOpenAI(api_key="sk-1", base_url=base_url))
    assert provider_of(model, "gpt-x") == provider
    assert provider_of(scripted(), "x") is None
