"""Our traces as MLflow's entities."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow.entities import Span as MlflowSpan
from mlflow.entities import SpanType, TraceData, TraceInfo, TraceLocation, TraceState
from mlflow.entities import Trace as MlflowTrace
from mlflow.tracing.constant import (
    MAX_CHARS_IN_TRACE_INFO_TAGS_KEY,
    MAX_CHARS_IN_TRACE_INFO_TAGS_VALUE,
    TRACE_REQUEST_RESPONSE_PREVIEW_MAX_LENGTH_OSS,
    TRACE_SCHEMA_VERSION,
    TRACE_SCHEMA_VERSION_KEY,
    CostKey,
    SpanAttributeKey,
    TokenUsageKey,
    TraceMetadataKey,
    TraceTagKey,
)
from mlflow.tracing.utils import aggregate_cost_from_spans, aggregate_usage_from_spans
from mlflow.utils.providers import cost_per_token
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanContext, Status, StatusCode, TraceFlags

from gateway.tracing.messages import text_of
from gateway.tracing.spans import Span, Trace

PROBABILITY_TAG = "gateway.inclusion_probability"
KEPT_TAG = "gateway.kept_because"
_NO_USAGE = {TokenUsageKey.INPUT_TOKENS: 0, TokenUsageKey.OUTPUT_TOKENS: 0, TokenUsageKey.TOTAL_TOKENS: 0}
_RESOURCE = Resource.get_empty()  # what it holds, MLflow looks up and writes as tags, one by one
_SPAN_TYPES = {"CHAIN": SpanType.CHAIN, "HANDOFF": "HANDOFF", "GUARDRAIL": SpanType.GUARDRAIL}
_CLIENT_REQUEST_ID_CHARS = 50  # what MLflow has room for
_CANCELLED = "CANCELLED"  # type of the error of a run that was ended from outside


def to_mlflow(trace: Trace, experiment_id: str, kept: dict[str, str]) -> MlflowTrace:
    """Return the trace as MLflow stores and scores it: session, user, token usage and cost where MLflow expects them.

    Args:
        trace: redacted.
        experiment_id: where it goes.
        kept: tags that say why it was kept, as of `kept_tags`.
    """
    spans = [_span(span, trace) for span in trace.spans]
    return MlflowTrace(info=_info(trace, spans, experiment_id, kept), data=TraceData(spans=spans))


def kept_tags(probability: float, reasons: Sequence[str]) -> dict[str, str]:
    """Return the tags that say why a trace was kept. Tags, since a later turn of its conversation may change them."""
    return {PROBABILITY_TAG: repr(probability), KEPT_TAG: ",".join(reasons)}


def _info(trace: Trace, spans: Sequence[MlflowSpan], experiment_id: str, kept: dict[str, str]) -> TraceInfo:
    root = trace.spans[0]
    request_id = trace.client_request_id
    fits = request_id is not None and len(request_id) <= _CLIENT_REQUEST_ID_CHARS
    return TraceInfo(
        trace_id=trace.trace_id,
        trace_location=TraceLocation.from_experiment_id(experiment_id),
        request_time=trace.started_ns // 1_000_000,
        execution_duration=(trace.ended_ns - trace.started_ns) // 1_000_000,
        state=TraceState.ERROR if trace.error else TraceState.OK,
        request_preview=_clipped(trace.request_preview) or _preview(root.inputs),
        response_preview=_clipped(trace.response_preview) or (_preview(root.outputs) if root.outputs else None),
        client_request_id=request_id if fits else None,
        trace_metadata=_fitting(trace.metadata) | _metadata(trace, spans),
        tags=_fitting(trace.tags)
        | {TraceTagKey.TRACE_NAME: trace.agent, "agent": trace.agent}
        | _cancelled(trace)
        | kept,
    )


def _metadata(trace: Trace, spans: Sequence[MlflowSpan]) -> dict[str, str]:
    """Return what is never changed again."""
    metadata = {
        TRACE_SCHEMA_VERSION_KEY: str(TRACE_SCHEMA_VERSION),
        TraceMetadataKey.TRACE_SESSION: trace.session_id,
        TraceMetadataKey.TOKEN_USAGE: json.dumps(aggregate_usage_from_spans(spans) or _NO_USAGE),
        "gateway.agent": trace.agent,
        "gateway.agent_version": trace.agent_version,
        "gateway.offline": str(trace.offline).lower(),
    }
    if cost := aggregate_cost_from_spans(spans):
        metadata[TraceMetadataKey.COST] = json.dumps(cost)
    if trace.user_id:
        metadata[TraceMetadataKey.TRACE_USER] = trace.user_id
    if trace.client_left:
        metadata["gateway.client_left"] = "true"
    if trace.traceparent:
        metadata["gateway.traceparent"] = trace.traceparent
    if trace.client_request_id:
        metadata["gateway.client_request_id"] = trace.client_request_id
    return metadata


def _cancelled(trace: Trace) -> dict[str, str]:
    is_cancelled = trace.error is not None and trace.error.type == _CANCELLED
    return {"gateway.cancelled": "true"} if is_cancelled else {}


def _fitting(texts: Mapping[str, str]) -> dict[str, str]:
    """Return what an agent's author has set, as long as MLflow takes it: a tag must not cost the whole trace."""
    return {
        key[:MAX_CHARS_IN_TRACE_INFO_TAGS_KEY]: value[:MAX_CHARS_IN_TRACE_INFO_TAGS_VALUE]
        for key, value in texts.items()
    }


