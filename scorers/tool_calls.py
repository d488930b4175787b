"""How one turn used its tools. Each scorer passes with True and is not applicable (None) without a tool call."""

import json
import re
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from mlflow.entities import Feedback, Span, SpanType, Trace
from mlflow.genai.scorers import scorer
from referencing import Registry
from referencing.exceptions import Unresolvable

from ._claims import acts, denies
from ._trace import FOR_MACHINES, failure_of, functions_of, may_pass, offered_tools, spans_of, tool_calls
from ._words import PLACEHOLDER


@scorer
def no_tool_errors(trace: Trace) -> Feedback | None:
    """Pass if every tool call worked.

    An error is a call that raised, or whose result has the form of one: `{"error": ...}`, `isError`, a text that begins
    with "Error:" or "ValueError:".

    Cannot see: a tool that reports its failure as an ordinary result ("nothing found", `{"ok": false}`).

    Of labelled turns that no rule was written by, 30 with the fault and 427 without: 0 missed, 0 false alarms.
    """
    calls = tool_calls(trace)
    if not calls:
        return None
    failed = [(call.name, reason) for call in calls if (reason := failure_of(call)) is not None]
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed)
        return Feedback(value=False, rationale=f"{len(failed)} of {len(calls)} tool calls failed: {reasons}")
    return Feedback(value=True, rationale=f"All {len(calls)} tool calls succeeded.")


# --- arguments ---


# Formats that are beyond dispute; others are checked differently from one library to the next.
_FORMATS = FormatChecker(["date", "email", "uuid"])


@scorer
def valid_tool_arguments(trace: Trace) -> Feedback | None:
    """Pass if each call's arguments fit the JSON Schema that the model was given, and the model made up no tool.

    Not counted: a tool whose definition is not in the trace (a hosted one, say). The gateway has checked the arguments
    before redaction; in traces of other origin a value that redaction replaced is not counted either.

    Of labelled turns that no rule was written by, 13 with the fault and 444 without: 0 missed, 0 false alarms.
    """
    definitions = {name: tool.get("parameters") for name, tool in offered_tools(trace).items()}
    checked = [call for call in tool_calls(trace) if _was_checked(call) or isinstance(definitions.get(call.name), dict)]
    made_up = _made_up_tools(trace)
    if not checked and not made_up:
        return None
    problems = [f"{name}: no such tool" for name in made_up]
    for call in checked:
        found = (
            _noted_problems(call)
            if _was_checked(call)
            else _argument_problems(call.inputs, definitions[call.name] or {})
        )
        problems += [f"{call.name}: {problem}" for problem in found]
    if problems:
        return Feedback(value=False, rationale="; ".join(problems))
    return Feedback(value=True, rationale=f"The arguments of {len(checked)} tool calls fit their schemas.")


def _made_up_tools(trace: Trace) -> list[str]:
    """Return the names that the model called although the tools it was offered have no such name."""
    made_up = []
    for span in spans_of(trace, SpanType.CHAT_MODEL):
        offered = {function["name"] for function in functions_of(span)}
        called = {_called_name(call) for call in _requested_calls(span.outputs)}
        # A handoff is called like a tool without being one.
        made_up += [name for name in called - offered if offered and name and not name.startswith("transfer_to_")]
    # One that ran all the same was known to the agent, though not from these definitions.
    ran = {call.name for call in tool_calls(trace)}
    return sorted(set(made_up) - ran)


def _requested_calls(outputs: Any) -> list[dict[str, Any]]:
    choices = outputs.get("choices") if isinstance(outputs, dict) else None
    messages = (
        [choice.get("message") for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    )
    requested = [message.get("tool_calls") for message in messages if isinstance(message, dict)]
    return [call for calls in requested if isinstance(calls, list) for call in calls if isinstance(call, dict)]


def _called_name(call: dict[str, Any]) -> str | None:
    function = call.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


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
    validator = Draft202012Validator(schema, registry=Registry(), format_checker=_FORMATS)
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
    """Pass if no call is made again for nothing.

    A call is, if one before it had the same arguments and the same result, spelling, order and ids that the tool made
    up aside; if the same thing was made, sent or paid twice; and if it fails again in a way that trying again cannot
    mend, or, where it might (a timeout, say), for the third time. Asking again for something that has changed is fine.

    Cannot see: the same question in other arguments ("shipping cost", then "cost of shipping"), a call that nobody
    needed, what an earlier turn had already found.

    Of labelled turns that no rule was written by, 10 with the fault and 447 without: 0 missed, 0 false alarms.
    """
    calls = tool_calls(trace)
    if not calls:
        return None
    results: dict[str, set[str]] = {}
    failures: dict[str, int] = {}
    repeated = []
    for call in calls:
        reason = failure_of(call)
        asked = json.dumps([call.name, _normal(call.inputs)], sort_keys=True, default=str)
        if reason is not None:
            failures[asked + reason] = failures.get(asked + reason, 0) + 1
            is_repeated = failures[asked + reason] > (2 if may_pass(reason) else 1)
        else:
            result = json.dumps(_normal(call.outputs, without_ids=True), sort_keys=True, default=str)
            before = results.setdefault(asked, set())
            is_repeated = result in before or (bool(before) and acts(call.name) and not denies(call.outputs, ""))
            before.add(result)
        if is_repeated:
            repeated.append(f"{call.name}({json.dumps(call.inputs, sort_keys=True, default=str)})")
    if repeated:
        return Feedback(value=False, rationale=f"Called again for nothing: {'; '.join(repeated)}")
    return Feedback(value=True, rationale=f"None of {len(calls)} tool calls repeats another.")


def _normal(value: Any, *, without_ids: bool = False) -> Any:
    """Return the value without what differs by chance: upper case and spaces, 1 and 1.0; ids and times if asked."""
    if isinstance(value, dict):
        normal = {str(key): _normal(inner, without_ids=without_ids) for key, inner in value.items()}
        kept = {key: inner for key, inner in normal.items() if not (without_ids and FOR_MACHINES.search(key.lower()))}
        return kept or normal  # what has nothing but an id is told apart by it
    if isinstance(value, list):
        return [_normal(inner, without_ids=without_ids) for inner in value]
    if isinstance(value, str):
        return " ".join(value.lower().split())
    return float(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53 else value
