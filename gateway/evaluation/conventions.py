"""Our traces as plain OpenTelemetry spans, for collectors that know nothing of MLflow.

Names and attributes follow OpenTelemetry's semantic conventions for generative AI. What these have no place for stands
under ``gateway.``: the kind of a span, the inputs and outputs of what is neither model, agent nor tool.

A run whose caller sent a ``traceparent`` goes on in the caller's trace, below the caller's span; our own id of it is in
the root's ``gateway.trace_id``.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as genai
from opentelemetry.semconv._incubating.attributes.user_attributes import USER_ID
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.semconv.attributes.exception_attributes import EXCEPTION_MESSAGE, EXCEPTION_TYPE
from opentelemetry.semconv.attributes.service_attributes import SERVICE_NAME, SERVICE_VERSION
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from gateway import __version__
from gateway.tracing.capture.content import (
    ANSWERED_BY,
    CHAT_TOOLS,
    FIRST_TOKEN_S,
    MODEL,
    PROVIDER,
    REASONING_TOKENS,
    TOKEN_USAGE,
)
from gateway.tracing.capture.traceparent import parse_traceparent
from gateway.tracing.messages import text_of
from gateway.tracing.spans import Span, Trace

_RESOURCE = Resource({SERVICE_NAME: "agent-gateway", SERVICE_VERSION: __version__})
_SCOPE = InstrumentationScope("gateway", __version__)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_KINDS = {"CHAT_MODEL": SpanKind.CLIENT, "LLM": SpanKind.CLIENT, "EMBEDDING": SpanKind.CLIENT}
_OPERATIONS = {
    "AGENT": "invoke_agent",
    "CHAT_MODEL": "chat",
    "LLM": "text_completion",
    "TOOL": "execute_tool",
    "RETRIEVER": "retrieval",
    "EMBEDDING": "embeddings",
}
_COUNTS = {
    "input_tokens": genai.GEN_AI_USAGE_INPUT_TOKENS,
    "output_tokens": genai.GEN_AI_USAGE_OUTPUT_TOKENS,
    "cache_read_input_tokens": genai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS,
    "cache_creation_input_tokens": genai.GEN_AI_USAGE_CACHE_CREATION_INPUT_TOKENS,
}
_RENAMED = {
    MODEL: genai.GEN_AI_REQUEST_MODEL,
    ANSWERED_BY: genai.GEN_AI_RESPONSE_MODEL,
    PROVIDER: genai.GEN_AI_PROVIDER_NAME,
    FIRST_TOKEN_S: genai.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK,
    REASONING_TOKENS: genai.GEN_AI_USAGE_REASONING_OUTPUT_TOKENS,
    CHAT_TOOLS: genai.GEN_AI_TOOL_DEFINITIONS,
}
_SETTINGS = {
    "temperature": genai.GEN_AI_REQUEST_TEMPERATURE,
    "top_p": genai.GEN_AI_REQUEST_TOP_P,
    "max_tokens": genai.GEN_AI_REQUEST_MAX_TOKENS,
    "frequency_penalty": genai.GEN_AI_REQUEST_FREQUENCY_PENALTY,
    "presence_penalty": genai.GEN_AI_REQUEST_PRESENCE_PENALTY,
}
_MLFLOWS_OWN = "mlflow."

Attributes = dict[str, Any]


def to_opentelemetry(trace: Trace, *, probability: float, reasons: Sequence[str]) -> list[ReadableSpan]:
    """Return the spans of a redacted trace, root first.

    Args:
        trace: the trace.
        probability: its inclusion probability, as far as is known now.
        reasons: why it is kept.
    """
    caller = parse_traceparent(trace.traceparent)
    number = int(caller.trace_id if caller else trace.trace_id.removeprefix("tr-"), 16)
    state = TraceState.from_header([trace.tracestate]) if caller and trace.tracestate else None

    def context(span_id: str, *, is_remote: bool = False) -> SpanContext:
        return SpanContext(number, int(span_id, 16), is_remote, _SAMPLED, state)

    def parent(span: Span) -> SpanContext | None:
        if span.parent_id is not None:
            return context(span.parent_id)
        return context(caller.span_id, is_remote=True) if caller else None

    kept: Attributes = {"gateway.inclusion_probability": probability, "gateway.kept_because": list(reasons)}
    return [
        ReadableSpan(
            name=_name(span),
            resource=_RESOURCE,
            instrumentation_scope=_SCOPE,
            context=context(span.span_id),
            parent=parent(span),
            kind=SpanKind.SERVER if span.parent_id is None else _KINDS.get(span.kind, SpanKind.INTERNAL),
            attributes=_attributes(span, trace) | (kept if span.parent_id is None else {}),
            events=_events(span),
            status=Status(StatusCode.ERROR, span.error.message) if span.error else Status(StatusCode.UNSET),
            start_time=span.start_ns,
            end_time=span.end_ns,
        )
        for span in trace.spans
    ]


def _name(span: Span) -> str:
    """Return the span's name as the conventions have it: the operation, and what it is done with."""
    operation = _OPERATIONS.get(span.kind)
    return f"{operation} {span.attributes.get(MODEL) or span.name}" if operation else span.name


