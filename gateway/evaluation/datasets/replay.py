"""Whether a row can be asked again: redaction may have taken out what a tool needs."""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from mlflow.entities import Span as MlflowSpan
from mlflow.entities import SpanStatusCode, SpanType
from mlflow.entities import Trace as MlflowTrace

from gateway.tracing.redaction.redactor import PLACEHOLDER

REPLAY_TAG = "gateway.replay"
REPLAY_BECAUSE_TAG = "gateway.replay_because"

Mode = Literal["live", "recorded_tools", "recorded_answer"]

_LEFT_OUT = re.compile(r"\[(?:input_)?(?:image|image_url|audio|file)\]|<\d+ bytes>")
"""What stands in a trace for what is no text (`gateway.tracing.messages.text_of`, and the redactor's form of bytes)."""


class Replay(NamedTuple):
    """How a row can be replayed, and why not better."""

    mode: Mode
    because: str | None = None
    """``None``: it can be asked as it is."""

    def tags(self) -> dict[str, str]:
        """Return the tags of the row that say so. A reason is always there: merging takes no tag away."""
        return {REPLAY_TAG: self.mode, REPLAY_BECAUSE_TAG: self.because or ""}


def replay_of(trace: MlflowTrace, inputs: Any) -> Replay:
    """Return how a row made of this trace can be replayed.

    ``live``: the agent can be asked as the user asked it. ``recorded_tools``: a placeholder of the inputs went into a
    tool's arguments, where the tool would look for what it stands for; what the tools answered then is in the trace.
    ``recorded_answer``: neither, so that only the answer of then can be scored. The same placeholder means the same
    value within a session; one that the inputs do not hold, the agent had from elsewhere, and will again.

    Args:
        trace: redacted, as it is in MLflow.
        inputs: of the row.
    """
    text = json.dumps(inputs, ensure_ascii=False)
    if left_out := _LEFT_OUT.search(text):
        return Replay("recorded_answer", f"{left_out[0]} of the inputs is not in the trace")
    placeholders = set(PLACEHOLDER.findall(text))
    tools = [span for span in trace.data.spans if span.span_type in {SpanType.TOOL, SpanType.RETRIEVER}]
    found = next(_uses(tools, placeholders), None)
    if found is None:
        return Replay("live")
    unrecorded = next((tool.name for tool in tools if not _is_recorded(tool)), None)
    if unrecorded is not None:
        return Replay("recorded_answer", f"{found}, and the result of {unrecorded} is not in the trace")
    return Replay("recorded_tools", found)


def tools_of(trace: MlflowTrace) -> list[str]:
    """Return the names of the tools that were called, each once, in the order of the alphabet."""
    return sorted({span.name for span in trace.data.spans if span.span_type == SpanType.TOOL})


def _uses(tools: list[MlflowSpan], placeholders: set[str]) -> Iterator[str]:
    for tool in tools:
        for placeholder in PLACEHOLDER.findall(json.dumps(tool.inputs, ensure_ascii=False, default=str)):
            if placeholder in placeholders:
                yield f"{tool.name} was called with {placeholder}"


def _is_recorded(tool: MlflowSpan) -> bool:
    return tool.outputs is not None or tool.status.status_code == SpanStatusCode.ERROR
