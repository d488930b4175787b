"""The tools that an agent had, in the form that MLflow's judges of tool calls read.

They take the definitions on the model calls' spans, leave out silently what their own model of a schema refuses, and
where nothing is left they ask the model to guess which tools there were: calls that nobody has counted on, and an
answer that may be wrong. So definitions are made to fit, and where there are none the tools that were called stand for
them, by name.
"""

from typing import Any

from mlflow.entities import Span, SpanType, Trace
from mlflow.tracing.constant import SpanAttributeKey
from mlflow.types.chat import ChatTool
from pydantic import ValidationError

from gateway.evaluation.spans import with_attributes, with_spans

_MODEL_CALLS = frozenset({SpanType.CHAT_MODEL, SpanType.LLM})
_PLAIN_TYPES = frozenset({"string", "number", "integer", "object", "array", "boolean", "null"})


def with_definitions(trace: Trace) -> Trace:
    """Return the trace with definitions that the judges can read: itself, if it has such, or has no model call."""
    model_calls = [span for span in trace.data.spans if span.span_type in _MODEL_CALLS]
    had = {span.span_id: _definitions(span) for span in model_calls}
    fitting = {span_id: [_fit(each) for each in tools] for span_id, tools in had.items()}
    if model_calls and not any(fitting.values()):
        called = dict.fromkeys(span.name for span in trace.data.spans if span.span_type == SpanType.TOOL)
        fitting[model_calls[0].span_id] = [{"type": "function", "function": {"name": name}} for name in called]
    if fitting == had:
        return trace
    return with_spans(
        trace,
        [
            with_attributes(span, {SpanAttributeKey.CHAT_TOOLS: fitting[span.span_id]})
            if fitting.get(span.span_id, []) != had.get(span.span_id, [])
            else span
            for span in trace.data.spans
        ],
    )


def _definitions(span: Span) -> list[Any]:
    tools = span.get_attribute(SpanAttributeKey.CHAT_TOOLS)
    return tools if isinstance(tools, list) else []


def _fit(tool: Any) -> Any:
    """Return a definition that MLflow takes: the very one if it does, else what it can show of it."""
    if not isinstance(tool, dict):
        return {"type": "function", "function": {"name": str(tool)}}
    try:
        ChatTool(**tool)
    except ValidationError:
        inner = tool.get("function")
        function: dict[str, Any] = inner if isinstance(inner, dict) else tool
        return {
            "type": "function",
            "function": {
                "name": str(function.get("name") or tool.get("type")),
                "description": str(function.get("description") or ""),
                "parameters": _parameters(function.get("parameters")),
            },
        }
    return tool


def _parameters(schema: Any) -> dict[str, Any]:
    schema = schema if isinstance(schema, dict) else {}
    properties = schema.get("properties")
    required = schema.get("required")
    return {
        "type": "object",
        "properties": {
            str(name): _property(each) for name, each in (properties if isinstance(properties, dict) else {}).items()
        },
        "required": [str(name) for name in required] if isinstance(required, list) else [],
    }


def _property(schema: Any) -> dict[str, Any]:
    schema = schema if isinstance(schema, dict) else {}
    kind, description = schema.get("type"), schema.get("description")
    return ({"type": kind} if isinstance(kind, str) and kind in _PLAIN_TYPES else {}) | (
        {"description": str(description)} if description else {}
    )
