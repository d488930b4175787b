"""Reads the labelled conversations, strictly, and makes of each the traces that the gateway would have stored.

`load("support", "dev")` gives the conversations of a split; `traces(conversation)` its turns as MLflow traces, one
session, in order. What the labels mean is said in README.md, and so is who may look at which split.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import mlflow.entities
import msgspec

from gateway.evaluation.export import to_mlflow
from gateway.tracing.capture import CHAT_TOOLS
from gateway.tracing.capture.arguments import check_arguments
from gateway.tracing.spans import Span, SpanError, SpanKind, Trace

FOLDER = Path(__file__).parent
DOMAINS = ("support", "math", "travel")
SPLITS = ("dev", "held_out")

_TODAY = {"support": datetime(2026, 3, 16, 9, tzinfo=UTC), "travel": datetime(2026, 5, 11, 9, tzinfo=UTC)}
_ANY_DAY = datetime(2026, 4, 1, 9, tzinfo=UTC)
_MINUTE_NS = 60 * 10**9


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A misspelt, missing or additional key is an error."""


class TraceLabels(_Strict, frozen=True):
    """The faults of a turn; each is stated, true where the fault is there."""

    tool_error: bool
    invalid_arguments: bool
    redundant_calls: bool
    unused_result: bool
    contradicted_result: bool
    ungrounded_value: bool
    refusal: bool
    empty_answer: bool
    truncated_answer: bool


class ConversationLabels(_Strict, frozen=True):
    """The faults of a whole conversation."""

    user_repeats: bool
    user_rephrases: bool
    frustration: bool
    asked_twice: bool
    broken_promise: bool
    unresolved_error: bool
    no_progress: bool


TRACE_LABELS = TraceLabels.__struct_fields__
CONVERSATION_LABELS = ConversationLabels.__struct_fields__


class Call(_Strict, frozen=True):
    """One tool call: it has a result, or it failed."""

    name: str
    arguments: dict[str, Any] | str
    """A string: what the model wrote was no JSON."""
    result: Any = msgspec.UNSET
    error: str | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        """Refuse a call with both a result and an error, or with neither."""
        if (self.result is msgspec.UNSET) == (self.error is msgspec.UNSET):
            raise ValueError("a call has either a result or an error")

    @property
    def told(self) -> Any:
        """What the model was told, as the example agents tell it."""
        return self.result if self.error is msgspec.UNSET else f"Error: {self.error}"


class Step(_Strict, frozen=True):
    """One model call that asked for tools; several calls were made in parallel."""

    calls: list[Call]
    text: str | None = None
    """What the model said along with the calls."""


class Failure(_Strict, frozen=True):
    """Why a run was not answered."""

    type: str
    message: str


class Turn(_Strict, frozen=True):
    """What the user said, and what the assistant did and answered."""

    user: str
    steps: list[Step]
    answer: str | None
    """``None``: the run failed, `error` says why."""
    labels: TraceLabels
    near_misses: list[str]
    """Labels that are false, though a hasty rule would take them for true."""
    error: Failure | None = None

    def __post_init__(self) -> None:
        """Refuse a failed run with an answer, and near misses that are none."""
        if (self.answer is None) != (self.error is not None):
            raise ValueError("a turn has an answer, or an error that says why not")
        _check_near_misses(self.near_misses, msgspec.structs.asdict(self.labels))


class Conversation(_Strict, frozen=True):
    """One session, in order."""

    id: str
    turns: list[Turn]
    labels: ConversationLabels
    near_misses: list[str]
    tools: str
    """Name of the domain, whose tools.json defines the tools."""

    def __post_init__(self) -> None:
        """Refuse one without turns, and near misses that are none."""
        if not self.turns:
            raise ValueError("a conversation has at least one turn")
        _check_near_misses(self.near_misses, msgspec.structs.asdict(self.labels))

    @property
    def has_fault(self) -> bool:
        """Whether any label of the conversation or of one of its turns is true."""
        stated = [self.labels, *(turn.labels for turn in self.turns)]
        return any(any(msgspec.structs.asdict(labels).values()) for labels in stated)


def _check_near_misses(near_misses: list[str], labels: Mapping[str, bool]) -> None:
    if wrong := [name for name in near_misses if labels.get(name) is not False]:
        raise ValueError(f"near misses are labels that are false: {wrong}")


