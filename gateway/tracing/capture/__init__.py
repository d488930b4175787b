"""Capture: every span of a run is filed with the run, and made into one clean tree later.

``filing`` is the SDK's tracing processor, on the ``provider`` that keeps it there; ``recording`` is what it fills.
Spans that tools make with OpenTelemetry and MLflow come in by ``foreign`` and ``mlflow_bridge``. ``assembly`` makes the
tree of it, off the request's way, with the ``content`` of the SDK's spans, the ``foreign_content`` of the others, and
what is to be known of a call's ``arguments`` before they are redacted. ``traceparent`` is the caller's place.
"""

from gateway.tracing.capture.assembly import assemble, outcome
from gateway.tracing.capture.content import CHAT_TOOLS, MODEL, PROVIDER, TOKEN_USAGE
from gateway.tracing.capture.filing import SpanCapture
from gateway.tracing.capture.recording import RunCapture

__all__ = [
    "CHAT_TOOLS",
    "MODEL",
    "PROVIDER",
    "TOKEN_USAGE",
    "RunCapture",
    "SpanCapture",
    "assemble",
    "outcome",
]
