"""The one way out for judge calls: a server on loopback, in the evaluator, that speaks OpenAI's API.

MLflow's judges are pointed at it by the environment (`Relay.environment`), so whatever in this process calls an
OpenAI-compatible API by the usual variables passes here too, also a scorer that uses OpenAI's own client. What the
relay gives back is either the provider's answer, or a status that MLflow does not retry.

Streams are refused: judges do not ask for them, and what a stream costs is known only at its end.
"""

import asyncio
import hmac
import math
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import structlog
import uvicorn

from gateway.errors import ConfigurationError
from gateway.evaluation.judging.binding import judges_routed
from gateway.evaluation.judging.leases import Lease, Problem
from gateway.evaluation.judging.limits import JudgeLimits, RequestRate, SlotKeeper
from gateway.evaluation.judging.prices import Prices
from gateway.evaluation.judging.spending import SpendingBook
from gateway.evaluation.judging.upstream import JudgeModel, Reply, Upstream, failed
from gateway.evaluation.judging.wire import (
    ENDPOINT_HEADER,
    LEASE_HEADER,
    TOKEN_HEADER,
    Call,
    json_object,
    model_of,
    passed_on,
)
from gateway.storage.database import Pool

log = structlog.get_logger(__name__)

_PREFIX = "/v1"
_MAX_BODY_BYTES = 20_000_000  # a prompt that fills a context window of a million tokens is a quarter of it
_ANSWER_S = 30.0  # between the end of a scoring's time and that of MLflow's patience with the relay
_GRACE_S = 3.0  # for the last answers on their way to the judges' threads
_LOOPBACK = "127.0.0.1"

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Any]
_Send = Callable[[MutableMapping[str, Any]], Any]


@dataclass(frozen=True)
class RelayParts:
    """What the relay is made of."""

    limits: JudgeLimits
    prices: Prices
    pool: Pool
    database_url: str
    """Of the same database as the pool, for the connection that holds the slots."""
    book: SpendingBook
    """Is told what each attempt took."""
    may_call: Callable[[], Awaitable[bool]]
    """Whether the budget allows a call at all."""
    clock: Callable[[], float] = time.monotonic


class _Server(uvicorn.Server):
    """Uvicorn beside other work: signals are the evaluator's to take."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take none."""
        yield


