"""Which traces, or conversations, a scorer is for: the filter of its rule, as a pure function on facts of the trace."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from mlflow.entities import SpanType, TraceState
from mlflow.entities import Trace as MlflowTrace

from gateway.rules import ScorerRule

Reason = Literal["agent", "status", "tag", "tool", "latency"]
"""What kept a scorer from a trace."""


class TraceFacts:
    """What a filter may ask of a trace, or of all traces of a conversation, oldest first.

    Worked out when it is first asked for: without filters, nothing is.
    """

    def __init__(self, traces: Sequence[MlflowTrace]):
        self._traces = traces

    @cached_property
    def agent(self) -> str:
        """Agent of the latest run; empty if something else than the gateway made the trace."""
        return str(self._traces[-1].info.trace_metadata.get("gateway.agent", ""))

    @cached_property
    def status(self) -> Literal["ok", "error"]:
        """Whether a run failed."""
        return "error" if any(trace.info.state == TraceState.ERROR for trace in self._traces) else "ok"

    @cached_property
    def tags(self) -> set[tuple[str, str]]:
        """Tags with their values."""
        return {tag for trace in self._traces for tag in trace.info.tags.items()}

    @cached_property
    def tools(self) -> set[str]:
        """Tools that were called."""
        spans = (span for trace in self._traces for span in trace.data.spans)
        return {span.name for span in spans if span.span_type == SpanType.TOOL}

    @cached_property
    def duration_s(self) -> float:
        """Seconds that the slowest run took."""
        return max(trace.info.execution_duration or 0 for trace in self._traces) / 1000


def why_not(rule: ScorerRule, facts: TraceFacts) -> Reason | None:
    """Return what of a rule keeps its scorer from a trace; ``None``: nothing does."""
    wanted = rule.filter
    if rule.agents is not None and facts.agent not in rule.agents:
        return "agent"
    if wanted.status is not None and facts.status != wanted.status:
        return "status"
    if wanted.tags and not facts.tags.issuperset(wanted.tags.items()):
        return "tag"
    if wanted.tools is not None and not any(_called(pattern, facts.tools) for pattern in wanted.tools):
        return "tool"
    if wanted.slower_than_s is not None and facts.duration_s < wanted.slower_than_s:
        return "latency"
    if wanted.faster_than_s is not None and facts.duration_s >= wanted.faster_than_s:
        return "latency"
    return None


def _called(pattern: str, tools: set[str]) -> bool:
    return any(fnmatchcase(tool, pattern) for tool in tools)
