"""What is in a span that was made with OpenTelemetry or MLflow.

Its attributes are its maker's, so there can be no list of all that may stay. What is left out: MLflow's bookkeeping,
and whatever is named like a credential.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from typing import Any

from opentelemetry.trace import StatusCode

from gateway.tracing.capture.content import CHAT_TOOLS, MODEL, PROVIDER, TOKEN_USAGE, Content, documents, span_kind
from gateway.tracing.spans import SpanError

_TYPE, _INPUTS, _OUTPUTS = "mlflow.spanType", "mlflow.spanInputs", "mlflow.spanOutputs"
_BY_MLFLOW = "mlflow.traceRequestId"
_KEPT = {
    CHAT_TOOLS,
    TOKEN_USAGE,
    MODEL,
    PROVIDER,
    "mlflow.llm.cost",
    "mlflow.message.format",
    "mlflow.spanDescription",
}
_RESERVED = ("mlflow.", "gateway.")
_CREDENTIAL = re.compile(
    r"authorization|api.?key|secret|password|passwd|cookie|credential|(^|[^a-z])token$|[a-z]_token$|header",
    re.IGNORECASE,
)
_UNTOLD = {"extra_headers", "default_headers", "headers", "api_key"}
"""Arguments of clients' calls, which autologging copies."""
_OPERATIONS = {"chat": "CHAT_MODEL", "text_completion": "LLM", "embeddings": "EMBEDDING", "execute_tool": "TOOL"}
"""OpenTelemetry's ``gen_ai.operation.name``."""


def foreign_content(span: Any) -> Content:
    """Return what is in a foreign span, or in a stand-in for one of ours."""
    attributes = read_attributes(span)
    named = attributes.get(_TYPE) or _OPERATIONS.get(str(attributes.get("gen_ai.operation.name")))
    kind, inputs, outputs = span_kind(named), attributes.get(_INPUTS), attributes.get(_OUTPUTS)
    if isinstance(inputs, dict):
        inputs = {key: value for key, value in inputs.items() if key not in _UNTOLD}
    if kind == "RETRIEVER":
        outputs = documents(outputs)
    kept = {key: value for key, value in attributes.items() if _stays(key) and value is not None}
    return Content(span.name, kind, inputs, outputs, kept)


def foreign_error(span: Any) -> SpanError | None:
    """Return why the span failed; ``None`` if it did not."""
    if span.status.status_code is not StatusCode.ERROR:
        return None
    for event in reversed(span.events):
        if event.name == "exception":
            told: Mapping[str, Any] = event.attributes or {}
            return SpanError(str(told.get("exception.type") or "Error"), str(told.get("exception.message") or ""))
    return SpanError("Error", span.status.description or "failed")


def read_attributes(span: Any) -> dict[str, Any]:
    """Return a span's attributes; those that MLflow wrote as JSON, as what they stand for."""
    attributes: dict[str, Any] = {}
    with contextlib.suppress(RuntimeError):  # a span left open may be written to by a stray thread just now
        attributes = dict(span.attributes or {})
    if _BY_MLFLOW not in attributes:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in attributes.items()}
    return {key: _read(value) for key, value in attributes.items()}


def _read(value: Any) -> Any:
    with contextlib.suppress(ValueError):
        return json.loads(value) if isinstance(value, str) else value
    return value


def _stays(key: str) -> bool:
    return key in _KEPT or not (key.startswith(_RESERVED) or _CREDENTIAL.search(key))