class Relay:
    """Takes judge calls from `__aenter__` to `__aexit__`, on the event loop that entered it."""

    def __init__(self, parts: RelayParts):
        """Take the parts; nothing is opened yet."""
        self._limits = parts.limits
        self._clock = parts.clock
        self._slots = SlotKeeper(parts.database_url)
        self._upstream = Upstream(
            parts.limits,
            parts.prices,
            self._slots,
            RequestRate(parts.pool),
            book=parts.book,
            may_call=parts.may_call,
            clock=parts.clock,
        )
        self._token = secrets.token_urlsafe(32)  # another local process must not spend money here
        self._leases: dict[str, Lease] = {}
        self._stopping = False
        # With the protocol named, asyncio turns Nagle's delay off for its connections: without, 40 ms an answer.
        self._socket = socket.socket(proto=socket.IPPROTO_TCP)
        config = uvicorn.Config(
            self._serve,
            interface="asgi3",
            lifespan="off",
            proxy_headers=False,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=int(_GRACE_S),
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        """Listen, on a port that is free."""
        self._socket.bind((_LOOPBACK, 0))
        self._socket.listen(128)  # calls are taken from here on, and answered as soon as the server runs
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="judge-relay")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give up all scorings, so that their threads end, and close."""
        self._stopping = True
        for lease in list(self._leases.values()):
            lease.give_up()
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        self._socket.close()
        await self._upstream.close()
        await self._slots.close()

    @property
    def url(self) -> str:
        """Base URL, ``/v1`` included."""
        return f"http://{_LOOPBACK}:{self._socket.getsockname()[1]}{_PREFIX}"

    @property
    def models(self) -> Mapping[str, JudgeModel]:
        """What was asked so far: usage, breaker and limits, by model."""
        return self._upstream.models

    def environment(self, present: Mapping[str, str]) -> dict[str, str]:
        """Return the variables that send MLflow's judges, and OpenAI's clients, here.

        ``present`` is the environment as it is: a proxy in it must not get what is meant for this machine.
        """
        longest_s = math.ceil(self._limits.scoring_timeout_s + _ANSWER_S)
        around = {name: ",".join(filter(None, [present.get(name), _LOOPBACK])) for name in ("no_proxy", "NO_PROXY")}
        return around | {
            "OPENAI_API_BASE": self.url,
            "OPENAI_BASE_URL": self.url,
            "OPENAI_API_KEY": self._token,
            "MLFLOW_GATEWAY_ROUTE_TIMEOUT_SECONDS": str(longest_s),
            "MLFLOW_GENAI_EVAL_LLM_TIMEOUT": str(longest_s),
        }

    @contextmanager
    def routing_judges(self) -> Iterator[None]:
        """Send all judges of this process here, until the block is left.

        Raises:
            ConfigurationError: this MLflow calls judges in a way that we do not know.
        """
        with judges_routed(self.route, self.url):
            ours = self.environment(os.environ)
            before = {name: os.environ.get(name) for name in ours}
            os.environ.update(ours)
            try:
                yield
            finally:
                for name, value in before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value

    def route(self, endpoint: str, headers: dict[str, str], lease_id: str | None) -> tuple[str, dict[str, str]]:
        """Return the URL and headers with which a call for ``endpoint`` goes to the relay."""
        ours = dict(headers) | {TOKEN_HEADER: self._token}
        if lease_id is not None:
            ours[LEASE_HEADER] = lease_id
        if endpoint.startswith(f"{self.url}/"):
            return endpoint, ours
        return f"{self.url}/elsewhere", ours | {ENDPOINT_HEADER: endpoint}

    def lease(
        self,
        scoring_id: str,
        scorer: str,
        model: str,
        *,
        timeout_s: float | None = None,
        most_calls: int | None = None,
        most_tokens: int | None = None,
    ) -> Lease:
        """Return a lease for one scoring, to be closed by `close`; the limits are the settings' unless given."""
        limits = self._limits
        lease = Lease(
            scoring_id,
            scorer,
            model,
            deadline=self._clock() + (limits.scoring_timeout_s if timeout_s is None else timeout_s),
            most_calls=limits.calls_per_scoring if most_calls is None else most_calls,
            most_tokens=limits.tokens_per_scoring if most_tokens is None else most_tokens,
            clock=self._clock,
        )
        self._leases[lease.lease_id] = lease
        if self._stopping:
            lease.give_up()
        return lease

    def close(self, lease: Lease) -> None:
        """End a lease: a thread that still calls under it is refused."""
        lease.give_up()
        self._leases.pop(lease.lease_id, None)

    async def _serve(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            reply = await self._answer(scope["method"], scope["path"], headers, receive)
        except Exception:
            log.exception("the relay of the judges failed")
            reply = failed(Problem("unavailable", "The relay of the judges failed; the evaluator's log says why."))
        head = [(b"content-type", b"application/json"), (b"content-length", str(len(reply.body)).encode())]
        with suppress(OSError):  # nobody there to read it
            await send({"type": "http.response.start", "status": reply.status, "headers": head})
            await send({"type": "http.response.body", "body": reply.body})

    async def _answer(self, method: str, path: str, headers: dict[str, str], receive: _Receive) -> Reply:
        if not self._is_ours(headers):
            return _error(
                401,
                "This address is for the judges of one evaluator only. (A judge that ends here asks a provider that "
                "looks for its address in OPENAI_API_BASE; set the provider's own variable.)",
            )
        if method != "POST" or not path.startswith(f"{_PREFIX}/"):
            return _error(404, "The relay takes POST requests of OpenAI's API.")
        body = await _read(receive)
        if body is None:
            return _error(413, f"A judge call may have {_MAX_BODY_BYTES} bytes.")
        request = json_object(body)
        if request is None:
            return _error(400, "The body is no JSON object.")
        if request.get("stream"):
            return _error(400, "The relay of the judges does not stream. Ask without `stream`.")
        lease_id = headers.get(LEASE_HEADER)
        lease = self.lease("", "", "") if lease_id is None else self._leases.get(lease_id)
        if lease is None:
            return failed(Problem("given_up", "The scoring that this call belongs to has ended."))
        try:
            return await self._ask(self._call(path, headers, body, request, lease), lease)
        finally:
            if lease_id is None:  # a call that belongs to no scoring
                self.close(lease)

    async def _ask(self, call: Call, lease: Lease) -> Reply:
        """Ask while somebody waits for it and there is time."""
        asking = asyncio.create_task(self._upstream.ask(call, lease), name="judge-call")
        ending = asyncio.create_task(lease.until_given_up(), name="judge-call-ending")
        try:
            await asyncio.wait({asking, ending}, timeout=lease.left_s, return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                return asking.result()
            problem = lease.refusal(0) or Problem("deadline", "The time for the judge calls of this scoring is over.")
            return self._upstream.refused(problem, lease)
        finally:
            for task in (asking, ending):
                task.cancel()
            await asyncio.gather(asking, ending, return_exceptions=True)

    def _is_ours(self, headers: dict[str, str]) -> bool:
        shown = headers.get(TOKEN_HEADER) or headers.get("authorization", "").removeprefix("Bearer ")
        return hmac.compare_digest(shown.encode(), self._token.encode())

    def _call(self, path: str, headers: dict[str, str], body: bytes, request: dict[str, Any], lease: Lease) -> Call:
        url = headers.get(ENDPOINT_HEADER)
        theirs = passed_on(headers)
        if url is None:
            url = self._limits.base_url.rstrip("/") + path.removeprefix(_PREFIX)
            theirs.pop("authorization", None)
            if self._limits.api_key is not None:
                theirs["authorization"] = f"Bearer {self._limits.api_key}"
        return Call(url, theirs, body, model_of(url, request, lease.model))


async def _read(receive: _Receive) -> bytes | None:
    """Return the request's body; ``None`` if it is too long."""
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if len(body) > _MAX_BODY_BYTES:
            return None
        if not message.get("more_body"):
            return bytes(body)


def _error(status: int, message: str) -> Reply:
    reply = failed(Problem("refused", message))
    return Reply(status, reply.body)


def upstream_of(present: Mapping[str, str], base_url: str | None, api_key: str | None) -> tuple[str, str | None]:
    """Return the base URL and the key of the judges' API: the settings', else what the environment has.

    To be asked before `Relay.routing_judges`, which puts the relay's own into the environment.

    Raises:
        ConfigurationError: the base URL is none.
    """
    url = base_url or present.get("OPENAI_API_BASE") or present.get("OPENAI_BASE_URL") or JudgeLimits.base_url
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"GATEWAY_JUDGE_BASE_URL is {url!r}; it must begin with http:// or https://.")
    return url, api_key or present.get("OPENAI_API_KEY") or None
