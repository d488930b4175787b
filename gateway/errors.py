"""Every error that the gateway raises on purpose: one table of code, HTTP status, and what to do next.

::

    GatewayError
      ConfigurationError       a setting, a plug-in folder or the machine is not as it must be: nothing starts
      RequestError             the client can mend it (4xx)
        InvalidRequest           400  INVALID_PARAMETER_VALUE
        Unauthenticated          401  UNAUTHENTICATED
        PermissionDenied         403  PERMISSION_DENIED
        AgentNotFound            404  AGENT_NOT_FOUND
        SessionNotFound          404  SESSION_NOT_FOUND
        TraceNotFound            404  TRACE_NOT_FOUND
        ResponseNotFound         404  RESPONSE_NOT_FOUND
        ApprovalNotFound         404  APPROVAL_NOT_FOUND
        RequestTimedOut          408  REQUEST_TIMEOUT
        SessionBusy              409  SESSION_BUSY
        ApprovalUsed             409  APPROVAL_ALREADY_USED
        IdempotencyKeyInUse      409  IDEMPOTENCY_KEY_IN_USE
        RequestTooLarge          413  REQUEST_TOO_LARGE
        UnsupportedMediaType     415  UNSUPPORTED_MEDIA_TYPE
        IdempotencyKeyReused     422  IDEMPOTENCY_KEY_REUSED
        RateLimited              429  RATE_LIMITED
        ConcurrencyLimited       429  CONCURRENCY_LIMITED
      RunError                 the run itself ended badly
        RunCancelled             409  RUN_CANCELLED
        RunBlocked               422  RUN_BLOCKED
        MaxTurnsReached          422  MAX_TURNS_EXCEEDED
        ContextTooLong           422  CONTEXT_LENGTH_EXCEEDED
        RunFailed                500  RUN_FAILED
        AgentMisconfigured       500  AGENT_MISCONFIGURED
        ModelFailed              502  MODEL_ERROR
        ModelMisbehaved          502  MODEL_BEHAVIOR_ERROR
        ModelRateLimited         503  MODEL_RATE_LIMITED
        ModelTimeout             504  MODEL_TIMEOUT
        ToolTimeout              504  TOOL_TIMEOUT
        RunTimeout               504  RUN_TIMEOUT
      ServiceUnavailable       503  TEMPORARILY_UNAVAILABLE
        Overloaded               503  OVERLOADED

A message says what was wrong and what to do next. It reaches the client as it is, so it never holds a prompt, a key,
an internal address or a stack trace.
"""

from typing import ClassVar


class GatewayError(Exception):
    """Base of all errors raised on purpose. ``str(error)`` is fit to be shown to the person who can mend it."""

    status: ClassVar[int] = 500
    """HTTP status when it ends a request."""

    code: ClassVar[str] = "INTERNAL_ERROR"
    """``error_code`` in the JSON answer: stable, for programs. In OpenAI's form it is in lower case."""

    trace_id: str | None = None
    """Trace of the run that it ended; ``None`` if there was no run."""

    param: str | None = None
    """Field of the request that is to blame, as ``input[2].content``; ``None`` if it is no single one."""

    retry_after_s: float | None = None
    """Seconds after which a retry may succeed, sent as ``Retry-After``; ``None`` if waiting alone does not help."""


class ConfigurationError(GatewayError):
    """A setting, a plug-in folder or the machine is not as it must be; the message names the setting or the file."""


class RequestError(GatewayError):
    """The client sent something that it can mend."""

    status = 400


class InvalidRequest(RequestError):
    """The body does not have the documented form."""

    code = "INVALID_PARAMETER_VALUE"

    def __init__(self, message: str, param: str | None = None):
        """Take the message, and the field that is to blame."""
        super().__init__(message)
        self.param = param


class Unauthenticated(RequestError):
    """There is no API key in the request, or none that is valid."""

    status = 401
    code = "UNAUTHENTICATED"


class PermissionDenied(RequestError):
    """The API key is valid and lacks the scope, or may not use the agent."""

    status = 403
    code = "PERMISSION_DENIED"


class AgentNotFound(RequestError):
    """No agent of that name is served here."""

    status = 404
    code = "AGENT_NOT_FOUND"
    param = "model"


class SessionNotFound(RequestError):
    """There is no such session, or it belongs to another API key."""

    status = 404
    code = "SESSION_NOT_FOUND"


