"""The model behind HTTP: OpenAI's Responses API by the same script as the model in the process. ``python -m ... PORT``.

As light as an ASGI app can be: `gateway.testing.ScriptedOpenAI`, which can do more, would take as much of the machine
as a contestant.
"""

import asyncio
import itertools
import re
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import uvicorn

from .common import ANSWER, MODEL_NAME

_THINKING = re.compile(r"\((\d+) ms\)")
_numbers = itertools.count(1)


class _Asked(msgspec.Struct):
    input: list[dict[str, Any]]


_decoder = msgspec.json.Decoder(_Asked)


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Answer ``POST /v1/responses``."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    items = _decoder.decode(body).input
    if thinking := _THINKING.search(str(next(item for item in reversed(items) if item.get("role") == "user"))):
        await asyncio.sleep(int(thinking[1]) / 1000)
    number = next(_numbers)
    done = items[-1].get("type") == "function_call_output"
    answer = msgspec.json.encode(response(number, final(number) if done else call(number)))
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": answer})


def final(number: int) -> dict[str, Any]:
    """Return the answer as an item."""
    content = [{"type": "output_text", "text": ANSWER.decode(), "annotations": []}]
    return {"type": "message", "id": f"msg_{number}", "role": "assistant", "status": "completed", "content": content}


def call(number: int) -> dict[str, Any]:
    """Return the call of the tool as an item."""
    return {
        "type": "function_call",
        "id": f"fc_{number}",
        "call_id": f"call_{number}",
        "name": "add",
        "arguments": '{"a": 2, "b": 3}',
        "status": "completed",
    }


def response(number: int, item: dict[str, Any]) -> dict[str, Any]:
    """Return a whole response."""
    return {
        "id": f"resp_{number}",
        "object": "response",
        "created_at": 1_700_000_000,
        "status": "completed",
        "model": MODEL_NAME,
        "output": [item],
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 10,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 15,
        },
    }


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", timeout_keep_alive=600)
