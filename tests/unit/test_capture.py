"""From the SDK's spans to one clean tree a run: the real runner, a scripted model, the real capture."""

import asyncio
from collections.abc import Iterator
from typing import Any

import agents as sdk
import pytest
from agents import (
    Agent,
    GuardrailFunctionOutput,
    InputGuardrailTripwireTriggered,
    RunConfig,
    Runner,
    custom_span,
    function_tool,
    input_guardrail,
)
from agents.testing import ScriptedModel, assistant_message

from gateway.tracing.capture import CHAT_TOOLS, MODEL, PROVIDER, TOKEN_USAGE, RunCapture, SpanCapture, assemble
from gateway.tracing.spans import SpanError, Trace, decode, encode

from .recorded import Captured, add, asks, calculator, is_whole, record


@function_tool
async def fails(a: int) -> int:
    """Fail, leaving it to the SDK what the model is told."""
    raise LookupError(f"no row {a}")


def _tell(_context: Any, error: Exception) -> str:
    return f"sorry: {error}"


@function_tool(failure_error_function=_tell)
async def apologises(a: int) -> int:
    """Fail, telling the model in its author's own words."""
    raise LookupError(f"no row {a}")


@function_tool
async def search(query: str) -> str:
    """Search, with a span of its own."""
    with custom_span("index", {"span_type": "RETRIEVER", "inputs": {"query": query}, "outputs": ["doc"]}):
        return "found"


@pytest.fixture
def capture() -> Iterator[SpanCapture]:
    """The capture, installed as in the web process."""
    capture = SpanCapture()
    capture.install()
    yield capture
    capture.uninstall()


@pytest.fixture
def run(capture):
    """Run an agent on a script as the gateway does, and return its trace."""

    async def start(agent: Agent[Any], *steps: Any, question: str = "go", streamed: bool = False) -> Captured:
        return await record(capture, agent, steps, question, streamed)

    return start


SHAPE = [
    ("AGENT", "calc", None),
    ("CHAT_MODEL", "scripted", "calc"),
    ("TOOL", "add", "calc"),
    ("CHAT_MODEL", "scripted", "calc"),
]


@pytest.mark.parametrize("streamed", [False, True])
async def test_one_tree(run, streamed):
    """A run with a tool is agent, model call, tool, model call: one root, and nothing the SDK adds around them."""
    got = await run(calculator(), [asks("add")], [assistant_message("3")], question="1 + 2?", streamed=streamed)

    assert is_whole(got)
    assert got.shape() == SHAPE
    assert got.root.inputs == {"messages": [{"role": "user", "content": "1 + 2?"}]}
    assert got.root.outputs == {"messages": [{"role": "assistant", "content": "3"}]}
    assert not any(span.error for span in got.trace.spans)


@pytest.mark.parametrize("streamed", [False, True])
async def test_model_call(run, streamed):
    """A model call has its messages, the tools it was offered, its answer, and what it used."""
    got = await run(calculator(), [asks("add")], [assistant_message("3")], question="1 + 2?", streamed=streamed)
    first, second = got.of("CHAT_MODEL")

    asked = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1 + 2?"}]
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert first.inputs["messages"] == asked
    assert first.outputs == {"choices": [{"index": 0, "message": calling}]}
    assert second.inputs["messages"] == [*asked, calling, {"role": "tool", "tool_call_id": "c1", "content": "3"}]
    assert second.outputs["choices"][0]["message"] == {"role": "assistant", "content": "3"}
    for span in (first, second):
        (tool,) = span.attributes[CHAT_TOOLS]
        assert (tool["type"], tool["function"]["name"]) == ("function", "add")
        assert tool["function"]["description"] == "Add two numbers."
        assert set(tool["function"]["parameters"]["required"]) == {"a", "b"}
        assert span.attributes[TOKEN_USAGE] == {"input_tokens": 7, "output_tokens": 3, "total_tokens": 10}
        assert (span.attributes[MODEL], span.attributes[PROVIDER]) == ("scripted", "lab")