@cache
def load(domain: str, split: str) -> tuple[Conversation, ...]:
    """Return the conversations of a domain's split.

    Raises:
        msgspec.ValidationError: a line is not in the format.
    """
    lines = (FOLDER / domain / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(msgspec.json.decode(line, type=Conversation) for line in lines)


@cache
def tools(domain: str) -> tuple[dict[str, Any], ...]:
    """Return the definitions of a domain's tools, in the form of Chat Completions."""
    return tuple(json.loads((FOLDER / domain / "tools.json").read_text(encoding="utf-8")))


@cache
def instructions(domain: str) -> str:
    """Return the system message of a domain's assistant; it says which day it is, where that matters."""
    return (FOLDER / domain / "instructions.txt").read_text(encoding="utf-8").strip()


def traces(conversation: Conversation, *, noted: bool = True) -> list[mlflow.entities.Trace]:
    """Return one trace a turn, a minute apart, in one session, each as the gateway exports it.

    Each model call's messages hold the conversation so far, tool results included, as they do live.

    Args:
        conversation: of a split, or one that a test made.
        noted: whether the tool spans say if their arguments fit the schema, which the gateway notes before it
            redacts; without it they are as traces that came from elsewhere.
    """
    domain, messages = conversation.tools, [{"role": "system", "content": instructions(conversation.tools)}]
    first_ns = int(_TODAY.get(domain, _ANY_DAY).timestamp()) * 10**9
    recorded = []
    for index, turn in enumerate(conversation.turns):
        builder = _Turn(conversation, turn, first_ns + index * _MINUTE_NS, messages, noted=noted)
        recorded.append(to_mlflow(builder.trace(index), "0", {}))
    return recorded


def _message(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


class _Turn:
    """Collects the spans of one turn, a millisecond apart, and adds what was said to the conversation's messages."""

    def __init__(
        self, conversation: Conversation, turn: Turn, started_ns: int, messages: list[Any], *, noted: bool
    ) -> None:
        self._conversation, self._turn, self._started_ns = conversation, turn, started_ns
        self._messages, self._noted = messages, noted
        self._spans: list[Span] = []
        self._definitions = [dict(each) for each in tools(conversation.tools)]

    def trace(self, index: int) -> Trace:
        """Return the turn as the web process captures it; `index` counts from 0."""
        turn, said = self._turn, _message("user", self._turn.user)
        answered = None if turn.answer is None else {"messages": [_message("assistant", turn.answer)]}
        failure = SpanError(turn.error.type, turn.error.message) if turn.error else None
        self._add(None, self._conversation.tools, "AGENT", {"messages": [said]}, answered, error=failure)
        self._messages.append(said)
        for number, step in enumerate(turn.steps):
            self._add_step(step, f"{index}_{number}")
        if turn.answer is not None:
            self._ask(_message("assistant", turn.answer))
        return Trace(
            trace_id=f"tr-{hashlib.blake2b(f'{self._conversation.id}/{index}'.encode(), digest_size=16).hexdigest()}",
            agent=self._conversation.tools,
            agent_version="labelled",
            session_id=self._conversation.id,
            user_id=None,
            offline=False,
            started_ns=self._started_ns,
            ended_ns=self._spans[0].end_ns,
            spans=self._spans,
            error=failure,
        )

    def _add_step(self, step: Step, number: str) -> None:
        calls = [(f"call_{number}_{place}", call) for place, call in enumerate(step.calls)]
        self._ask(_message("assistant", step.text, tool_calls=[_request(*each) for each in calls]))
        for call_id, call in calls:
            self._call(call)
            told = call.told if isinstance(call.told, str) else str(call.told)
            self._messages.append(_message("tool", told, tool_call_id=call_id))

    def _ask(self, answer: dict[str, Any]) -> None:
        asked, answered = {"messages": list(self._messages)}, {"choices": [{"index": 0, "message": answer}]}
        self._add("root", "scripted", "CHAT_MODEL", asked, answered, attributes={CHAT_TOOLS: self._definitions})
        self._messages.append(answer)

    def _call(self, call: Call) -> None:
        error = None if call.error is msgspec.UNSET else SpanError("ToolError", call.error)
        schemas = (each["function"] for each in self._definitions if each["function"]["name"] == call.name)
        schema = next(schemas)["parameters"]
        noted = check_arguments(call.arguments, schema) if self._noted else {}
        span = self._add("root", call.name, "TOOL", call.arguments, call.told, error=error, attributes=noted)
        if documents := list(_documents(call.told)):
            self._add(span.span_id, f"{call.name}_documents", "RETRIEVER", call.arguments, documents)

    def _add(
        self, parent: str | None, name: str, kind: SpanKind, inputs: Any, outputs: Any, *,
        error: SpanError | None = None, attributes: Mapping[str, Any] | None = None,
    ) -> Span:  # fmt: skip
        at_ns = self._started_ns + len(self._spans) * 10**6
        parent_id = self._spans[0].span_id if parent == "root" else parent
        span_id = f"{len(self._spans) + 1:016x}"
        span = Span(
            span_id, parent_id, name, kind, at_ns, at_ns + 10**6, inputs, outputs, dict(attributes or {}), error
        )
        self._spans.append(span)
        self._spans[0].end_ns = span.end_ns
        return span


def _request(call_id: str, call: Call) -> dict[str, Any]:
    written = call.arguments if isinstance(call.arguments, str) else json.dumps(call.arguments, ensure_ascii=False)
    return {"id": call_id, "type": "function", "function": {"name": call.name, "arguments": written}}


def _documents(result: Any) -> Iterator[dict[str, Any]]:
    """Yield the documents of a search: live, these are on a span of their own too."""
    for each in result if isinstance(result, list) else ():
        if isinstance(each, dict) and "page_content" in each:
            yield each
