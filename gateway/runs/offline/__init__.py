"""The offline model: a deterministic stand-in for the language model, used when none is configured.

An agent folder may carry an `offline.py` with a *decider*: a plain function that looks at the conversation the way a
model would (`View`) and says what comes next: a text, one tool `Call`, or several calls at once. `OfflineModel` turns
that decision into what a real model would have sent, so everything around it (runner, tools, sessions, streaming,
tracing) is exercised for real.

What a request brings along is beyond a decider, so `OfflineModel` sees to it: it calls the client's own tools where the
user speaks of them, and puts an answer into the JSON that the client asked for.

It is no intelligence: whatever answers with it is labelled as offline, and a configured model always takes its place.
"""

from __future__ import annotations

import ast
import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias
from uuid import uuid4

from agents import Agent, Handoff, Model, ModelResponse, ModelSettings, Tool, TResponseInputItem, Usage
from agents.agent_output import AgentOutputSchemaBase
from agents.items import TResponseOutputItem, TResponseStreamEvent
from openai.types.responses import (
    Response,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseTextDeltaEvent,
    ResponseUsage,
)
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails

from gateway.runs.offline.events import message_text, response_events, text_part
from gateway.runs.offline.filling import answer_from, arguments_from
from gateway.runs.offline.tools import choose_client_tool, is_client_tool

CHARACTERS_PER_TOKEN = 4
"""The usual rule of thumb for English text; the offline model has no tokenizer to count with."""


@dataclass(frozen=True, init=False)
class Call:
    """A decision to call the tool `name` with keyword `arguments`, as in `Call("add", a=1, b=2)`."""

    name: str
    arguments: Mapping[str, Any]

    def __init__(self, name: str, /, **arguments: Any) -> None:
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "arguments", arguments)


class ToolResult(NamedTuple):
    """One finished tool call: which tool, with which arguments, and its output as the model reads it."""

    name: str
    arguments: dict[str, Any]
    output: str

    def value(self) -> Any:
        """The output as data.

        The SDK hands a tool's dict or list to the model in Python notation and a tool may return JSON itself; both
        are understood. Text that is neither, such as an error message, comes back as it is.
        """
        for parse in (json.loads, ast.literal_eval):
            try:
                return parse(self.output)
            except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):  # all that a parser may raise
                continue
        return self.output


@dataclass(frozen=True)
class View:
    """What a model would see of the conversation.

    Attributes:
        user_texts: the text of every user message, oldest first.
        assistant_texts: the text of every assistant message, oldest first.
        tool_results_this_turn: the tool calls finished since the last user message, in order.
        history: the input items as they came, for whatever the other fields leave out.
    """

    user_texts: list[str] = field(default_factory=list)
    assistant_texts: list[str] = field(default_factory=list)
    tool_results_this_turn: list[ToolResult] = field(default_factory=list)
    history: Sequence[Mapping[str, Any]] = ()

    @property
    def last_user(self) -> str:
        """The text of the newest user message; empty when there is none."""
        return self.user_texts[-1] if self.user_texts else ""

    @classmethod
    def of(cls, model_input: str | Sequence[Any]) -> View:
        """Read a model's input: a bare text, or a list of items in the Responses format."""
        if isinstance(model_input, str):
            model_input = [{"role": "user", "content": model_input}]
        view = cls(history=[item for item in model_input if isinstance(item, Mapping)])
        calls: dict[str, Mapping[str, Any]] = {}
        for item in view.history:
            match item.get("type", "message"):
                case "message" if item.get("role") == "user":
                    view.user_texts.append(_text(item.get("content")))
                    view.tool_results_this_turn.clear()
                case "message" if item.get("role") == "assistant":
                    view.assistant_texts.append(_text(item.get("content")))
                case "function_call":
                    calls[item["call_id"]] = item
                case "function_call_output" if call := calls.get(item["call_id"]):
                    result = ToolResult(call["name"], _arguments(call["arguments"]), _text(item.get("output")))
                    view.tool_results_this_turn.append(result)
        return view


Decider: TypeAlias = Callable[[View], str | Call | list[Call]]
"""Decides what the model does next: say a text, call a tool, or call several at once."""