async def test_tool_call(run):
    """A tool's span has its arguments as an object, and its result."""
    (tool,) = (await run(calculator(), [asks("add")], [assistant_message("3")])).of("TOOL")
    assert (tool.inputs, str(tool.outputs), tool.error) == ({"a": 1, "b": 2}, "3", None)


async def test_parallel_tool_calls(run):
    """Calls made in one go are siblings, each with its own arguments."""
    calls = [asks("add", f'{{"a": {number}, "b": 1}}', f"c{number}") for number in range(5)]
    got = await run(calculator(), calls, [assistant_message("done")])
    assert is_whole(got)
    assert {(span.inputs["a"], str(span.outputs)) for span in got.of("TOOL")} == {(n, str(n + 1)) for n in range(5)}
    assert {span.parent_id for span in got.of("TOOL")} == {got.root.span_id}


@pytest.mark.parametrize("tool", [fails, apologises], ids=["the SDK's words", "its author's words"])
@pytest.mark.parametrize("streamed", [False, True])
async def test_failing_tool(run, tool, streamed):
    """A tool that fails has the real reason on its span, whatever the model was told; the run goes on."""
    got = await run(
        calculator(tool), [asks(tool.name, '{"a": 7}')], [assistant_message("It failed.")], streamed=streamed
    )
    (span,) = got.of("TOOL")
    assert is_whole(got)
    assert "no row 7" in span.error.message
    assert got.root.error is None
    assert got.error is None


async def test_one_of_two_tools_fails(run):
    """Of two parallel calls only the one that failed says so."""
    calls = [asks("fails", '{"a": 7}', "c1"), asks("add", call_id="c2")]
    got = await run(calculator(fails, add), calls, [assistant_message("done")])
    errors = {span.name: span.error for span in got.of("TOOL")}
    assert errors["add"] is None
    assert errors["fails"] == SpanError("LookupError", "no row 7")


async def test_arguments_that_are_not_json(run):
    """Arguments that are not JSON stay the text that the model wrote, on a span that failed."""
    got = await run(calculator(), [asks("add", '{"a": 1,')], [assistant_message("done")])
    (span,) = got.of("TOOL")
    assert is_whole(got)
    assert span.inputs == '{"a": 1,'
    assert span.error is not None


async def test_handoff(run):
    """A handoff stays one tree: the second agent's span lies below the root, with its model call in it."""
    poet = Agent(name="Poet", instructions="Rhyme.")
    got = await run(calculator(handoffs=[poet]), [asks("transfer_to_poet", "{}")], [assistant_message("Two plus two")])
    assert is_whole(got)
    assert got.shape() == [
        ("AGENT", "calc", None),
        ("CHAT_MODEL", "scripted", "calc"),
        ("HANDOFF", "handoff to Poet", "calc"),
        ("AGENT", "Poet", "calc"),
        ("CHAT_MODEL", "scripted", "Poet"),
    ]
    assert got.of("HANDOFF")[0].inputs == {"from_agent": "Calculator", "to_agent": "Poet"}
    offered = [tool["function"]["name"] for tool in got.of("CHAT_MODEL")[0].attributes[CHAT_TOOLS]]
    assert offered == ["add", "transfer_to_poet"]


@pytest.mark.parametrize("triggered", [False, True])
async def test_guardrail(run, triggered):
    """A guardrail is a span of its own that says whether it stopped the run."""

    @input_guardrail(name="polite")
    async def polite(context: Any, agent: Any, question: Any) -> GuardrailFunctionOutput:
        return GuardrailFunctionOutput(output_info=None, tripwire_triggered=triggered)

    got = await run(calculator(input_guardrails=[polite]), [assistant_message("fine")])
    (span,) = got.of("GUARDRAIL")
    assert is_whole(got)
    assert (span.name, span.outputs) == ("polite", {"triggered": triggered})
    assert isinstance(got.error, InputGuardrailTripwireTriggered) is triggered
    assert (got.root.error is not None) is triggered


