"""Our traces as MLflow's entities."""

import json
from typing import Any

from mlflow.entities import Span as MlflowSpan
from mlflow.entities import SpanType, TraceData, TraceInfo, TraceLocation, TraceState
from mlflow.entities import Trace as MlflowTrace
from mlflow.tracing.constant import (
    TRACE_REQUEST_RESPONSE_PREVIEW_MAX_LENGTH_OSS,
    TRACE_SCHEMA_VERSION,
    TRACE_SCHEMA_VERSION_KEY,
    SpanAttributeKey,
    TokenUsageKey,
    TraceMetadataKey,
    TraceTagKey,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from gateway.tracing.messages import text_of
from gateway.tracing.spans import Span, Trace

_USAGE_KEYS = (TokenUsageKey.INPUT_TOKENS, TokenUsageKey.OUTPUT_TOKENS, TokenUsageKey.TOTAL_TOKENS)
_RESOURCE = Resource({"service.name": "agent-gateway"})
_SPAN_TYPES = {"CHAIN": SpanType.CHAIN, "HANDOFF": "HANDOFF", "GUARDRAIL": SpanType.GUARDRAIL}


def to_mlflow(trace: Trace, experiment_id: str) -> MlflowTrace:
    """Return the trace as MLflow stores and scores it: session, user and token usage where MLflow expects them."""
    return MlflowTrace(
        info=_info(trace, experiment_id), data=TraceData(spans=[_span(span, trace) for span in trace.spans])
    )


def _info(trace: Trace, experiment_id: str) -> TraceInfo:
    root = trace.spans[0]
    metadata = {
        TRACE_SCHEMA_VERSION_KEY: str(TRACE_SCHEMA_VERSION),
        TraceMetadataKey.TRACE_SESSION: trace.session_id,
        TraceMetadataKey.TOKEN_USAGE: json.dumps(_token_usage(trace)),
        "gateway.agent": trace.agent,
        "gateway.agent_version": trace.agent_version,
        "gateway.offline": str(trace.offline).lower(),
        "gateway.inclusion_probability": repr(trace.inclusion_probability),
    }
    if trace.user_id:
        metadata[TraceMetadataKey.TRACE_USER] = trace.user_id
    if trace.client_left:
        metadata["gateway.client_left"] = "true"
    return TraceInfo(
        trace_id=trace.trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=trace.started_ns // 1_000_000,
        execution_duration=(trace.ended_ns - trace.started_ns) // 1_000_000,
        state=TraceState.ERROR if trace.error else TraceState.OK,
        request_preview=_preview(root.inputs),
        response_preview=_preview(root.outputs) if root.outputs else None,
        trace_metadata=metadata,
        tags={TraceTagKey.TRACE_NAME: trace.agent, "agent": trace.agent},
    )


def _preview(payload: Any) -> str:
    """Return the last message's text, as long as MLflow's list shows it."""
    conversation = payload.get("messages") if isinstance(payload, dict) else None
    text = text_of(conversation[-1].get("content")) if conversation else json.dumps(payload)
    return text[:TRACE_REQUEST_RESPONSE_PREVIEW_MAX_LENGTH_OSS]


def _token_usage(trace: Trace) -> dict[str, int]:
    calls = [span.attributes.get(SpanAttributeKey.CHAT_USAGE, {}) for span in trace.spans]
    return {key: sum(call.get(key, 0) for call in calls) for key in _USAGE_KEYS}


def _span(span: Span, trace: Trace) -> MlflowSpan:
    trace_number = int(trace.trace_id.removeprefix("tr-"), 16)

    def context(span_id: str) -> SpanContext:
        return SpanContext(trace_number, int(span_id, 16), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))

    attributes: dict[str, Any] = {
        SpanAttributeKey.REQUEST_ID: trace.trace_id,
        SpanAttributeKey.SPAN_TYPE: _SPAN_TYPES.get(span.kind, span.kind),
        **{key: value for key, value in span.attributes.items() if value is not None},
    }
    if span.inputs is not None:
        attributes[SpanAttributeKey.INPUTS] = span.inputs
    if span.outputs is not None:
        attributes[SpanAttributeKey.OUTPUTS] = span.outputs
    if span.parent_id is None:
        attributes[SpanAttributeKey.SESSION_ID] = trace.session_id
        if trace.user_id:
            attributes[SpanAttributeKey.USER_ID] = trace.user_id
    status, events = Status(StatusCode.OK), []
    if span.error:
        status = Status(StatusCode.ERROR, span.error.message)
        reason = {"exception.type": span.error.type, "exception.message": span.error.message}
        events.append(Event("exception", attributes=reason, timestamp=span.end_ns))
    return MlflowSpan(
        ReadableSpan(
            name=span.name,
            resource=_RESOURCE,
            context=context(span.span_id),
            parent=context(span.parent_id) if span.parent_id else None,
            attributes={key: json.dumps(value, ensure_ascii=False) for key, value in attributes.items()},
            events=events,
            status=status,
            start_time=span.start_ns,
            end_time=span.end_ns,
        )
    )
