"""What every request for a run goes through: who asks, may it, was it asked before, run, answer, stream."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Protocol

import msgspec
from litestar import Request, Response

from gateway.errors import (
    PermissionDenied,
    RequestTimedOut,
    RunCancelled,
    ServiceUnavailable,
    UnsupportedMediaType,
)
from gateway.http.access import caller_of
from gateway.http.answers import ChatAnswer, ResponsesAnswer
from gateway.http.errors import request_id_of
from gateway.http.requests import BodyRules
from gateway.http.streaming import ChatEncoder, Encoder, EventStream, Finished, ResponsesEncoder, watch
from gateway.runs.active import STOPPING, ActiveRun
from gateway.runs.execution import AgentExecutor
from gateway.runs.idempotency import Claim, IdempotencyStore, StoredAnswer
from gateway.runs.requests import Run, RunRequest, RunResult
from gateway.runs.runner import AgentRunner
from gateway.settings import Settings
from gateway.storage.allowances import Allowances
from gateway.storage.api_keys import Caller

RETURN_TRACE_HEADER = "x-mlflow-return-trace-id"
"""Header by which MLflow's clients ask for the trace's id in the body. Contract: ``mlflow.genai.agent_server``."""

KEEP_TRACE_HEADER = "x-gateway-keep-trace"
"""Header by which a client asks that the conversation's traces be kept, whatever the sampling says."""
TRACEPARENT_HEADER = "traceparent"
"""Header with the caller's place in a distributed trace. Contract: W3C Trace Context, as for ``tracestate``."""
TRACESTATE_HEADER = "tracestate"

_LONGEST_HEADERLESS_S = 5.0  # errors before this have a status of their own; then the stream begins, and keeps alive
CLIENT_LEFT = "The client closed the connection before the answer was complete."


class Form(Protocol):
    """The shape in which one request is answered."""

    def json(self, run: Run, outcome: RunResult | None) -> dict[str, Any]:
        """Return the whole answer; ``None``: the run is under way."""

    def encoder(self, request_id: str, *, return_trace_id: bool) -> Encoder:
        """Return what writes the answer as a stream."""


class ResponsesForm:
    """Answers with a Responses object."""

    def __init__(self, answer: ResponsesAnswer):
        self._answer = answer

    def json(self, run: Run, outcome: RunResult | None) -> dict[str, Any]:
        """Return the response."""
        return self._answer.body(run, outcome)

    def encoder(self, request_id: str, *, return_trace_id: bool) -> Encoder:
        """Return the encoder of a Responses stream."""
        return ResponsesEncoder(self._answer, request_id, return_trace_id=return_trace_id)


class ChatForm:
    """Answers with a chat completion."""

    def __init__(self, answer: ChatAnswer):
        self._answer = answer

    def json(self, run: Run, outcome: RunResult | None) -> dict[str, Any]:
        """Return the completion."""
        if outcome is None:
            raise AssertionError("a chat completion is never answered before it is done")
        return self._answer.body(run, outcome)

    def encoder(self, request_id: str, *, return_trace_id: bool) -> Encoder:
        """Return the encoder of a stream of chunks."""
        return ChatEncoder(self._answer, request_id, return_trace_id=return_trace_id)


