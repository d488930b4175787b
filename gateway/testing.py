"""Fakes for tests, shipped: a scripted OpenAI-compatible server over real HTTP.

It stands for whatever speaks OpenAI's API at the other end: the language model behind an agent, or behind a judge.
For a scripted model without HTTP, the SDK ships ``agents.testing.ScriptedModel``.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

import uvicorn
from litestar import Litestar, Request, Response, post


class ToolCall(NamedTuple):
    """A call of a function that the scripted model asks for."""

    name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class HttpError:
    """An error that the scripted server answers with."""

    status: int
    message: str = "scripted error"


Answer = str | Sequence[ToolCall]
Script = Callable[[dict[str, Any]], Answer | HttpError]


class ScriptedOpenAI:
    """A server on loopback that answers ``/v1/chat/completions`` and ``/v1/responses`` by a script.

    Use it as a context manager; ``url`` is what ``OPENAI_BASE_URL`` wants, ``requests`` holds every body it got.
    """

    def __init__(self, script: Script):
        """Take the script: a function from a request's JSON body to what to answer."""
        self._script = script
        self.requests: list[dict[str, Any]] = []
        app = Litestar([self._handler("/v1/chat/completions", _chat), self._handler("/v1/responses", _response)])
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, name="scripted-openai", daemon=True)

    @property
    def url(self) -> str:
        """Base URL, ``/v1`` included."""
        port = self._server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}/v1"

    def __enter__(self) -> Self:
        """Start the server and wait until it listens."""
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the server."""
        self._server.should_exit = True
        self._thread.join()

    def _handler(self, path: str, encode: Callable[[str, Answer], dict[str, Any]]) -> Any:
        @post(path, status_code=200, name=path)
        async def answer(request: Request[Any, Any, Any]) -> Response[dict[str, Any]]:
            body = json.loads(await request.body())
            self.requests.append(body)
            reply = self._script(body)
            if isinstance(reply, HttpError):
                return Response({"error": {"message": reply.message, "type": "scripted"}}, status_code=reply.status)
            return Response(encode(str(body.get("model", "scripted")), reply))

        return answer


def _chat(model: str, reply: Answer) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": reply if isinstance(reply, str) else None}
    if not isinstance(reply, str):
        message["tool_calls"] = [
            {"id": _id("call"), "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for name, arguments in reply
        ]
    finish = "stop" if isinstance(reply, str) else "tool_calls"
    return {
        "id": _id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


def _response(model: str, reply: Answer) -> dict[str, Any]:
    output: list[dict[str, Any]]
    if isinstance(reply, str):
        content = [{"type": "output_text", "text": reply, "annotations": []}]
        output = [{"type": "message", "id": _id("msg"), "role": "assistant", "status": "completed", "content": content}]
    else:
        output = [
            {
                "type": "function_call",
                "id": _id("fc"),
                "call_id": _id("call"),
                "name": name,
                "arguments": json.dumps(arguments),
                "status": "completed",
            }
            for name, arguments in reply
        ]
    return {
        "id": _id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "completed",
        "model": model,
        "output": output,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": {
            "input_tokens": 10,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 15,
        },
    }


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
