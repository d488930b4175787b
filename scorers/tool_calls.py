"""How well one turn used its tools. Each scorer passes with True and is not applicable (None) without a tool call."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from jsonschema import Draft202012Validator, ValidationError
from mlflow.entities import Feedback, Span, SpanType, Trace
from mlflow.genai.scorers import scorer
from referencing import Registry
from referencing.exceptions import Unresolvable

from ._trace import (
    PLACEHOLDER,
    STOPWORDS,
    Amount,
    Values,
    assistant_text,
    has_failed,
    read_values,
    spans_of,
    stem,
    tool_calls,
    tool_rounds,
    user_texts,
    words,
)


@scorer
def no_tool_errors(trace: Trace) -> Feedback | None:
    """Pass if every tool call ended without an error."""
    calls = tool_calls(trace)
    if not calls:
        return None
    failed = [call for call in calls if has_failed(call)]
    if failed:
        reasons = "; ".join(f"{call.name}: {_error_message(call)}" for call in failed)
        return Feedback(value=False, rationale=f"{len(failed)} of {len(calls)} tool calls failed: {reasons}")
    return Feedback(value=True, rationale=f"All {len(calls)} tool calls succeeded.")


def _error_message(span: Span) -> str:
    exceptions = [event.attributes.get("exception.message") for event in span.events if event.name == "exception"]
    return str(next((message for message in exceptions if message), span.status.description or "no message"))


# --- arguments ---


@scorer
def valid_tool_arguments(trace: Trace) -> Feedback | None:
    """Pass if each call's arguments fit the JSON Schema that the model was given, and the model made up no tool.

    Not counted: a tool whose definition is not in the trace (a hosted one, say). The gateway has checked the arguments
    before redaction; in traces of other origin a value that redaction replaced is not counted either.
    """
    definitions = {tool["name"]: tool.get("parameters") for tool in _offered_tools(trace)}
    checked = [call for call in tool_calls(trace) if _was_checked(call) or isinstance(definitions.get(call.name), dict)]
    made_up = _made_up_tools(trace)
    if not checked and not made_up:
        return None
    problems = [f"{name}: no such tool" for name in made_up]
    for call in checked:
        found = _noted_problems(call) if _was_checked(call) else _argument_problems(call.inputs, definitions[call.name])
        problems += [f"{call.name}: {problem}" for problem in found]
    if problems:
        return Feedback(value=False, rationale="; ".join(problems))
    return Feedback(value=True, rationale=f"The arguments of {len(checked)} tool calls fit their schemas.")


def _functions(span: Span) -> list[dict[str, Any]]:
    tools = span.get_attribute("mlflow.chat.tools") or []
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    return [function for function in functions if isinstance(function, dict) and function.get("name")]


def _offered_tools(trace: Trace) -> list[dict[str, Any]]:
    return [function for span in spans_of(trace, SpanType.CHAT_MODEL) for function in _functions(span)]


def _made_up_tools(trace: Trace) -> list[str]:
    """Return the names that the model called although the tools it was offered have no such name."""
    made_up = []
    for span in spans_of(trace, SpanType.CHAT_MODEL):
        offered = {function["name"] for function in _functions(span)}
        called = {call.get("function", {}).get("name") for call in _requested_calls(span.outputs)}
        # A handoff is called like a tool without being one.
        made_up += [name for name in called - offered if offered and name and not name.startswith("transfer_to_")]
    # One that ran all the same was known to the agent, though not from these definitions.
    ran = {call.name for call in tool_calls(trace)}
    return sorted(set(made_up) - ran)


def _requested_calls(outputs: Any) -> list[dict[str, Any]]:
    choices = outputs.get("choices") if isinstance(outputs, dict) else None
    messages = [choice.get("message") or {} for choice in choices or [] if isinstance(choice, dict)]
    return [call for message in messages for call in message.get("tool_calls") or [] if isinstance(call, dict)]


def _was_checked(call: Span) -> bool:
    return isinstance(call.get_attribute("gateway.arguments_valid"), bool)


def _noted_problems(call: Span) -> list[str]:
    if call.get_attribute("gateway.arguments_valid"):
        return []
    return [str(call.get_attribute("gateway.arguments_error") or "the arguments do not fit its schema")]


def _argument_problems(arguments: Any, schema: dict[str, Any]) -> list[str]:
    if isinstance(arguments, str):
        return ["arguments are not valid JSON"]
    # An empty registry: a `$ref` found in a trace must not make the evaluator fetch an address.
    validator = Draft202012Validator(schema, registry=Registry())
    try:
        errors = [error for error in validator.iter_errors({} if arguments is None else arguments) if _counts(error)]
    except (Unresolvable, re.error, TypeError, ValueError):
        return []  # the schema is broken, which the model cannot help
    return [f"{error.json_path}: {error.message}" for error in errors]


def _counts(error: ValidationError) -> bool:
    """Return whether the model is to blame; for a value that redaction made a placeholder it is not."""
    if isinstance(error.instance, str) and PLACEHOLDER.search(error.instance):
        return False
    branches: dict[Any, list[ValidationError]] = {}
    for inner in error.context or []:
        branches.setdefault(inner.schema_path[0], []).append(inner)
    # anyOf: one branch that fits but for placeholders is enough.
    return all(any(_counts(inner) for inner in branch) for branch in branches.values())


# --- repeated calls ---


@scorer
def no_redundant_calls(trace: Trace) -> Feedback | None:
    """Pass if no tool was called twice with the same arguments and the same result.

    A retry after an error is not redundant, nor is asking again for something that has changed.
    """
    calls = tool_calls(trace)
    if not calls:
        return None
    seen: set[str] = set()
    repeated = []
    for call in calls:
        if has_failed(call):
            continue
        key = json.dumps([call.name, call.inputs, call.outputs], sort_keys=True, default=str)
        if key in seen:
            repeated.append(f"{call.name}({json.dumps(call.inputs, sort_keys=True, default=str)})")
        seen.add(key)
    if repeated:
        return Feedback(value=False, rationale=f"Called again for the same result: {'; '.join(repeated)}")
    return Feedback(value=True, rationale=f"None of {len(calls)} tool calls repeats another.")


# --- the answer and the results ---

# Results that only say that it worked, or did not.
_ACKNOWLEDGEMENTS = frozenset(
    {"done", "error", "false", "no", "none", "not", "null", "ok", "result", "sent", "success"}
)
_ACKNOWLEDGEMENTS |= {"successful", "successfully", "true", "yes", "found"}
_UNDISTINCTIVE = STOPWORDS | _ACKNOWLEDGEMENTS
# What stands under such a key is for machines; a good answer may well leave it out.
_FOR_MACHINES = re.compile(
    r"(?:^|_)(?:id|ids|uuid|guid|token|hash|etag|cursor|url|uri|link|version|timestamp|(?:created|updated)(?:_at)?)$"
)
_RELATIVE_DAY = re.compile(
    r"\b(?:today|tonight|tomorrow|yesterday|(?:in|within) [\w-]+ (?:days?|weeks?))\b", re.IGNORECASE
)
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
# A longer text is prose: an answer may use a part of it, so none of its values has to show.
_PROSE_WORDS = 12


@scorer
def answer_uses_tool_result(trace: Trace) -> Feedback | None:
    """Pass if the final answer states something that the last successful tool calls returned.

    Sees: numbers (36.0 as 36, $1,200.00, 42 %, rounded, or spelled out up to twelve), dates and times in the usual
    forms, codes, addresses, redaction placeholders, names, and for texts the share of their words in the answer. What
    the user or the arguments had already said proves nothing and is left out. Of a list or object, one value is enough.

    Cannot see: whether the answer is right as a whole, only that it drew on the result; values computed from the result
    (a sum, another unit or time zone); a paraphrase of a word ("on its way" for "shipped"); words in another language
    than the result's. Where the result leaves nothing to look for (true, "ok", an internal id, a status word that does
    not show), it is not applicable rather than failed.
    """
    answer = assistant_text(trace)
    rounds = [[call for call in calls if not has_failed(call)] for calls in tool_rounds(trace)]
    rounds = [calls for calls in rounds if calls]
    if not answer or not rounds:
        return None
    said = [*user_texts(trace), *(text for calls in rounds for call in calls for _, text in _leaves(call.inputs))]
    given = _Evidence.of([("", text) for text in said])
    for steps_back, calls in enumerate(reversed(rounds)):
        evidence = _Evidence.of([leaf for call in calls for leaf in _leaves(call.outputs)])
        shown = _shown(evidence, given, answer)
        names = ", ".join(call.name for call in calls)
        if shown:
            return Feedback(value=True, rationale=f"The answer states what {names} returned: {shown}.")
        # Only the last round has to show: those before it may have been steps on the way.
        if shown is False and steps_back == 0:
            return Feedback(value=False, rationale=f"Nothing of what {names} returned shows in the answer.")
    return None


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each value within a result as (the key it stands under, its text)."""
    if isinstance(value, str) and value.lstrip()[:1] in {"{", "["}:
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, dict):
        items = {"page_content": value["page_content"]} if "page_content" in value else value
        for name, inner in items.items():
            yield from _leaves(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner, key)
    elif value is not None and not isinstance(value, bool):
        yield key, str(value)


