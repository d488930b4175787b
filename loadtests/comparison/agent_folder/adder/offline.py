"""The scripted model in the process: always the same call of the tool, then always the same answer.

It thinks for as long as the question says: ``What is 2 plus 3? (300 ms)``; without such a note it answers at once.
"""

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from agents import Model, ModelResponse, Usage
from agents.items import TResponseStreamEvent
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

ANSWER = "The sum is 5."
_THINKING = re.compile(r"\((\d+) ms\)")


class Scripted(Model):
    """Answers by the script."""

    async def get_response(
        self,
        system_instructions: str | None,  # noqa: ARG002 - the interface's
        input: str | list[Any],  # noqa: A002 - the interface's name
        *_: Any,
        **__: Any,
    ) -> ModelResponse:
        """Call the tool, or answer if the tool was called last."""
        items = [{"role": "user", "content": input}] if isinstance(input, str) else input
        if thinking_ms := _thinking_ms(items):
            await asyncio.sleep(thinking_ms / 1000)
        usage = Usage(requests=1, input_tokens=10, output_tokens=5, total_tokens=15)
        done = items[-1].get("type") == "function_call_output"
        return ModelResponse(output=[_answer() if done else _call()], usage=usage, response_id=f"resp_{uuid4().hex}")

    def stream_response(self, *_: Any, **__: Any) -> AsyncIterator[TResponseStreamEvent]:
        """Refuse: the comparison does not stream."""
        raise NotImplementedError


def _thinking_ms(items: list[Any]) -> int:
    """Read how long the model is to think from what the user said last."""
    asked = next(item for item in reversed(items) if item.get("role") == "user")["content"]
    text = asked if isinstance(asked, str) else asked[0]["text"]
    found = _THINKING.search(text)
    return int(found[1]) if found else 0


def _call() -> ResponseFunctionToolCall:
    return ResponseFunctionToolCall(
        id=f"fc_{uuid4().hex}",
        call_id=f"call_{uuid4().hex}",
        type="function_call",
        name="add",
        arguments='{"a": 2, "b": 3}',
        status="completed",
    )


def _answer() -> ResponseOutputMessage:
    text = ResponseOutputText(type="output_text", text=ANSWER, annotations=[])
    return ResponseOutputMessage(
        id=f"msg_{uuid4().hex}", type="message", role="assistant", status="completed", content=[text]
    )


model = Scripted()
