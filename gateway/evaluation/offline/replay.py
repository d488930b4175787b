"""Tools that answer from a recording: for rows whose redaction makes the real calls impossible.

A row that was collected live holds ``<EMAIL:x7qa>`` where the user wrote an address; no tool can look that up. The
run's trace holds what the tools returned at the time, under arguments with the same placeholders. So the agent runs
anew, with its present instructions and model, and each call of a tool is answered by what the same call returned then.

Nothing is executed: a call that was not recorded is noted, and its row cannot be judged.
"""

import copy
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

from agents import Agent, custom_span
from agents.tool import FunctionTool
from mlflow.entities import Span as MlflowSpan
from mlflow.entities import SpanType
from mlflow.entities import Trace as MlflowTrace

from gateway.tracing.capture.content import arguments
from gateway.tracing.capture.recording import current_run, current_span
from gateway.tracing.spans import SpanError

current_replay: ContextVar["Replay | None"] = ContextVar("current_replay", default=None)
"""The recording that the run of this task is answered from."""

_NOT_RECORDED = "This call was not recorded; there is no result."
_ERROR = "ERROR"


class Retrieval(NamedTuple):
    """A retriever's span below a tool call: the scorers of retrieval read it."""

    name: str
    inputs: Any
    outputs: Any


class RecordedCall(NamedTuple):
    """One call of a tool, as the trace has it."""

    name: str
    arguments: Any
    outputs: Any
    """What the model was told; ``None`` if the call failed and that is not on the trace."""
    error: SpanError | None
    retrievals: tuple[Retrieval, ...] = ()


class Replay:
    """The recorded calls of one run, given out by name and arguments, equal ones in order. For one run only."""

    def __init__(self, calls: Sequence[RecordedCall]):
        self._calls: dict[tuple[str, str], list[RecordedCall]] = defaultdict(list)
        for call in calls:
            self._calls[_key(call.name, call.arguments)].append(call)
        self.missed: list[str] = []
        """Names of tools that were called in a way that was not recorded, in order."""

    def call(self, name: str, raw_arguments: str) -> Any:
        """Return what the call returned then; the last result again when it is asked more often than then."""
        recorded = self._calls.get(_key(name, arguments(raw_arguments)))
        if not recorded:
            self.missed.append(name)
            return _NOT_RECORDED
        found = recorded.pop(0) if len(recorded) > 1 else recorded[0]
        for each in found.retrievals:
            with custom_span(
                each.name, {"span_type": SpanType.RETRIEVER, "inputs": each.inputs, "outputs": each.outputs}
            ):
                pass
        if found.error is not None:
            _note_error(found.error)
            return f"Error: {found.error.message}" if found.outputs is None else found.outputs
        return found.outputs


def recorded_calls(trace: MlflowTrace) -> list[RecordedCall]:
    """Return the calls that the agent's own tools answered, in order; what ran within a tool is part of its call."""
    by_id = {span.span_id: span for span in trace.data.spans}
    calls = [span for span in trace.data.spans if _is_call(span) and not _is_within_call(span, by_id)]
    return [_recorded(span, trace.data.spans) for span in sorted(calls, key=lambda span: span.start_time_ns)]


def cannot_replay(agent: Agent[Any]) -> str | None:
    """Return why the agent's tools cannot be answered from a recording; ``None`` if they can."""
    for each in _reachable(agent):
        if isinstance(each, str):
            return each
    return None


def replayed(agent: Agent[Any]) -> Agent[Any]:
    """Return a copy of the agent, and of those it hands over to, whose tools answer from `current_replay`."""
    copies: dict[int, Agent[Any]] = {}

    def copied(one: Any) -> Agent[Any]:
        if id(one) not in copies:
            copies[id(one)] = twin = copy.copy(one)
            twin.tools = [_replayed_tool(tool) if isinstance(tool, FunctionTool) else tool for tool in one.tools]
            twin.handoffs = [copied(other) for other in one.handoffs]
        return copies[id(one)]

    return copied(agent)


def _reachable(agent: Agent[Any]) -> Sequence[Agent[Any] | str]:
    """Return the agents that can be reached from this one, and what stands in the way of replaying them."""
    found: list[Agent[Any] | str] = [agent]
    for each in found:
        if not isinstance(each, Agent):
            continue
        if each.mcp_servers:
            found.append(f"agent {each.name} has tools of MCP servers")
        found += [
            f"agent {each.name} has the tool {tool.name}, which is no function"
            for tool in each.tools
            if not isinstance(tool, FunctionTool)
        ]
        for other in each.handoffs:
            if not isinstance(other, Agent):
                found.append(f"agent {each.name} hands over by a Handoff object")
            elif all(other is not known for known in found):
                found.append(other)
    return found


def _replayed_tool(tool: FunctionTool) -> FunctionTool:
    async def invoke(_context: Any, raw_arguments: str) -> Any:
        replay = current_replay.get()
        if replay is None:
            raise RuntimeError("a tool that answers from a recording was called without one")
        return replay.call(tool.name, raw_arguments)

    twin = copy.copy(tool)
    twin.on_invoke_tool = invoke
    return twin


def _note_error(error: SpanError) -> None:
    run, span = current_run.get(), current_span()
    if run is not None and span is not None:
        run.tool_errors[span.span_id] = error


def _is_call(span: MlflowSpan) -> bool:
    return span.span_type == SpanType.TOOL and not span.attributes.get("gateway.hosted")


def _is_within_call(span: MlflowSpan, by_id: dict[str, MlflowSpan]) -> bool:
    above = by_id.get(span.parent_id)
    while above is not None:
        if _is_call(above):
            return True
        above = by_id.get(above.parent_id)
    return False


def _recorded(span: MlflowSpan, spans: Sequence[MlflowSpan]) -> RecordedCall:
    retrievals = tuple(
        Retrieval(each.name, each.inputs, each.outputs)
        for each in spans
        if each.parent_id == span.span_id and each.span_type == SpanType.RETRIEVER
    )
    return RecordedCall(span.name, span.inputs, span.outputs, _error(span), retrievals)


def _error(span: MlflowSpan) -> SpanError | None:
    if str(getattr(span.status.status_code, "value", span.status.status_code)) != _ERROR:
        return None
    reason: Mapping[str, Any] = next((event.attributes for event in span.events if event.name == "exception"), {})
    message = reason.get("exception.message") or span.status.description or "the call failed"
    return SpanError(str(reason.get("exception.type", "ToolError")), str(message))


def _key(name: str, given: Any) -> tuple[str, str]:
    return name, json.dumps(_plain(given), sort_keys=True, default=str)


def _plain(value: Any) -> Any:
    """Return arguments without what makes no difference: case, white space, 2 or 2.0, an option that is not given."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return " ".join(value.casefold().split())
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
