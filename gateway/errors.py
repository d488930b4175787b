"""Every error that the gateway raises on purpose.

::

    GatewayError
      ConfigurationError       a setting, a plug-in folder or the machine is not as it must be: nothing starts
      RequestError             the client can mend it (4xx)
        InvalidRequest           400  INVALID_PARAMETER_VALUE
        AgentNotFound            404  AGENT_NOT_FOUND
        SessionBusy              409  SESSION_BUSY
      RunError                 the run itself ended badly
        RunBlocked               422  RUN_BLOCKED
        MaxTurnsReached          422  MAX_TURNS_EXCEEDED
        RunFailed                500  RUN_FAILED
        ModelFailed              502  MODEL_ERROR
        RunTimeout               504  RUN_TIMEOUT
      ServiceUnavailable       503  TEMPORARILY_UNAVAILABLE

A message says what was wrong and what to do next. It reaches the client as it is, so it never holds a prompt, a key,
an internal address or a stack trace.
"""

from typing import ClassVar


class GatewayError(Exception):
    """Base of all errors raised on purpose. ``str(error)`` is fit to be shown to the person who can mend it."""

    status: ClassVar[int] = 500
    """HTTP status when it ends a request."""

    code: ClassVar[str] = "INTERNAL_ERROR"
    """``error_code`` in the JSON answer: stable, for programs."""

    trace_id: str | None = None
    """Trace of the run that it ended; ``None`` if there was no run."""


class ConfigurationError(GatewayError):
    """A setting, a plug-in folder or the machine is not as it must be; the message names the setting or the file."""


class RequestError(GatewayError):
    """The client sent something that it can mend."""

    status = 400


class InvalidRequest(RequestError):
    """The body does not have the documented form."""

    code = "INVALID_PARAMETER_VALUE"


class AgentNotFound(RequestError):
    """No agent of that name is served here."""

    status = 404
    code = "AGENT_NOT_FOUND"


class SessionBusy(RequestError):
    """Another request kept the session's turn for longer than this one may wait."""

    status = 409
    code = "SESSION_BUSY"


class RunError(GatewayError):
    """The run itself ended badly; the session is as it was before."""


class RunBlocked(RunError):
    """A guardrail of the agent stopped the run."""

    status = 422
    code = "RUN_BLOCKED"


class MaxTurnsReached(RunError):
    """The agent called tools for longer than ``GATEWAY_MAX_TURNS`` allows."""

    status = 422
    code = "MAX_TURNS_EXCEEDED"


class RunFailed(RunError):
    """The agent or one of its tools raised."""

    code = "RUN_FAILED"


class ModelFailed(RunError):
    """The language model behind the agent could not be reached, refused, or answered something unusable."""

    status = 502
    code = "MODEL_ERROR"


class RunTimeout(RunError):
    """The run took longer than ``GATEWAY_RUN_TIMEOUT_S``."""

    status = 504
    code = "RUN_TIMEOUT"


class ServiceUnavailable(GatewayError):
    """A part that serving cannot do without is away: the database, or the process is stopping."""

    status = 503
    code = "TEMPORARILY_UNAVAILABLE"