class OfflineModel(Model):
    """Plays the language model by asking a decider: the same conversation always gets the same answer.

    A tool that the client brought along (`is_client_tool`) is called when the user speaks of it; what it gave is then
    repeated in a plain sentence. With an output schema, each text becomes JSON that is valid against it.

    Token usage is an estimate, about one token per 4 characters: the input counts the instructions, the messages and
    the tool calls and outputs in the history (tool definitions are left out), the output counts the answer or the
    tool arguments. Only ids and the creation time differ between two equal calls; call ids never repeat.

    Args:
        decide: the decider; it must be quick and free of side effects, since it runs on the event loop.
        name: the model name written into responses.
        pause_s: seconds to wait after each word of a stream.
    """

    def __init__(self, decide: Decider, name: str = "offline", pause_s: float = 0.0) -> None:
        self.name = name
        self._decide = decide
        self._pause_s = pause_s

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],  # noqa: A002 - the SDK's name for it
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff[Any, Agent[Any]]],
        *_tracing: Any,
        **_options: Any,
    ) -> ModelResponse:
        """Answer in one piece."""
        view = View.of(input)
        output = self._output(view, model_settings, tools, output_schema, handoffs)
        usage = _usage(system_instructions, view, output)
        return ModelResponse(
            output=output,
            usage=Usage(
                requests=1,
                input_tokens=usage.input_tokens,
                output_tokens=usage.output_tokens,
                total_tokens=usage.total_tokens,
            ),
            response_id=_new_id("resp"),
        )

    async def stream_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],  # noqa: A002 - the SDK's name for it
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff[Any, Agent[Any]]],
        *_tracing: Any,
        **_options: Any,
    ) -> AsyncIterator[TResponseStreamEvent]:
        """Answer as a stream of Responses events, a text word by word."""
        view = View.of(input)
        output = self._output(view, model_settings, tools, output_schema, handoffs)
        started = Response(
            id=_new_id("resp"),
            created_at=int(time.time()),
            model=self.name,
            object="response",
            output=[],
            parallel_tool_calls=True,
            status="in_progress",
            tool_choice="auto",
            tools=[],
        )
        for event in response_events(started, output, _usage(system_instructions, view, output)):
            yield event
            if isinstance(event, ResponseTextDeltaEvent):
                # Even without a pause: other streams get their turn between two words.
                await asyncio.sleep(self._pause_s)

    def _output(
        self,
        view: View,
        settings: ModelSettings,
        tools: Sequence[Tool],
        schema: AgentOutputSchemaBase | None,
        handoffs: Sequence[Handoff[Any, Agent[Any]]],
    ) -> list[TResponseOutputItem]:
        decision = _repeated(view, tools, handoffs) or self._decision(view, tools, settings.tool_choice)
        if isinstance(decision, str):
            if schema is not None and not schema.is_plain_text():
                decision = json.dumps(answer_from(decision, schema.json_schema()), ensure_ascii=False)
            return [_message(decision)]
        return [_function_call(call) for call in decision]

    def _decision(self, view: View, tools: Sequence[Tool], tool_choice: Any) -> str | list[Call]:
        decision = self._decide(view)
        if isinstance(decision, Call):
            decision = [decision]
        if view.history and view.history[-1].get("role") == "user":
            decided = [] if isinstance(decision, str) else [call.name for call in decision]
            if tool := choose_client_tool(view.last_user, tools, tool_choice, decided):
                return [Call(tool.name, **arguments_from(view.last_user, tool.params_json_schema))]
        return decision


def _repeated(view: View, tools: Sequence[Tool], handoffs: Sequence[Handoff[Any, Agent[Any]]]) -> str | None:
    """What the client's tools gave, in words; None unless one of them was the last that was called.

    A tool that nobody knows is taken for one of the client, who need not bring it again along with its output.
    """
    own = {tool.name for tool in tools if not is_client_tool(tool)} | {handoff.tool_name for handoff in handoffs}
    results = [result for result in view.tool_results_this_turn if result.name not in own and not _is_handoff(result)]
    if not results or results[-1] is not view.tool_results_this_turn[-1]:
        return None
    return " ".join(f"{result.name} says: {result.output.strip().rstrip('.') or 'nothing'}." for result in results)


def _is_handoff(result: ToolResult) -> bool:
    """Whether the SDK answered a handoff with it, to an agent that may not know the handoff by name."""
    return result.output.startswith('{"assistant": ')


def _message(text: str) -> ResponseOutputMessage:
    return ResponseOutputMessage(
        id=_new_id("msg"), type="message", role="assistant", status="completed", content=[text_part(text)]
    )


def _function_call(call: Call) -> ResponseFunctionToolCall:
    return ResponseFunctionToolCall(
        id=_new_id("fc"),
        call_id=_new_id("call"),
        type="function_call",
        name=call.name,
        arguments=json.dumps(call.arguments),
        status="completed",
    )


def _usage(instructions: str | None, view: View, output: Sequence[TResponseOutputItem]) -> ResponseUsage:
    # Rounded up, so that nothing that was sent counts as free.
    input_tokens = -(-(len(instructions or "") + _characters(view.history)) // CHARACTERS_PER_TOKEN)
    output_tokens = -(-sum(map(_length, output)) // CHARACTERS_PER_TOKEN)
    return ResponseUsage(
        input_tokens=input_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
        output_tokens=output_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=input_tokens + output_tokens,
    )


def _text(content: Any) -> str:
    """The text of a message's content or of a tool's output, which is a text or a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        return ""
    return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))


def _arguments(encoded: str) -> dict[str, Any]:
    try:
        arguments = json.loads(encoded)
    except ValueError:  # a real model may have written this part of the history, and models write broken JSON
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _characters(history: Sequence[Mapping[str, Any]]) -> int:
    return sum(
        len(_text(item.get("content"))) + len(item.get("arguments") or "") + len(_text(item.get("output")))
        for item in history
    )


def _length(item: TResponseOutputItem) -> int:
    if isinstance(item, ResponseFunctionToolCall):
        return len(item.name) + len(item.arguments)
    return len(message_text(item)) if isinstance(item, ResponseOutputMessage) else 0


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"
