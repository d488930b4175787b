"""Server-sent events: one stream a request, whatever happens during the run.

The stream is an ASGI application of its own, since it must see its client leave while it waits for the model. It owns
nothing but the connection: the run is a task of the runner's, and ends, or goes on, by its own rules.

Contracts: WHATWG HTML, "Server-sent events"; OpenAI's API reference, "Streaming events" and "Chat stream"; Open
Responses, which wants ``[DONE]`` at the end of every stream.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import msgspec
from litestar import Response
from litestar.types import Receive, Scope, Send

from gateway.errors import GatewayError, ServiceUnavailable
from gateway.http.answers import ChatAnswer, ResponsesAnswer, gateway_fields
from gateway.http.chunks import ChatChunks
from gateway.http.errors import openai_error
from gateway.runs.active import STOPPING, ActiveRun
from gateway.runs.requests import Run, RunResult

_DONE = b"data: [DONE]\n\n"
_KEEPALIVE = b": keep-alive\n\n"

Finished = Callable[[bytes, bool], Awaitable[None]]
"""Takes the whole stream as it went out, and whether the run was answered."""


class Encoder(Protocol):
    """Turns the events of a run into the bytes of one kind of stream."""

    def start(self, run: Run) -> bytes:
        """Return what comes before the first event."""

    def event(self, event: dict[str, Any]) -> bytes:
        """Return an item-level event; no bytes if this kind of stream has no place for it."""

    def end(self, run: Run, outcome: RunResult | GatewayError) -> bytes:
        """Return what comes after the last event."""


class ResponsesEncoder:
    """One Responses stream: ``response.created`` … one ``response.completed`` or ``response.failed``."""

    def __init__(self, answer: ResponsesAnswer, request_id: str, *, return_trace_id: bool):
        self._answer = answer
        self._request_id = request_id
        self._return_trace_id = return_trace_id
        self._number = itertools.count()
        self._places: dict[int, int] = {}
        """Where the items that are shown stand among themselves, by ``output_index``."""

    def start(self, run: Run) -> bytes:
        """Return the frame's first two events."""
        body = self._answer.body(run, None)
        kinds = ("response.created", "response.in_progress")
        return b"".join(self.event({"type": kind, "response": body}) for kind in kinds)

    def event(self, event: dict[str, Any]) -> bytes:
        """Return the event with its number; nothing if it is about an item that is not shown."""
        if (index := event.get("output_index")) is not None:
            if event["type"] == "response.output_item.added" and self._answer.shows(event["item"]):
                self._places[index] = len(self._places)
            if index not in self._places:
                return b""
            event = {**event, "output_index": self._places[index]}
        numbered = {**event, "sequence_number": next(self._number)}
        return f"event: {event['type']}\n".encode() + _data(numbered)

    def end(self, run: Run, outcome: RunResult | GatewayError) -> bytes:
        """Return the frame's last event."""
        kind = "response.completed" if isinstance(outcome, RunResult) else "response.failed"
        body = self._answer.body(run, outcome)
        if not isinstance(outcome, RunResult):
            body["error"]["request_id"] = self._request_id
        trace = _data({"trace_id": run.trace_id}) if self._return_trace_id else b""
        return self.event({"type": kind, "response": body}) + trace + _DONE