def _events(span: Span) -> list[Event]:
    if span.error is None:
        return []
    reason = {EXCEPTION_TYPE: span.error.type, EXCEPTION_MESSAGE: span.error.message}
    return [Event("exception", attributes=reason, timestamp=span.end_ns)]


def _attributes(span: Span, trace: Trace) -> Attributes:
    attributes: Attributes = {"gateway.kind": span.kind, genai.GEN_AI_CONVERSATION_ID: trace.session_id}
    if operation := _OPERATIONS.get(span.kind):
        attributes[genai.GEN_AI_OPERATION_NAME] = operation
    for key, value in span.attributes.items():
        name = _RENAMED.get(key, key)
        if value is not None and not name.startswith(_MLFLOWS_OWN):
            attributes[name] = _plain(value)
    usage = span.attributes.get(TOKEN_USAGE) or {}
    attributes |= {name: usage[key] for key, name in _COUNTS.items() if key in usage}
    attributes |= _content(span)
    if span.error:
        attributes[ERROR_TYPE] = span.error.type
    return attributes | (_of_root(trace) if span.parent_id is None else {})


def _of_root(trace: Trace) -> Attributes:
    """Return what concerns the run as a whole."""
    attributes: Attributes = {
        "gateway.trace_id": trace.trace_id,
        "gateway.offline": trace.offline,
        genai.GEN_AI_AGENT_NAME: trace.agent,
        genai.GEN_AI_AGENT_VERSION: trace.agent_version,
        **{f"gateway.tag.{key}": value for key, value in trace.tags.items()},
        **{f"gateway.metadata.{key}": value for key, value in trace.metadata.items()},
    }
    if trace.user_id:
        attributes[USER_ID] = trace.user_id
    if trace.client_request_id:
        attributes["gateway.client_request_id"] = trace.client_request_id
    return attributes


def _content(span: Span) -> Attributes:
    """Return inputs and outputs where the conventions have a place for them, and else under ``gateway.``."""
    match span.kind:
        case "AGENT" | "CHAT_MODEL" if isinstance(span.inputs, dict) and isinstance(span.inputs.get("messages"), list):
            return _conversation(span)
        case "AGENT":
            named: Attributes = {genai.GEN_AI_AGENT_NAME: span.name}
        case "TOOL":
            asked, told = genai.GEN_AI_TOOL_CALL_ARGUMENTS, genai.GEN_AI_TOOL_CALL_RESULT
            named = {genai.GEN_AI_TOOL_NAME: span.name, genai.GEN_AI_TOOL_TYPE: "function"}
            return named | _given({asked: span.inputs, told: span.outputs})
        case "RETRIEVER":
            return _given({"gateway.inputs": span.inputs, genai.GEN_AI_RETRIEVAL_DOCUMENTS: span.outputs})
        case _:
            named = {}
    return named | _given({"gateway.inputs": span.inputs, "gateway.outputs": span.outputs})


def _conversation(span: Span) -> Attributes:
    messages = [each for each in span.inputs["messages"] if isinstance(each, dict)]
    system = [part for each in messages if each.get("role") == "system" for part in _parts(each)]
    asked = [_message(each) for each in messages if each.get("role") != "system"]
    attributes: Attributes = {genai.GEN_AI_INPUT_MESSAGES: asked, genai.GEN_AI_SYSTEM_INSTRUCTIONS: system or None}
    if span.kind == "AGENT":
        attributes[genai.GEN_AI_AGENT_NAME] = span.name
    attributes[genai.GEN_AI_OUTPUT_MESSAGES] = _answers(span.outputs)
    settings = {name: span.inputs[key] for key, name in _SETTINGS.items() if span.inputs.get(key) is not None}
    return _given(attributes) | settings


def _answers(outputs: Any) -> list[dict[str, Any]] | None:
    if not isinstance(outputs, dict):
        return None
    choices: Sequence[Any] = outputs.get("choices") or ()
    messages = outputs.get("messages") or [each.get("message") for each in choices if isinstance(each, dict)]
    return [
        _message(each) | {"finish_reason": "tool_call" if each.get("tool_calls") else "stop"}
        for each in messages
        if isinstance(each, dict)
    ]


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a chat message in the form of the conventions: a role, and parts."""
    return {"role": message.get("role", "assistant"), "parts": _parts(message)}


def _parts(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    text = text_of(message.get("content")) if message.get("content") else ""
    if message.get("role") == "tool":
        return [{"type": "tool_call_response", "id": message.get("tool_call_id"), "response": text}]
    parts: list[dict[str, Any]] = [{"type": "text", "content": text}] if text else []
    for call in message.get("tool_calls") or ():
        function = call.get("function") or {}
        asked = {"name": function.get("name"), "arguments": function.get("arguments")}
        parts.append({"type": "tool_call", "id": call.get("id"), **asked})
    return parts


def _given(attributes: Attributes) -> Attributes:
    return {key: _plain(value) for key, value in attributes.items() if value is not None}


def _plain(value: Any) -> Any:
    """Return a value as an attribute can hold it: JSON, unless it is a single one."""
    return value if isinstance(value, str | bool | int | float) else json.dumps(value, ensure_ascii=False, default=str)