class Service:
    """Serves runs over HTTP. One a web process."""

    def __init__(
        self,
        settings: Settings,
        executor: AgentExecutor,
        runner: AgentRunner,
        allowances: Allowances,
        idempotency: IdempotencyStore,
    ):
        self._settings = settings
        self._executor = executor
        self._runner = runner
        self._allowances = allowances
        self._idempotency = idempotency
        self.rules = BodyRules(settings.max_input_items, show_tool_calls=settings.show_tool_calls)

    async def answer(
        self, request: Request[Any, Any, Any], raw: bytes, prepare: Callable[[], tuple[RunRequest, Form]]
    ) -> Response[Any]:
        """Run what a request asks for and answer it.

        Args:
            request: the request, its body read.
            raw: its body.
            prepare: decodes the body; it is called before anything is stored or counted.
        """
        wanted, form = prepare()
        wanted = traced(wanted, request)
        caller = caller_of(request)
        self.check_agent(caller, wanted.agent)
        claim = await self.claim(request, raw, caller)
        if isinstance(claim, Response):
            return claim
        try:
            admission = await self._allowances.admit(caller)
            try:
                active = await self._runner.start(wanted)
            except BaseException:
                admission.release()
                raise
            active.when_done(admission.release)
            if wanted.stream:
                return await self._stream(request, active, form, claim)
            return await self._complete(request, active, form, claim)
        except BaseException:
            if claim is not None:
                await claim.drop()
            raise

    @asynccontextmanager
    async def admitted(self, caller: Caller) -> AsyncIterator[None]:
        """Count a request against its key's limits for as long as the block lasts."""
        admission = await self._allowances.admit(caller)
        try:
            yield
        finally:
            admission.release()

    def check_agent(self, caller: Caller, agent: str | None) -> None:
        """Raise `PermissionDenied` if the caller's key is not for this agent, `AgentNotFound` if there is none."""
        name = self._executor.plugin(agent).name
        if not caller.may_use(name):
            raise PermissionDenied(f"This API key may not use the agent {name!r}. Make one that may.")

    async def claim(
        self, request: Request[Any, Any, Any], raw: bytes, caller: Caller
    ) -> "Claim | Response[bytes] | None":
        """Return the answer that was given to this ``Idempotency-Key`` before, or the right to give it."""
        key = request.headers.get("idempotency-key")
        if key is None:
            return None
        fingerprint = f"{request.method} {request.url.path}\n".encode() + raw
        found = await self._idempotency.begin(caller.key_id, key, fingerprint)
        if isinstance(found, Claim):
            return found
        headers = {**found.headers, "idempotent-replayed": "true"}
        media_type = headers.pop("content-type", "application/json")
        return Response(found.body, status_code=found.status, headers=headers, media_type=media_type)

    @asynccontextmanager
    async def _attended(self, request: Request[Any, Any, Any], active: ActiveRun) -> AsyncIterator[None]:
        """Within the block, do what ``GATEWAY_ON_DISCONNECT`` says if the client leaves, and end the run if we stop."""
        try:
            async with watch(request.receive, lambda: self._client_left(active)):
                yield
        except asyncio.CancelledError:
            active.cancel(ServiceUnavailable(STOPPING))
            raise

    async def _complete(
        self, request: Request[Any, Any, Any], active: ActiveRun, form: Form, claim: Claim | None
    ) -> Response[bytes]:
        result = None
        if not active.request.background:
            async with self._attended(request, active):
                result = await active.result()
        body = form.json(active.run, result)
        if request.headers.get(RETURN_TRACE_HEADER, "").lower() == "true":
            body["metadata"] = {**(body.get("metadata") or {}), "trace_id": active.run.trace_id}
        return await reply(body, claim, active)

    async def _stream(
        self, request: Request[Any, Any, Any], active: ActiveRun, form: Form, claim: Claim | None
    ) -> EventStream:
        await self._begun(request, active)
        return_trace_id = request.headers.get(RETURN_TRACE_HEADER, "").lower() == "true"
        return EventStream(
            active,
            form.encoder(request_id_of(request.scope), return_trace_id=return_trace_id),
            headers=_session_header(active),
            keepalive_s=self._settings.stream_keepalive_s,
            on_gone=lambda: self._client_left(active),
            on_finished=_keep(claim, active) if claim else None,
        )

    async def _begun(self, request: Request[Any, Any, Any], active: ActiveRun) -> None:
        """Wait until the run has its session's turn; what goes wrong before that is answered with its own status."""
        try:
            async with self._attended(request, active):
                async with asyncio.timeout(min(_LONGEST_HEADERLESS_S, self._settings.stream_keepalive_s)):
                    await active.begun.wait()
        except TimeoutError:
            return
        if active.done and not active.took_turn:
            await active.result()

    def _client_left(self, active: ActiveRun) -> None:
        active.capture.trace.client_left = True
        if self._settings.on_disconnect == "cancel" and not active.request.background:
            active.cancel(RunCancelled(CLIENT_LEFT))


async def reply(body: dict[str, Any], claim: Claim | None, active: ActiveRun | None = None) -> Response[bytes]:
    """Return a JSON answer, kept for its ``Idempotency-Key`` if it has one.

    Args:
        body: the answer.
        claim: the right to give it, and the duty to keep it; ``None`` without a key.
        active: the run that it is the answer of; ``None`` for a batch.
    """
    encoded = msgspec.json.encode(body)
    headers = _session_header(active) if active else {}
    if claim is not None:
        answer = StoredAnswer(200, {"content-type": "application/json", **headers}, encoded)
        await claim.store(answer, active.capture.trace.session_id if active else None)
    return Response(encoded, media_type="application/json", headers=headers)


def _session_header(active: ActiveRun) -> dict[str, str]:
    # An id may have any letters: they are sent as UTF-8, which the framework would write as Latin-1.
    return {"x-session-id": active.run.session_id.encode().decode("latin-1")}


def _keep(claim: Claim, active: ActiveRun) -> Finished:
    async def keep(sent: bytes, answered: bool) -> None:
        if not answered:
            await claim.drop()
            return
        # Without the charset, which the framework adds to every text.
        headers = {"content-type": "text/event-stream", "cache-control": "no-store", **_session_header(active)}
        await claim.store(StoredAnswer(200, headers, sent), active.capture.trace.session_id)

    return keep


async def read_body(request: Request[Any, Any, Any]) -> bytes:
    """Return the body of a JSON request.

    Raises:
        UnsupportedMediaType: it does not say that it is JSON.
        RequestTimedOut: it does not arrive in time.
    """
    if request.content_type[0] != "application/json":  # nor none: a page of anybody's can send that from a browser
        raise UnsupportedMediaType("Send the body as JSON, with content type application/json.")
    limit_s: float = request.app.state.settings.body_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            return await request.body()
    except TimeoutError:
        raise RequestTimedOut(f"The body did not arrive within {limit_s:g} s. Send it faster, or send less.") from None


def traced(wanted: RunRequest, request: Request[Any, Any, Any]) -> RunRequest:
    """Return the request with what its headers say of the trace."""
    keep = request.headers.get(KEEP_TRACE_HEADER, "").strip().lower() in {"true", "1"}
    traceparent, tracestate = (request.headers.get(name) for name in (TRACEPARENT_HEADER, TRACESTATE_HEADER))
    if not keep and traceparent is None:
        return wanted
    return replace(wanted, keep_trace=keep, traceparent=traceparent, tracestate=tracestate)


def stored(wanted: RunRequest, answer: ResponsesAnswer) -> RunRequest:
    """Return the request with its response to be stored."""
    return replace(wanted, render=answer.body)