def _clipped(preview: str | None) -> str | None:
    return preview[:TRACE_REQUEST_RESPONSE_PREVIEW_MAX_LENGTH_OSS] if preview else None


def _preview(payload: Any) -> str:
    """Return the last message's text, as long as MLflow's list shows it."""
    conversation = payload.get("messages") if isinstance(payload, dict) else None
    text = text_of(conversation[-1].get("content")) if conversation else json.dumps(payload)
    return text[:TRACE_REQUEST_RESPONSE_PREVIEW_MAX_LENGTH_OSS]


def _priced(span: Span, trace: Trace) -> dict[str, Any]:
    """Return the span's cost as an attribute, by MLflow's price list; nothing where that knows no price."""
    usage, model = span.attributes.get(SpanAttributeKey.CHAT_USAGE), span.attributes.get(SpanAttributeKey.MODEL)
    if trace.offline or not usage or not isinstance(model, str) or SpanAttributeKey.LLM_COST in span.attributes:
        return {}
    provider = span.attributes.get(SpanAttributeKey.MODEL_PROVIDER)
    # Not by MLflow's function around it: where LiteLLM is installed that imports it, in the middle of the first trace.
    for named in (str(provider).lower(), None) if provider else (None,):
        costs = cost_per_token(
            model,
            usage.get(TokenUsageKey.INPUT_TOKENS, 0),
            usage.get(TokenUsageKey.OUTPUT_TOKENS, 0),
            named,
            cache_read_input_tokens=usage.get(TokenUsageKey.CACHE_READ_INPUT_TOKENS),
            cache_creation_input_tokens=usage.get(TokenUsageKey.CACHE_CREATION_INPUT_TOKENS),
        )
        if costs is not None:
            return {SpanAttributeKey.LLM_COST: _cost(*costs)}
    return {}


def _cost(input_usd: float, output_usd: float) -> dict[str, float]:
    return {
        CostKey.INPUT_COST: input_usd,
        CostKey.OUTPUT_COST: output_usd,
        CostKey.TOTAL_COST: input_usd + output_usd,
    }


def _span(span: Span, trace: Trace) -> MlflowSpan:
    trace_number = int(trace.trace_id.removeprefix("tr-"), 16)

    def context(span_id: str) -> SpanContext:
        return SpanContext(trace_number, int(span_id, 16), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))

    attributes: dict[str, Any] = {
        SpanAttributeKey.REQUEST_ID: trace.trace_id,
        SpanAttributeKey.SPAN_TYPE: _SPAN_TYPES.get(span.kind, span.kind),
        **{key: value for key, value in span.attributes.items() if value is not None},
        **_priced(span, trace),
    }
    if span.inputs is not None:
        attributes[SpanAttributeKey.INPUTS] = span.inputs
    if span.outputs is not None:
        attributes[SpanAttributeKey.OUTPUTS] = span.outputs
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