class TraceNotFound(RequestError):
    """There is no such trace, or it belongs to another API key."""

    status = 404
    code = "TRACE_NOT_FOUND"


class ResponseNotFound(RequestError):
    """There is no such stored response, or it belongs to another API key."""

    status = 404
    code = "RESPONSE_NOT_FOUND"


class ApprovalNotFound(RequestError):
    """There is no such approval request in this session."""

    status = 404
    code = "APPROVAL_NOT_FOUND"


class RequestTimedOut(RequestError):
    """The body took longer than ``GATEWAY_BODY_TIMEOUT_S`` to arrive."""

    status = 408
    code = "REQUEST_TIMEOUT"


class SessionBusy(RequestError):
    """Another request has the session's turn and this one may not, or no longer, wait for it."""

    status = 409
    code = "SESSION_BUSY"


class ApprovalUsed(RequestError):
    """The approval was answered before, or the conversation went on without it; nothing was run."""

    status = 409
    code = "APPROVAL_ALREADY_USED"


class IdempotencyKeyInUse(RequestError):
    """A request with the same ``Idempotency-Key`` is still under way."""

    status = 409
    code = "IDEMPOTENCY_KEY_IN_USE"


class RequestTooLarge(RequestError):
    """The body has more bytes than ``GATEWAY_MAX_BODY_BYTES``."""

    status = 413
    code = "REQUEST_TOO_LARGE"


class UnsupportedMediaType(RequestError):
    """The body does not claim to be JSON."""

    status = 415
    code = "UNSUPPORTED_MEDIA_TYPE"


class IdempotencyKeyReused(RequestError):
    """The same ``Idempotency-Key`` came with another body."""

    status = 422
    code = "IDEMPOTENCY_KEY_REUSED"


class RateLimited(RequestError):
    """The API key has used up its requests a minute."""

    status = 429
    code = "RATE_LIMITED"

    def __init__(self, message: str, retry_after_s: float):
        """Take the message, and the seconds until a request will be taken again."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ConcurrencyLimited(RateLimited):
    """The API key has as many requests under way as it may."""

    code = "CONCURRENCY_LIMITED"


class RunError(GatewayError):
    """The run itself ended badly; the session is as it was before."""


class RunCancelled(RunError):
    """The run was cancelled: by its client, by a newer request on the session, or since the process stops."""

    status = 409
    code = "RUN_CANCELLED"


class RunBlocked(RunError):
    """A guardrail of the agent stopped the run."""

    status = 422
    code = "RUN_BLOCKED"


class MaxTurnsReached(RunError):
    """The agent called tools for longer than ``GATEWAY_MAX_TURNS`` allows."""

    status = 422
    code = "MAX_TURNS_EXCEEDED"


class ContextTooLong(RunError):
    """The conversation has more tokens than the language model takes."""

    status = 422
    code = "CONTEXT_LENGTH_EXCEEDED"


class RunFailed(RunError):
    """The agent or one of its tools raised."""

    code = "RUN_FAILED"


class AgentMisconfigured(RunError):
    """The agent's code uses the SDK in a way that the SDK refuses."""

    code = "AGENT_MISCONFIGURED"


class ModelFailed(RunError):
    """The language model behind the agent could not be reached, or refused."""

    status = 502
    code = "MODEL_ERROR"


class ModelMisbehaved(RunError):
    """The language model answered something unusable: a tool that is not there, a broken structure."""

    status = 502
    code = "MODEL_BEHAVIOR_ERROR"


class ModelRateLimited(RunError):
    """The language model's provider takes no more requests for now."""

    status = 503
    code = "MODEL_RATE_LIMITED"


class ModelTimeout(RunError):
    """The language model did not answer in time."""

    status = 504
    code = "MODEL_TIMEOUT"


class ToolTimeout(RunError):
    """A tool that must answer in time did not."""

    status = 504
    code = "TOOL_TIMEOUT"


class RunTimeout(RunError):
    """The run took longer than ``GATEWAY_RUN_TIMEOUT_S``."""

    status = 504
    code = "RUN_TIMEOUT"


class ServiceUnavailable(GatewayError):
    """A part that serving cannot do without is away: the database, or the process is stopping."""

    status = 503
    code = "TEMPORARILY_UNAVAILABLE"
    retry_after_s = 2.0


class Overloaded(ServiceUnavailable):
    """The process has as many runs under way as ``GATEWAY_MAX_CONCURRENT_RUNS`` allows."""

    code = "OVERLOADED"
    retry_after_s = 1.0