async def test_custom_span(run):
    """A span that a tool's author makes lies below the tool, with the kind its author gave it."""
    got = await run(calculator(search), [asks("search", '{"query": "x"}')], [assistant_message("done")])
    (tool,), (index,) = got.of("TOOL"), got.of("RETRIEVER")
    assert is_whole(got)
    assert index.parent_id == tool.span_id
    assert (index.name, index.inputs, index.outputs) == (
        "index",
        {"query": "x"},
        [{"page_content": "doc", "metadata": {}}],
    )


@pytest.mark.parametrize("streamed", [False, True])
async def test_model_error(run, streamed):
    """A model call that fails says why, below a root that failed too and has no answer."""
    got = await run(calculator(), [asks("add")], ConnectionError("no route"), streamed=streamed)
    assert is_whole(got)
    assert got.shape() == SHAPE
    first, second = got.of("CHAT_MODEL")
    assert first.error is None
    assert "ConnectionError: no route" in second.error.message
    assert second.outputs is None
    assert got.root.error.type == "ConnectionError"
    assert got.root.outputs is None


@pytest.mark.parametrize("streamed", [False, True])
async def test_fifty_at_once(run, streamed):
    """Fifty runs at once give fifty separate whole trees."""
    runs = [
        run(
            calculator(),
            [asks("add", f'{{"a": {n}, "b": 0}}')],
            [assistant_message(str(n))],
            question=str(n),
            streamed=streamed,
        )
        for n in range(50)
    ]
    for number, got in enumerate(await asyncio.gather(*runs)):
        assert is_whole(got)
        assert got.shape() == SHAPE
        assert got.root.inputs["messages"][0]["content"] == str(number)
        assert got.of("TOOL")[0].inputs == {"a": number, "b": 0}
        assert got.root.outputs["messages"][0]["content"] == str(number)


async def test_runs_of_others(capture, run):
    """Spans of runs that were not begun, and of runs that have ended, are passed over and nothing is kept of them."""
    await Runner.run(calculator(), "go", run_config=RunConfig(model=ScriptedModel([[assistant_message("x")]])))
    got = await run(calculator(), [assistant_message("3")])
    assert got.shape() == [SHAPE[0], SHAPE[1]]
    assert capture._runs == {}


async def test_run_without_spans():
    """A run that ended before its first span is a root alone."""
    trace = Trace("tr-" + "a" * 32, "calc", "v1", "s", None, False, 1, 2, [], SpanError("RUN_TIMEOUT", "too long"))
    (root,) = assemble(RunCapture(trace, [{"role": "user", "content": "hi"}], sampled=True)).spans
    assert (root.parent_id, root.span_id, root.outputs, root.error) == (None, "a" * 16, None, trace.error)


async def test_encode_and_decode(run):
    """A trace comes back from its encoded form as it was."""
    trace = (await run(calculator(), [asks("add")], [assistant_message("3")])).trace
    assert decode(encode(trace)) == trace
    assert trace.duration_ms == pytest.approx((trace.ended_ns - trace.started_ns) / 1e6)


async def test_encode_what_has_no_form(run):
    """Results and arguments that msgpack has no form for, numbers beyond 64 bits among them, do not cost the trace."""

    @function_tool
    async def odd(a: int) -> Any:
        """Return something odd."""
        return {"number": 2**100, "error": ValueError("x"), "set": {1}}

    got = await run(calculator(odd), [asks("odd", f'{{"a": {2**100}}}')], [assistant_message("done")])
    (tool,) = decode(encode(got.trace)).spans[2:3]
    assert str(2**100) in str(tool.inputs)
    assert str(2**100) in str(tool.outputs)


def test_sdk_is_the_sdk():
    """What these tests run is the SDK's own runner."""
    assert sdk.Runner.__module__.startswith("agents.")
