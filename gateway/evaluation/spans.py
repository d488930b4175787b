"""Copies of MLflow's traces and spans with something changed: what is shown to a judge instead of what is stored."""

import json
from collections.abc import Mapping
from typing import Any

from mlflow.entities import Span, Trace, TraceData


def with_attributes(span: Span, changes: Mapping[str, Any]) -> Span:
    """Return a copy of the span with other attributes; ``None`` takes one away."""
    written = span.to_dict()
    attributes = dict(written["attributes"])
    for name, value in changes.items():
        attributes.pop(name, None)
        if value is not None:
            attributes[name] = json.dumps(value, ensure_ascii=False, default=str)
    return Span.from_dict(written | {"attributes": attributes})


def with_spans(trace: Trace, spans: list[Span]) -> Trace:
    """Return the trace with other spans."""
    return Trace(info=trace.info, data=TraceData(spans=spans))
