"""In-memory MLflow traces in the shape the gateway captures: no server, no store, no clock.

`trace("question", "answer", Call("tool", {...}, result))` is one turn; each further argument is one round of
tool calls, a list being calls made in parallel. `conversation((user, answer, *rounds), ...)` is a session of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from mlflow.entities import SpanType, Trace, TraceData, TraceInfo, TraceLocation, TraceState
from mlflow.entities.span import Span
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanContext, Status, StatusCode

TURN_MS = 60_000


@dataclass(frozen=True)
class Call:
    """One tool call; with `error` it failed, and `result` is then the text that the model was told."""

    name: str
    arguments: Any = None
    result: Any = None
    error: str | None = None
    documents: Sequence[str] = ()
    fits: bool | None = None
    """What the gateway found before redaction; ``None``: it did not look."""


def tool(name: str, *, required: Sequence[str] = (), **properties: Any) -> dict[str, Any]:
    """Return a tool definition as `mlflow.chat.tools` holds it; each property is a JSON Schema."""
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}


class _Builder:
    """Collects the spans of one trace, each starting one millisecond after the one before it."""

    def __init__(self, index: int) -> None:
        self.trace_id = index + 1
        self.request_id = f"tr-{self.trace_id:032x}"
        self.started_ns = (index + 1) * TURN_MS * 1_000_000
        self.spans: list[Span] = []
        self._ids = count(1)

    def add(
        self, name: str, span_type: str, inputs: Any, outputs: Any, *, parent: int | None = 1, error: str | None = None,
        **attributes: Any,
    ) -> int:  # fmt: skip
        span_id = next(self._ids)
        at = self.started_ns + span_id * 1_000_000
        values = {"mlflow.traceRequestId": self.request_id, "mlflow.spanType": span_type, "mlflow.spanInputs": inputs}
        values |= {} if outputs is None else {"mlflow.spanOutputs": outputs}
        values |= {key if "." in key else f"mlflow.chat.{key}": value for key, value in attributes.items()}
        failure = {"exception.type": "RuntimeError", "exception.message": error or ""}
        otel_span = ReadableSpan(
            name=name,
            context=SpanContext(self.trace_id, span_id, is_remote=False),
            parent=None if parent is None else SpanContext(self.trace_id, parent, is_remote=False),
            resource=Resource.get_empty(),
            attributes={key: json.dumps(value) for key, value in values.items()},
            events=[Event("exception", failure, at)] if error else [],
            status=Status(StatusCode.ERROR, error) if error else Status(StatusCode.OK),
            start_time=at,
            end_time=at + 500_000,
        )
        self.spans.append(Span(otel_span))
        return span_id


def _add_round(builder: _Builder, calls: list[Call], messages: list[Any], tools: Sequence[Any]) -> None:
    """Add one model call that asks for `calls`, the calls, and what they told the model."""
    requests = [
        {
            "id": f"call_{number}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments),
            },
        }
        for number, call in enumerate(calls)
    ]
    message = {"role": "assistant", "content": None, "tool_calls": requests}
    outputs = {"choices": [{"message": message}]}
    builder.add("model", SpanType.CHAT_MODEL, {"messages": list(messages)}, outputs, tools=list(tools))
    messages.append(message)
    for call, request in zip(calls, requests, strict=True):
        noted = {} if call.fits is None else {"gateway.arguments_valid": call.fits}
        parent = builder.add(call.name, SpanType.TOOL, call.arguments, call.result, error=call.error, **noted)
        if call.documents:
            documents = [
                {"page_content": text, "metadata": {"doc_id": f"d{i}"}} for i, text in enumerate(call.documents)
            ]
            builder.add("retrieve", SpanType.RETRIEVER, call.arguments, documents, parent=parent)
        messages.append({"role": "tool", "tool_call_id": request["id"], "content": json.dumps(call.result)})


def trace(
    user: str,
    answer: str | None,
    *rounds: Call | list[Call],
    tools: Sequence[dict[str, Any]] = (),
    session: str = "s-1",
    index: int = 0,
) -> Trace:
    """Return one turn; `answer=None` is a run that failed. `index` is its place in the session."""
    builder = _Builder(index)
    asked = [{"role": "user", "content": user}]
    answered = None if answer is None else {"messages": [{"role": "assistant", "content": answer}]}
    failure = "the run failed" if answer is None else None
    builder.add("support", SpanType.AGENT, {"messages": asked}, answered, parent=None, error=failure)
    messages: list[Any] = [{"role": "system", "content": "You help customers."}, *asked]
    for calls in rounds:
        _add_round(builder, [calls] if isinstance(calls, Call) else calls, messages, tools)
    if answer is not None:
        outputs = {"choices": [{"message": {"role": "assistant", "content": answer}}]}
        builder.add("model", SpanType.CHAT_MODEL, {"messages": messages}, outputs, tools=list(tools))
    info = TraceInfo(
        trace_id=builder.request_id,
        trace_location=TraceLocation.from_experiment_id("0"),
        request_time=builder.started_ns // 1_000_000,
        state=TraceState.ERROR if failure else TraceState.OK,
        trace_metadata={"mlflow.trace.session": session},
    )
    return Trace(info=info, data=TraceData(builder.spans))


def conversation(*turns: tuple[Any, ...]) -> list[Trace]:
    """Return the traces of one session, a minute apart; each turn is `(user, answer, *rounds)`."""
    return [trace(*turn, index=index) for index, turn in enumerate(turns)]
