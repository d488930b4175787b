"""Fakes for tests, shipped: a scripted OpenAI-compatible server over real HTTP.

It stands for whatever speaks OpenAI's API at the other end: the language model behind an agent, or behind a judge.
For a scripted model without HTTP, the SDK ships ``agents.testing.ScriptedModel``.
"""

import asyncio
import itertools
import json
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

import uvicorn
from litestar import Litestar, Request, Response, post
from litestar.response import Stream


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


@dataclass(frozen=True)
class Slow:
    """An answer that is held back: its first words are streamed, the rest waits; not streamed, all of it waits.

    With the default gate, which nobody opens, the model hangs until its client or the server goes away.
    """

    answer: Answer
    gate: threading.Event = field(default_factory=threading.Event)
    """Lets the answer go on once it is set."""
    after: int = 0
    """How many words do not wait; those of a call are the words of its arguments as JSON."""


Script = Callable[[dict[str, Any]], Answer | HttpError | Slow]

_Body: TypeAlias = dict[str, Any]
_Words: TypeAlias = Callable[[str], AsyncIterator[str]]
"""Gives the words of a text, each when its time has come."""

_WORD = re.compile(r"\S+\s*|\s+")
_HOLD_S = 0.05
"""How soon a held answer sees that the server stops."""


class ScriptedOpenAI:
    """A server on loopback that answers ``/v1/chat/completions`` and ``/v1/responses`` by a script.

    Use it as a context manager; ``url`` is what ``OPENAI_BASE_URL`` wants, ``requests`` holds every body it got,
    ``cancelled`` counts the requests whose client went away before it had its answer. With ``"stream": true`` an
    answer comes as server-sent events, word by word.
    """

    def __init__(self, script: Script):
        """Take the script: a function from a request's JSON body to what to answer."""
        self._script = script
        self.requests: list[dict[str, Any]] = []
        self.cancelled = 0
        app = Litestar(
            [
                self._handler("/v1/chat/completions", _chat, _chat_stream),
                self._handler("/v1/responses", _response, _response_stream),
            ]
        )
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

    def _handler(
        self,
        path: str,
        encode: Callable[[str, Answer], _Body],
        stream: Callable[[_Body, _Body, _Words], AsyncIterator[str]],
    ) -> Any:
        @post(path, status_code=200, name=path)
        async def answer(request: Request[Any, Any, Any]) -> Response[Any]:
            body = json.loads(await request.body())
            self.requests.append(body)
            reply = self._script(body)
            if isinstance(reply, HttpError):
                return Response({"error": {"message": reply.message, "type": "scripted"}}, status_code=reply.status)
            if not isinstance(reply, Slow):
                reply = Slow(reply, _OPEN)
            whole = encode(str(body.get("model", "scripted")), reply.answer)
            if body.get("stream"):
                return Stream(self._watched(stream(body, whole, self._pace(reply))), media_type="text/event-stream")
            return Stream(self._watched(self._at_once(whole, reply.gate)), media_type="application/json")

        return answer

    async def _watched(self, pieces: AsyncIterator[str]) -> AsyncIterator[str]:
        try:
            async for piece in pieces:
                yield piece
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise

    async def _at_once(self, whole: _Body, gate: threading.Event) -> AsyncIterator[str]:
        await self._hold(gate)
        yield json.dumps(whole)

    def _pace(self, slow: Slow) -> _Words:
        sent = itertools.count(1)

        async def words(text: str) -> AsyncIterator[str]:
            if slow.after == 0:
                await self._hold(slow.gate)
            for word in _WORD.findall(text):
                yield word
                if next(sent) >= slow.after:
                    await self._hold(slow.gate)

        return words

    async def _hold(self, gate: threading.Event) -> None:
        """Wait without blocking the server; it also ends when the server does, which would wait for it otherwise."""
        while not gate.is_set() and not self._server.should_exit:
            await asyncio.to_thread(gate.wait, _HOLD_S)


_OPEN = threading.Event()
_OPEN.set()


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
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 15,
        },
    }


async def _chat_stream(body: _Body, whole: _Body, words: _Words) -> AsyncIterator[str]:
    frame = {name: whole[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}

    def chunk(delta: _Body, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return _event(frame | {"choices": [choice]})

    (choice,) = whole["choices"]
    yield chunk({"role": "assistant", "content": ""})
    async for word in words(choice["message"]["content"] or ""):
        yield chunk({"content": word})
    for index, call in enumerate(choice["message"].get("tool_calls", ())):
        yield chunk({"tool_calls": [call | {"index": index, "function": call["function"] | {"arguments": ""}}]})
        async for word in words(call["function"]["arguments"]):
            yield chunk({"tool_calls": [{"index": index, "function": {"arguments": word}}]})
    yield chunk({}, choice["finish_reason"])
    if (body.get("stream_options") or {}).get("include_usage"):
        yield _event(frame | {"choices": [], "usage": whole["usage"]})
    yield "data: [DONE]\n\n"


async def _response_stream(_body: _Body, whole: _Body, words: _Words) -> AsyncIterator[str]:
    numbers = itertools.count()

    def event(kind: str, **fields: Any) -> str:
        kind = f"response.{kind}"
        return f"event: {kind}\n" + _event({"type": kind, "sequence_number": next(numbers), **fields})

    begun = whole | {"status": "in_progress", "output": [], "usage": None}
    yield event("created", response=begun)
    yield event("in_progress", response=begun)
    for index, item in enumerate(whole["output"]):
        async for piece in _item_stream(event, index, item, words):
            yield piece
    yield event("completed", response=whole)


async def _item_stream(event: Callable[..., str], index: int, item: _Body, words: _Words) -> AsyncIterator[str]:
    place = {"item_id": item["id"], "output_index": index}
    if item["type"] == "message":
        (part,) = item["content"]
        yield event("output_item.added", output_index=index, item=item | {"content": [], "status": "in_progress"})
        place["content_index"] = 0
        yield event("content_part.added", **place, part=part | {"text": ""})
        async for word in words(part["text"]):
            yield event("output_text.delta", **place, delta=word, logprobs=[])
        yield event("output_text.done", **place, text=part["text"], logprobs=[])
        yield event("content_part.done", **place, part=part)
    else:
        yield event("output_item.added", output_index=index, item=item | {"arguments": "", "status": "in_progress"})
        async for word in words(item["arguments"]):
            yield event("function_call_arguments.delta", **place, delta=word)
        yield event("function_call_arguments.done", **place, arguments=item["arguments"])
    yield event("output_item.done", output_index=index, item=item)


def _event(data: _Body) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"
