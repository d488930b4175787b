"""Every error as JSON, in the form that the clients of the address know.

Below ``/v1``, and at ``/responses``, that is OpenAI's: ``{"error": {"message", "type", "param", "code"}}``. Elsewhere
it is that of MLflow's scoring server: ``{"error_code", "message"}``. Both carry ``request_id``, which the log has too.
"""

import math
import uuid
from typing import Any

import msgspec
import psycopg
import structlog
from litestar import Request, Response
from litestar.connection import ASGIConnection
from litestar.exceptions import HTTPException
from litestar.types import Message, Scope

from gateway.errors import (
    AgentMisconfigured,
    AgentNotFound,
    ApprovalUsed,
    GatewayError,
    InvalidRequest,
    RequestError,
    RequestTimedOut,
    RequestTooLarge,
    RunCancelled,
    RunError,
    RunFailed,
    RunTimeout,
    ServiceUnavailable,
    ToolTimeout,
    Unauthenticated,
)
from gateway.http.access import challenge

log = structlog.get_logger(__name__)


class ErrorBody(msgspec.Struct, omit_defaults=True):
    """Body of an answer with a status of 400 or more, in MLflow's form."""

    error_code: str
    """Stable, for programs."""
    message: str
    """What was wrong and what to do next, for people."""
    request_id: str
    """Names this request in the gateway's log; also in the header ``x-request-id``."""
    trace_id: str | None = None
    """Trace of the run that failed; ``None`` if none was begun."""


class OpenAIErrorDetail(msgspec.Struct):
    """What went wrong, in OpenAI's form."""

    message: str
    """What was wrong and what to do next, for people."""
    type: str
    """Kind of error, as OpenAI's clients know it."""
    param: str | None
    """Field of the request that is to blame; ``None`` if it is no single one."""
    code: str
    """Stable, for programs: the ``error_code`` of the other form in lower case."""
    request_id: str
    """Names this request in the gateway's log; also in the header ``x-request-id``."""
    trace_id: str | msgspec.UnsetType = msgspec.UNSET
    """Trace of the run that failed; left out if none was begun."""


class OpenAIErrorBody(msgspec.Struct):
    """Body of an answer with a status of 400 or more, in OpenAI's form."""

    error: OpenAIErrorDetail


_HTTP_CODES = {
    400: "INVALID_PARAMETER_VALUE",
    404: "ENDPOINT_NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    413: "REQUEST_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
}
_HTTP_MESSAGES = {
    404: "There is no such address. The API is described at /reference.",
    405: "This address takes another HTTP method; see /reference.",
}
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


# OpenAI's clients send again by themselves what failed with 409 or 5xx, unless they are told not to: after these the
# agent's tools may have acted, or another client's run would be ended in turn.
_NOT_AGAIN = (ApprovalUsed, RunCancelled, RunFailed, AgentMisconfigured, ToolTimeout, RunTimeout)


class _HttpError(GatewayError):
    """What the web framework refuses, as one of ours."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.__dict__.update(status=status, code=code)


def request_id_of(scope: Scope) -> str:
    """Return the id of a request, made when it is first asked for."""
    state: dict[str, Any] = scope["state"]
    return str(state.setdefault("request_id", f"req_{uuid.uuid4().hex}"))


async def add_request_id(message: Message, scope: Scope) -> None:
    """Put the request's id into the headers of its answer."""
    if message["type"] == "http.response.start":
        headers = [*message.get("headers", ()), (b"x-request-id", request_id_of(scope).encode())]
        message["headers"] = headers


def speaks_openai(path: str) -> bool:
    """Whether the clients of an address know OpenAI's form of errors."""
    return path.startswith("/v1/") or path == "/responses"


def openai_error(error: GatewayError, request_id: str) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = _OPENAI_TYPES.get(error.status) or ("invalid_request_error" if error.status < 500 else "server_error")
    # The code by which OpenAI's clients know it.
    code = "model_not_found" if isinstance(error, AgentNotFound) else error.code.lower()
    detail = OpenAIErrorDetail(str(error), kind, error.param, code, request_id, error.trace_id or msgspec.UNSET)
    return {"error": msgspec.to_builtins(detail)}


def _answer(connection: ASGIConnection[Any, Any, Any, Any], error: GatewayError) -> Response[Any]:
    request_id = request_id_of(connection.scope)
    path = connection.url.path
    body: Any = ErrorBody(error.code, str(error), request_id, error.trace_id)
    if speaks_openai(path):
        body = openai_error(error, request_id)
    headers = challenge(connection) if isinstance(error, Unauthenticated) else {}
    if isinstance(error, RequestTimedOut):  # the rest of its body would be taken for the next request
        headers["Connection"] = "close"
    if isinstance(error, _NOT_AGAIN):
        headers["x-should-retry"] = "false"
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    return Response(body, status_code=error.status, headers=headers, media_type="application/json")


def answer_gateway_error(request: Request[Any, Any, Any], error: GatewayError) -> Response[Any]:
    """Answer an error raised on purpose: its message was written for the client, or else for the log."""
    if not isinstance(error, RequestError | RunError | ServiceUnavailable):
        return answer_unexpected_error(request, error)
    return _answer(request, error)


def answer_http_error(request: Request[Any, Any, Any], error: HTTPException) -> Response[Any]:
    """Answer what Litestar itself refuses."""
    status = error.status_code
    if status == 413:
        limit = request.app.state.settings.max_body_bytes
        return _answer(request, RequestTooLarge(f"The body has more than {limit:,} bytes. Send less at once."))
    if status >= 500:
        if "disconnected" in error.detail:  # in the middle of its body: nobody is there to be answered
            return _answer(request, InvalidRequest("The request ended before its body was complete."))
        return answer_unexpected_error(request, error)
    code = _HTTP_CODES.get(status, "BAD_REQUEST")
    wrong = error.extra[0] if isinstance(error.extra, list) and error.extra else {}
    detail = f"The parameter {wrong.get('key')!r} is not valid: {wrong.get('message')}." if wrong else error.detail
    shown = _HttpError(status, code, _HTTP_MESSAGES.get(status) or detail)
    shown.param = wrong.get("key")
    answer = _answer(request, shown)
    answer.headers.update(error.headers or {})
    return answer


def answer_unexpected_error(request: Request[Any, Any, Any], error: Exception) -> Response[Any]:
    """Answer a defect of ours: the log has its stack trace, the client none of it."""
    request_id = request_id_of(request.scope)
    log.error("unexpected error", path=request.url.path, request_id=request_id, exc_info=error)
    shown = GatewayError("The gateway failed on this request; its log says why, under this request_id.")
    shown.trace_id = error.trace_id if isinstance(error, GatewayError) else None
    return _answer(request, shown)


def answer_database_error(request: Request[Any, Any, Any], error: psycopg.OperationalError) -> Response[Any]:
    """Answer that the database is away."""
    log.error("database away", path=request.url.path, error=str(error))
    return _answer(request, ServiceUnavailable("The gateway cannot reach its database. Try again shortly."))


def answer_data_error(request: Request[Any, Any, Any], error: psycopg.DataError) -> Response[Any]:
    """Answer that a text cannot be an id: Postgres cannot even look for one with a zero character."""
    if "NUL" not in str(error):
        return answer_unexpected_error(request, error)
    return _answer(request, InvalidRequest("The request names something by a text with the character U+0000."))


HANDLERS: dict[int | type[Exception], Any] = {
    GatewayError: answer_gateway_error,
    HTTPException: answer_http_error,
    psycopg.OperationalError: answer_database_error,
    psycopg.DataError: answer_data_error,
    Exception: answer_unexpected_error,
}