@dataclass
class _Evidence:
    """What a result states. `facts` has to show, at least one of it; `hints` and `words` prove use where they show."""

    facts: Values = field(default_factory=Values)
    hints: Values = field(default_factory=Values)
    names: set[str] = field(default_factory=set)
    words: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, leaves: list[tuple[str, str]]) -> "_Evidence":
        evidence = cls()
        for key, text in leaves:
            is_prose = len(text.split()) > _PROSE_WORDS
            is_hint = is_prose or _FOR_MACHINES.search(key.lower())
            _extend(evidence.hints if is_hint else evidence.facts, read_values(text))
            evidence.names |= set() if is_prose else _names(text)
            evidence.words |= words(text, _UNDISTINCTIVE)
        return evidence


def _extend(values: Values, more: Values) -> None:
    values.codes |= more.codes
    values.dates |= more.dates
    values.times |= more.times
    values.amounts += more.amounts


def _names(text: str) -> set[str]:
    """Return the stems of the capitalised words of a short value; "Delivered" and "Pending" are states, not names."""
    found = re.findall(r"(?<![\w<])[^\W\d_a-z][a-z\u00df-\u024f]{2,}(?![\w:])", text)
    is_name = len(found) == len(re.findall(r"[^\W\d_]+", text))
    kept = found if is_name else [word for word in found if not text.lstrip().startswith(word)]
    return {stem(w.lower()) for w in kept if w.lower() not in _UNDISTINCTIVE and not w.endswith(("ed", "ing"))}


