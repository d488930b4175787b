"""The events that stream a response of the offline model, as the Responses API sends them."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

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

_WORD = re.compile(r"\S+\s*|\s+")


def text_part(text: str) -> ResponseOutputText:
    """Return a text as a part of a message's content."""
    return ResponseOutputText(type="output_text", text=text, annotations=[], logprobs=[])


def message_text(message: ResponseOutputMessage) -> str:
    """Return the text of a message."""
    return "".join(part.text for part in message.content if isinstance(part, ResponseOutputText))


def response_events(
    started: Response, output: Sequence[TResponseOutputItem], usage: ResponseUsage
) -> Iterator[TResponseStreamEvent]:
    """Yield all events of one response, a text word by word; `started` is the response before it has any output."""
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
    text = message_text(message)
    place: dict[str, Any] = {"item_id": message.id, "output_index": index, "content_index": 0}
    yield ResponseOutputItemAddedEvent(
        type="response.output_item.added",
        item=message.model_copy(update={"content": [], "status": "in_progress"}),
        output_index=index,
        sequence_number=next(number),
    )
    yield ResponseContentPartAddedEvent(
        type="response.content_part.added", part=text_part(""), sequence_number=next(number), **place
    )
    for word in _WORD.findall(text):
        yield ResponseTextDeltaEvent(
            type="response.output_text.delta", delta=word, logprobs=[], sequence_number=next(number), **place
        )
    yield ResponseTextDoneEvent(
        type="response.output_text.done", text=text, logprobs=[], sequence_number=next(number), **place
    )
    yield ResponseContentPartDoneEvent(
        type="response.content_part.done", part=text_part(text), sequence_number=next(number), **place
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
