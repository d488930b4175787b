"""The offline model: a deterministic stand-in for the language model, used when none is configured.

An agent folder may carry an `offline.py` with a *decider*: a plain function that looks at the conversation the way a
model would (`View`) and says what comes next: a text, one tool `Call`, or several calls at once. `OfflineModel` turns
that decision into what a real model would have sent, so everything around it (runner, tools, sessions, streaming,
tracing) is exercised for real.

It is no intelligence: whatever answers with it is labelled as offline, and a configured model always takes its place.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias
from uuid import uuid4

from agents import Model, ModelResponse, TResponseInputItem, Usage
from agents.items import TResponseOutputItem, TResponseStreamEvent
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCreatedEvent,
    ResponseFunctionCallArgumentsDeltaEvent,
    ResponseFunctionCallArgumentsDoneEvent,
    ResponseFunctionToolCall,
    ResponseInProgressEvent,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
    ResponseUsage,
)
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails

CHARACTERS_PER_TOKEN = 4
"""The usual rule of thumb for English text; the offline model has no tokenizer to count with."""

_WORD = re.compile(r"\S+\s*|\s+")


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
                    result = ToolResult(call["name"], _arguments(call["arguments"]), _text(item["output"]))
                    view.tool_results_this_turn.append(result)
        return view


Decider: TypeAlias = Callable[[View], str | Call | list[Call]]
"""Decides what the model does next: say a text, call a tool, or call several at once."""


class OfflineModel(Model):
    """Plays the language model by asking a decider: the same conversation always gets the same answer.

    Token usage is an estimate, about one token per 4 characters: the input counts the instructions, the messages and
    the tool calls and outputs in the history (tool definitions are left out), the output counts the answer or the
    tool arguments. Only ids and the creation time differ between two equal calls; call ids never repeat.

    Args:
        decide: the decider; it must be quick and free of side effects, since it runs on the event loop.
        name: the model name written into responses.
    """

    def __init__(self, decide: Decider, name: str = "offline") -> None:
        self.name = name
        self._decide = decide

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],  # noqa: A002 - the SDK's name for it
        *_settings: Any,
        **_options: Any,
    ) -> ModelResponse:
        """Answer in one piece."""
        output, usage = self._answer(system_instructions, input)
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
        *_settings: Any,
        **_options: Any,
    ) -> AsyncIterator[TResponseStreamEvent]:
        """Answer as a stream of Responses events, a text word by word."""
        output, usage = self._answer(system_instructions, input)
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
        for event in _events(started, output, usage):
            yield event

    def _answer(self, instructions: str | None, model_input: str | Sequence[Any]) -> tuple[list[Any], ResponseUsage]:
        view = View.of(model_input)
        decision = self._decide(view)
        if isinstance(decision, Call):
            decision = [decision]
        output: list[TResponseOutputItem]
        if isinstance(decision, str):
            output = [_message(decision)]
            characters = len(decision)
        else:
            calls = [_function_call(call) for call in decision]
            output = list(calls)
            characters = sum(len(call.name) + len(call.arguments) for call in calls)
        return output, _usage(len(instructions or "") + _characters(view.history), characters)


def _message(text: str) -> ResponseOutputMessage:
    return ResponseOutputMessage(
        id=_new_id("msg"), type="message", role="assistant", status="completed", content=[_part(text)]
    )


def _part(text: str) -> ResponseOutputText:
    return ResponseOutputText(type="output_text", text=text, annotations=[], logprobs=[])


def _function_call(call: Call) -> ResponseFunctionToolCall:
    return ResponseFunctionToolCall(
        id=_new_id("fc"),
        call_id=_new_id("call"),
        type="function_call",
        name=call.name,
        arguments=json.dumps(call.arguments),
        status="completed",
    )


def _usage(input_characters: int, output_characters: int) -> ResponseUsage:
    # Rounded up, so that nothing that was sent counts as free.
    input_tokens = -(-input_characters // CHARACTERS_PER_TOKEN)
    output_tokens = -(-output_characters // CHARACTERS_PER_TOKEN)
    return ResponseUsage(
        input_tokens=input_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
        output_tokens=output_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=input_tokens + output_tokens,
    )


def _events(
    started: Response, output: Sequence[TResponseOutputItem], usage: ResponseUsage
) -> Iterator[TResponseStreamEvent]:
    """All events of one response; `started` is the response before it has any output."""
    number = itertools.count()
    yield ResponseCreatedEvent(type="response.created", response=started, sequence_number=next(number))
    yield ResponseInProgressEvent(type="response.in_progress", response=started, sequence_number=next(number))
    for index, item in enumerate(output):
        if isinstance(item, ResponseOutputMessage):
            yield from _message_events(item, index, number)
        elif isinstance(item, ResponseFunctionToolCall):
            yield from _call_events(item, index, number)
    # Copies here and above: a consumer that rewrites one event in place must not change another.
    completed = started.model_copy(
        update={"status": "completed", "output": [item.model_copy() for item in output], "usage": usage}
    )
    yield ResponseCompletedEvent(type="response.completed", response=completed, sequence_number=next(number))


def _message_events(
    message: ResponseOutputMessage, index: int, number: Iterator[int]
) -> Iterator[TResponseStreamEvent]:
    text = "".join(part.text for part in message.content if isinstance(part, ResponseOutputText))
    place: dict[str, Any] = {"item_id": message.id, "output_index": index, "content_index": 0}
    yield ResponseOutputItemAddedEvent(
        type="response.output_item.added",
        item=message.model_copy(update={"content": [], "status": "in_progress"}),
        output_index=index,
        sequence_number=next(number),
    )
    yield ResponseContentPartAddedEvent(
        type="response.content_part.added", part=_part(""), sequence_number=next(number), **place
    )
    for word in _WORD.findall(text):
        yield ResponseTextDeltaEvent(
            type="response.output_text.delta", delta=word, logprobs=[], sequence_number=next(number), **place
        )
    yield ResponseTextDoneEvent(
        type="response.output_text.done", text=text, logprobs=[], sequence_number=next(number), **place
    )
    yield ResponseContentPartDoneEvent(
        type="response.content_part.done", part=_part(text), sequence_number=next(number), **place
    )
    yield ResponseOutputItemDoneEvent(
        type="response.output_item.done", item=message, output_index=index, sequence_number=next(number)
    )


def _call_events(call: ResponseFunctionToolCall, index: int, number: Iterator[int]) -> Iterator[TResponseStreamEvent]:
    place: dict[str, Any] = {"item_id": call.id, "output_index": index}
    yield ResponseOutputItemAddedEvent(
        type="response.output_item.added",
        item=call.model_copy(update={"arguments": "", "status": "in_progress"}),
        output_index=index,
        sequence_number=next(number),
    )
    yield ResponseFunctionCallArgumentsDeltaEvent(
        type="response.function_call_arguments.delta", delta=call.arguments, sequence_number=next(number), **place
    )
    yield ResponseFunctionCallArgumentsDoneEvent(
        type="response.function_call_arguments.done",
        arguments=call.arguments,
        sequence_number=next(number),
        **place,
    )
    yield ResponseOutputItemDoneEvent(
        type="response.output_item.done", item=call, output_index=index, sequence_number=next(number)
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


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid4().hex}"
