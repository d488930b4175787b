"""One run in the SDK: what the model sees of a conversation, and what the SDK is spared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import agents as sdk
import pytest
from agents import Agent, GuardrailFunctionOutput, ModelSettings, input_guardrail
from agents.testing import ScriptedModel, assistant_message, function_call

from gateway.plugins import AgentPlugin
from gateway.runs.execution import AgentExecutor
from gateway.settings import Settings
from gateway.tracing.capture import SpanCapture

from .recorded import add, begun, scripted

SAID: list[Any] = [
    {"role": "user", "content": "What is 1 plus 1?"},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "2", "annotations": []}]},
]
ASKED: list[Any] = [{"role": "user", "content": "And 2 plus 3?"}]

Executor = Callable[..., tuple[AgentExecutor, AgentPlugin]]


@pytest.fixture
def executor(tmp_path: Path) -> Executor:
    """An executor of one agent, and the agent."""

    def make(agent: Agent[Any], model: ScriptedModel) -> tuple[AgentExecutor, AgentPlugin]:
        plugin = AgentPlugin("calc", agent, model, "v1", tmp_path, 0)
        return AgentExecutor(Settings(home=tmp_path), {"calc": plugin}, SpanCapture()), plugin

    return make


def sums() -> ScriptedModel:
    """Return a model that adds once and answers."""
    return scripted([function_call("add", {"a": 2, "b": 3}, call_id="c-1")], [assistant_message("5")])


async def test_the_model_sees_the_earlier_turns_in_each_of_its_calls(executor) -> None:
    """Earlier turns stand before the request's own items in every model call, though the SDK is spared them."""
    model, spared = sums(), []

    async def instructions(context: Any, _agent: Any) -> str:
        spared.append(list(context.turn_input))
        return "Add."

    agent = Agent("calc", instructions=instructions, tools=[add], model_settings=ModelSettings(temperature=0.5))
    executing, plugin = executor(agent, model)
    outcome = await executing.execute(plugin, [*SAID, *ASKED], begun(), history=2)
    assert [call.input[:3] for call in model.calls] == [[*SAID, *ASKED]] * 2
    assert [len(call.input) for call in model.calls] == [3, 5]
    assert [call.model_settings.temperature for call in model.calls] == [0.5, 0.5]
    assert spared[0] == ASKED
    assert outcome.answer == "5"
    assert [item["type"] for item in outcome.items] == ["function_call", "function_call_output", "message"]


async def test_a_guardrail_sees_the_whole_conversation(executor) -> None:
    """An agent's input guardrail is given the earlier turns too."""
    seen: list[Any] = []

    @input_guardrail
    async def note(_context: Any, _agent: Any, asked: Any) -> GuardrailFunctionOutput:
        seen.extend(asked)
        return GuardrailFunctionOutput(None, tripwire_triggered=False)

    executing, plugin = executor(Agent("calc", tools=[add], input_guardrails=[note]), sums())
    await executing.execute(plugin, [*SAID, *ASKED], begun(), history=2)
    assert seen == [*SAID, *ASKED]


@pytest.mark.parametrize("asked", ["hooks", "handoffs", "approvals"])
async def test_who_else_looks_at_the_conversation_gets_it(executor, asked) -> None:
    """With hooks, handoffs or approvals the SDK is given the whole conversation."""
    waits = sdk.function_tool(add.on_invoke_tool, name_override="waits", needs_approval=True, strict_mode=False)
    own = {
        "hooks": {"hooks": sdk.AgentHooks()},
        "handoffs": {"handoffs": [Agent("other")]},
        "approvals": {"tools": [waits]},
    }[asked]
    seen: list[Any] = []

    async def instructions(context: Any, _agent: Any) -> str:
        seen.append(list(context.turn_input))
        return "Add."

    model = scripted([assistant_message("5")])
    executing, plugin = executor(Agent("calc", instructions=instructions, **own), model)
    await executing.execute(plugin, [*SAID, *ASKED], begun(), history=2)
    assert seen == [[*SAID, *ASKED]]
    assert model.calls[0].input == [*SAID, *ASKED]