class ChatEncoder:
    """One stream of chat completion chunks."""

    def __init__(self, answer: ChatAnswer, request_id: str, *, return_trace_id: bool):
        self._answer = answer
        self._request_id = request_id
        self._return_trace_id = return_trace_id
        self._chunks: ChatChunks | None = None

    def start(self, run: Run) -> bytes:
        """Return the chunk that opens the message, with the gateway's own fields."""
        self._chunks = ChatChunks(self._answer.frame(run), self._answer.client_tools)
        return _data({**self._chunks.start(), **gateway_fields(run, None)})

    def event(self, event: dict[str, Any]) -> bytes:
        """Return the chunks of an event."""
        return b"".join(_data(chunk) for chunk in self._chunks.feed(event)) if self._chunks else b""

    def end(self, run: Run, outcome: RunResult | GatewayError) -> bytes:
        """Return the chunks that end the message, or the error that ended it."""
        if not isinstance(outcome, RunResult):
            return _data(openai_error(outcome, self._request_id)) + _DONE
        usage = self._answer.usage(outcome) if self._answer.wants_usage else None
        chunks = self._chunks.finish(usage) if self._chunks else []
        if chunks and outcome.approvals:
            chunks[0] |= {"approval_requests": gateway_fields(run, outcome)["approval_requests"]}
        trace = _data({"trace_id": run.trace_id}) if self._return_trace_id else b""
        return b"".join(_data(chunk) for chunk in chunks) + trace + _DONE


class EventStream(Response[bytes]):
    """The answer that streams a run."""

    def __init__(
        self,
        active: ActiveRun,
        encoder: Encoder,
        *,
        headers: dict[str, str],
        keepalive_s: float,
        on_gone: Callable[[], None],
        on_finished: Finished | None,
    ):
        """Take the run and how to write it.

        Args:
            active: the run, already begun.
            encoder: writes its events.
            headers: of the answer, beside those that every stream has.
            keepalive_s: seconds of silence after which a comment is sent.
            on_gone: called if the client leaves before the end.
            on_finished: called at the end with everything that was sent, and whether the run was answered.
        """
        super().__init__(content=b"", media_type="text/event-stream", headers=headers)
        self._active = active
        self._encoder = encoder
        self._headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", **headers}
        # nginx would gather the events otherwise.
        self._headers["x-accel-buffering"] = "no"
        self._keepalive_s = keepalive_s
        self._on_gone = on_gone
        self._on_finished = on_finished
        self._sent = bytearray()

    def to_asgi_response(self, *_: Any, **__: Any) -> Any:
        """Return the stream itself: Litestar's own streaming leaves its generator behind when a client leaves."""
        return self

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in self._headers.items()]
        answered = False
        try:
            async with watch(receive, self._leave):
                await send({"type": "http.response.start", "status": 200, "headers": encoded})
                answered = await self._stream(send)
        except asyncio.CancelledError:
            self._active.cancel(ServiceUnavailable(STOPPING))
            raise
        finally:
            if self._on_finished is not None:
                await asyncio.shield(self._on_finished(bytes(self._sent), answered))
        with suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _stream(self, send: Send) -> bool:
        """Send everything until the run has ended; return whether it was answered.

        A client that left changes nothing here: either its run ends at once, or it is to go on.
        """
        active, run = self._active, self._active.run
        await self._send(send, self._encoder.start(run))
        while True:
            ended = active.done  # looked at first: what came before the end is in the events
            events = await active.events(self._keepalive_s)
            if events:
                await self._send(send, b"".join(self._encoder.event(event) for event in events))
            elif ended:
                break
            elif not active.done:
                await self._send(send, _KEEPALIVE)
        try:
            outcome: RunResult | GatewayError = await active.result()
        except GatewayError as error:
            outcome = error
        await self._send(send, self._encoder.end(run, outcome))
        return isinstance(outcome, RunResult)

    async def _send(self, send: Send, data: bytes) -> None:
        if not data:
            return
        if self._on_finished is not None and data is not _KEEPALIVE:
            self._sent += data
        with suppress(OSError):  # it left in this very moment
            await send({"type": "http.response.body", "body": data, "more_body": True})

    def _leave(self) -> None:
        if not self._active.done:
            self._on_gone()


@asynccontextmanager
async def watch(receive: Receive, on_gone: Callable[[], None]) -> AsyncIterator[None]:
    """Call ``on_gone`` if the client leaves within the block. The request's body must have been read."""

    async def look() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        on_gone()

    task = asyncio.create_task(look(), name="watch-client")
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def _data(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