def _shown(evidence: _Evidence, given: _Evidence, answer: str) -> str | bool | None:
    """Return what of the evidence shows in the answer, False if nothing does, None if that cannot be told."""
    stated, answer_words = read_values(answer), words(answer, _UNDISTINCTIVE)
    known = [given.facts, given.hints]
    facts, hints = _new(evidence.facts, known), _new(evidence.hints, known)
    new_words = evidence.words - given.words
    names = evidence.names & new_words
    common = _common(facts, stated, answer) or _common(hints, stated, answer) or ", ".join(sorted(names & answer_words))
    if common:
        return common
    # Nought is more often said in words: nothing, free, none left.
    numbers = [amount for amount in facts.amounts if amount.value]
    # A number of its own, where the result has another one, is a contradiction that shared words do not mend.
    if numbers and _new(stated, known).amounts:
        return False
    matched = new_words & answer_words
    if len(matched) >= max(1, min(4, round(0.15 * len(new_words)))) and matched:
        return ", ".join(sorted(matched))
    has_facts = facts.codes or facts.dates or facts.times or numbers or names
    return False if has_facts or len(new_words) > _PROSE_WORDS // 2 else None


def _new(values: Values, known: list[Values]) -> Values:
    """Return `values` without those that are in `known`."""
    amounts = {amount.value for other in known for amount in other.amounts}
    return Values(
        codes=values.codes.difference(*(other.codes for other in known)),
        dates=values.dates.difference(*(other.dates for other in known)),
        times=values.times.difference(*(other.times for other in known)),
        amounts=[amount for amount in values.amounts if amount.value not in amounts],
    )


def _common(wanted: Values, stated: Values, answer: str) -> str | None:
    """Return one value of `wanted` that the answer states, in whatever form."""
    if codes := wanted.codes & stated.codes:
        return min(codes)
    if times := wanted.times & stated.times:
        return min(times)
    for year, month, day in sorted(wanted.dates):
        if any((month, day) == other[1:] for other in stated.dates) or _names_the_day(answer, year, month, day):
            return f"{year}-{month:02}-{day:02}" if year else f"{month:02}-{day:02}"
    matches = (exact for exact in dict.fromkeys(wanted.amounts) if _is_stated(exact, stated.amounts))
    return next((f"{exact.value:g}" for exact in matches), None)


def _is_stated(exact: Amount, stated: list[Amount]) -> bool:
    return any(amount.agrees_with(exact) for amount in stated)


def _names_the_day(answer: str, year: int, month: int, day: int) -> bool:
    """Return whether the answer gives the date as a weekday or relative to today, which is taken on trust."""
    if _RELATIVE_DAY.search(answer):
        return True
    try:
        return bool(year) and _WEEKDAYS[date(year, month, day).weekday()] in answer.lower()
    except ValueError:
        return False
