"""What a scorer may say: a value that can be stored, and from a judge one of those that it was asked for."""

import json
from collections.abc import Sequence
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from mlflow.genai.judges.base import Judge
from mlflow.genai.judges.instructions_judge import InstructionsJudge
from mlflow.genai.scorers.base import Scorer
from mlflow.genai.scorers.builtin_scorers import BuiltInScorer
from pydantic import TypeAdapter, ValidationError

_SHOWN_CHARACTERS = 100
_PASSING = frozenset({"yes", "true", "pass", "none", "resolved"})
_FAILING = frozenset({"no", "false", "fail", "unresolved"})
"""Categories of MLflow's built-in judges: yes/no, and ``UserFrustration``'s none/resolved/unresolved."""


class Nonsense(Exception):
    """A scorer said something that cannot be stored, or a judge something that it was not asked for."""


def declared_type(scorer: Scorer) -> Any:
    """Return the type of the values that a judge of MLflow's is asked for; ``None`` where there is none."""
    if isinstance(scorer, Judge) and isinstance(scorer, BuiltInScorer | InstructionsJudge):
        return scorer.feedback_value_type
    return None


def as_declared(value: Any, declared: Any) -> Any:
    """Return what a judge said as one of the values that it was asked for.

    Models give "Yes" for "yes" and 4 for "4"; MLflow passes on whatever they give.

    Raises:
        Nonsense: it is none of them.
    """
    try:
        return TypeAdapter(declared).validate_python(value)
    except ValidationError:
        options: Sequence[Any] = get_args(declared) if get_origin(declared) is Literal else ()
    for option in options:
        if str(option).lower() == str(value).strip().lower():
            return option
    if declared is str and isinstance(value, int | float):
        return str(value)
    asked = ", ".join(map(repr, options)) or getattr(declared, "__name__", str(declared))
    raise Nonsense(f"the judge said {value!r:.{_SHOWN_CHARACTERS}}, but was asked for {asked}")


def meaning(value: Any) -> bool | None:
    """Return whether a value says of itself that it is good: booleans do, and the words of MLflow's judges."""
    if isinstance(value, str):
        word = value.strip().lower()
        return True if word in _PASSING else False if word in _FAILING else None
    return value if isinstance(value, bool) else None


def storable(value: Any) -> Any:
    """Return the value as JSON holds it.

    Raises:
        Nonsense: it is no JSON, as NaN and objects are not.
    """
    value = value.value if isinstance(value, Enum) else value
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise Nonsense(f"{value!r:.{_SHOWN_CHARACTERS}} cannot be stored: {error}") from None
    return value


def storable_text(text: str | None) -> str | None:
    """Return a text as Postgres can store it."""
    return text.replace("\0", "\ufffd") if text else text


def message_of(error: BaseException) -> str:
    """Return what an error says; nothing if it fails at that, since it is anybody's code too."""
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - as above
        return ""
