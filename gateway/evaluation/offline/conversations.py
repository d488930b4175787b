"""Scorers of conversations, offline: on the history that a row holds, and the new answer.

`mlflow.genai.evaluate` runs them on stored sessions only, not with an agent that answers anew. A row of a conversation
holds its earlier turns as messages, so each of them becomes a turn's trace again, in memory; the last one is the trace
of the run. The scores are logged on that one.
"""

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from mlflow.entities import Trace as MlflowTrace

from gateway.evaluation.export import to_mlflow
from gateway.tracing.messages import text_of
from gateway.tracing.spans import Span, Trace

Message = dict[str, Any]

_TURN_NS = 1_000_000_000


def conversation(history: Sequence[Message], last: MlflowTrace, agent: str, session_id: str) -> list[MlflowTrace]:
    """Return the traces of a conversation, the first turn first.

    Args:
        history: all messages that the run was asked, redacted; those behind the agent's last word are its own turn.
        last: the trace of the run.
        agent: name of the agent.
        session_id: of all turns.
    """
    turns = [turn for turn in _turns(history) if any(each.get("role") == "assistant" for each in turn)]
    begin_ns = last.info.request_time * 1_000_000 - len(turns) * _TURN_NS
    experiment_id = str(last.info.experiment_id)
    earlier = [
        to_mlflow(_trace(turn, agent, session_id, begin_ns + number * _TURN_NS), experiment_id, {})
        for number, turn in enumerate(turns)
    ]
    return [*earlier, last]


def _turns(history: Sequence[Message]) -> Iterator[list[Message]]:
    """Yield the messages turn by turn: each begins with what the user says after the agent's answer."""
    turn: list[Message] = []
    for message in history:
        if message.get("role") == "user" and turn and turn[-1].get("role") in {"assistant", "tool"}:
            yield turn
            turn = []
        turn.append(message)
    if turn:
        yield turn


def _trace(turn: Sequence[Message], agent: str, session_id: str, begin_ns: int) -> Trace:
    answers = [each for each in turn if each.get("role") == "assistant" and each.get("content")]
    trace = Trace(
        trace_id=f"tr-{uuid.uuid4().hex}",
        agent=agent,
        agent_version="",
        session_id=session_id,
        user_id=None,
        offline=False,
        started_ns=begin_ns,
        ended_ns=begin_ns + _TURN_NS // 2,
    )
    asked = [each for each in turn if each.get("role") not in {"assistant", "tool"}]
    outputs = {"messages": [{"role": "assistant", "content": text_of(answers[-1]["content"])}]} if answers else None
    root = Span(_id(), None, agent, "AGENT", begin_ns, trace.ended_ns, {"messages": asked}, outputs)
    trace.spans = [root, *_calls(turn, root.span_id, begin_ns)]
    return trace


def _calls(turn: Sequence[Message], root_id: str, begin_ns: int) -> Iterator[Span]:
    results = {each.get("tool_call_id"): text_of(each.get("content")) for each in turn if each.get("role") == "tool"}
    requests = [call for each in turn for call in each.get("tool_calls") or ()]
    for number, call in enumerate(requests, start=1):
        at_ns, function = begin_ns + number, call.get("function") or {}
        result = results.get(call.get("id"))
        name, given = str(function.get("name")), _parsed(function.get("arguments"))
        yield Span(_id(), root_id, name, "TOOL", at_ns, at_ns + 1, given, _parsed(result))


def _parsed(text: Any) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        return text


def _id() -> str:
    return uuid.uuid4().hex[:16]
