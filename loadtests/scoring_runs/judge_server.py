"""The judges' model: answers OpenAI's chat API with one verdict after a fixed time. ``python -m ... PORT LATENCY_MS``.

A process of its own, as light as an ASGI app can be. ``GET`` tells how often it was asked so far, as JSON.
"""

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvicorn

VERDICT = {"result": "yes", "rationale": "The answer says what was asked for."}


class JudgeServer:
    """An ASGI app."""

    def __init__(self, latency_s: float):
        """Answer each call after ``latency_s``."""
        self._latency_s = latency_s
        self._asked = 0

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["method"] == "GET":
            answer: dict[str, Any] = {"asked": self._asked}
        else:
            self._asked += 1
            answer = _completion(str(json.loads(body).get("model")), self._asked)
            await asyncio.sleep(self._latency_s)
        encoded = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(encoded))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": encoded})


def _completion(model: str, number: int) -> dict[str, Any]:
    message = {"role": "assistant", "content": json.dumps(VERDICT)}
    return {
        "id": f"chatcmpl-{number}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 400, "completion_tokens": 30, "total_tokens": 430},
    }


if __name__ == "__main__":
    app = JudgeServer(float(sys.argv[2]) / 1000)
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", timeout_keep_alive=600)
