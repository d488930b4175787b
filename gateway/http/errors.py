"""Every error as JSON, in the form of MLflow's scoring server: ``{"error_code": …, "message": …}``."""

from typing import Any

import msgspec
import structlog
from litestar import Request, Response
from litestar.exceptions import HTTPException

from gateway.errors import GatewayError, RequestError, RunError, ServiceUnavailable

log = structlog.get_logger(__name__)


class ErrorBody(msgspec.Struct, omit_defaults=True):
    """Body of every answer with a status of 400 or more."""

    error_code: str
    """Stable, for programs."""
    message: str
    """What was wrong and what to do next, for people."""
    trace_id: str | None = None
    """Trace of the run that failed; ``None`` if none was begun."""


_HTTP_CODES = {
    400: "INVALID_PARAMETER_VALUE",
    404: "ENDPOINT_NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    413: "REQUEST_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
}
_HTTP_MESSAGES = {
    404: "There is no such address. The API is described at /schema.",
    405: "This address takes another HTTP method; see /schema.",
    413: "The request body is too large.",
}


def answer_gateway_error(request: Request[Any, Any, Any], error: GatewayError) -> Response[ErrorBody]:
    """Answer an error raised on purpose: its message was written for the client, or else for the log."""
    if not isinstance(error, RequestError | RunError | ServiceUnavailable):
        return answer_unexpected_error(request, error)
    return Response(ErrorBody(error.code, str(error), error.trace_id), status_code=error.status)


def answer_http_error(_request: Request[Any, Any, Any], error: HTTPException) -> Response[ErrorBody]:
    """Answer what Litestar itself refuses."""
    status = error.status_code
    code = _HTTP_CODES.get(status, "INTERNAL_ERROR" if status >= 500 else "BAD_REQUEST")
    message = _HTTP_MESSAGES.get(status) or error.detail
    return Response(ErrorBody(code, message), status_code=status, headers=error.headers)


def answer_unexpected_error(request: Request[Any, Any, Any], error: Exception) -> Response[ErrorBody]:
    """Answer a defect of ours: the log has its stack trace, the client none of it."""
    log.error("unexpected error", path=request.url.path, exc_info=error)
    trace_id = error.trace_id if isinstance(error, GatewayError) else None
    body = ErrorBody("INTERNAL_ERROR", "The gateway failed on this request; its log says why.", trace_id)
    return Response(body, status_code=500)


HANDLERS: dict[int | type[Exception], Any] = {
    GatewayError: answer_gateway_error,
    HTTPException: answer_http_error,
    Exception: answer_unexpected_error,
}
