"""Plays the model for the math agent: turns a question into tool calls by rewriting it as a formula.

"What is 15% of 240?" becomes `15 % 240`, with `%` standing for "per cent of"; Python's own parser then gives the
order of the operations, and each operation becomes one tool call.
"""

import ast
import math
import re
from collections.abc import Callable
from typing import NamedTuple

from gateway.runs.offline import Call, OfflineModel, View

MAX_QUESTION_CHARACTERS = 300
"""Longer than any sum typed by hand, short enough that no pattern and no nest of brackets takes long."""

HELP = "I can add, subtract, multiply, divide and work out percentages. Try: What is 15% of 240?"

_NUMBER = r"(-?\d+(?:\.\d+)?)"
_FORMULA = re.compile(r"[\d.\s+*/%()-]+")

_TRADE = re.compile(
    rf"bought {_NUMBER} .*?(?:at|for) {_NUMBER} (?:each|apiece|a share).*?worth {_NUMBER}.*?\b(?:profit|gain)"
)

_NOISE = re.compile(
    r"^(?:(?:and|then|now|so|ok|okay|please|sorry|hi|hello|actually|i meant?|what is|what's|what are|whats|what about|"
    r"how much is|how many is|calculate|compute|work out|tell me|can you|could you|equals|the)\b\s*)+|\bplease\b"
)

# Each phrase on the left is written as the formula on the right; the order matters, longer phrases first.
_PHRASES: list[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), formula)
    for pattern, formula in [
        (rf"{_NUMBER} ?(?:%|percent|per cent) off {_NUMBER}", r"(\2 - \1 % \2)"),
        (rf"{_NUMBER} ?(?:%|percent|per cent) of ", r"\1 % "),
        (rf"add {_NUMBER} (?:to|and) {_NUMBER}", r"(\2 + \1)"),
        (rf"subtract {_NUMBER} from {_NUMBER}", r"(\2 - \1)"),
        (rf"multiply {_NUMBER} (?:by|with|and) {_NUMBER}", r"(\1 * \2)"),
        (rf"divide {_NUMBER} by {_NUMBER}", r"(\1 / \2)"),
        (rf"(?:the )?sum of {_NUMBER} and {_NUMBER}", r"(\1 + \2)"),
        (rf"(?:the )?difference (?:between|of) {_NUMBER} and {_NUMBER}", r"(\1 - \2)"),
        (rf"(?:the )?product of {_NUMBER} and {_NUMBER}", r"(\1 * \2)"),
        (rf"(?:double|twice) {_NUMBER}", r"(\1 * 2)"),
        (rf"triple {_NUMBER}", r"(\1 * 3)"),
        (rf"(?:halve|half of|half) {_NUMBER}", r"(\1 / 2)"),
        (r"^(?:multiply|multiplied|times)(?: by)?\b", "* "),
        (r"^divide(?:d)?(?: by)?\b", "/ "),
        (r"^add\b", "+ "),
        (r"^subtract\b", "- "),
        (r"\bplus\b", " + "),
        (r"\bminus\b", " - "),
        (r"\bmultiplied by\b|\btimes\b|\u00d7|(?<=\d) ?x ?(?=\d)", " * "),
        (r"\bdivided by\b|\bover\b|\u00f7", " / "),
    ]
]

_TOOLS: dict[type[ast.operator], Callable[[float, float], Call]] = {
    ast.Add: lambda a, b: Call("add", a=a, b=b),
    ast.Sub: lambda a, b: Call("subtract", a=a, b=b),
    ast.Mult: lambda a, b: Call("multiply", a=a, b=b),
    ast.Div: lambda a, b: Call("divide", a=a, b=b),
    ast.Mod: lambda percent, value: Call("percentage", value=value, percent=percent),
}


class _Result(NamedTuple):
    """Stands for the result of an earlier operation of the plan; `place` counts from 0."""

    place: int


class _Operation(NamedTuple):
    operator: type[ast.operator]
    left: "float | _Result"
    right: "float | _Result"


def decide(view: View) -> str | Call:
    """Call the tool for the next operation of the question, or say the result when none is left."""
    results = view.tool_results_this_turn
    if results and not _is_number(results[-1].output):  # it failed, or was never carried out
        reason = results[-1].output.removeprefix("Error: ").rstrip(".")
        return f"I'm sorry, I can't work that out: {reason}."
    formula = _formula(view.last_user, _previous_answer(view))
    plan = _plan(formula) if formula else []
    if not plan:
        return _small_talk(view.last_user)
    if len(results) == len(plan):
        return _plain(float(results[-1].output))
    known = [float(result.output) for result in results]
    operation = plan[len(results)]
    left, right = (_number(known[side.place] if isinstance(side, _Result) else side) for side in operation[1:])
    return _TOOLS[operation.operator](left, right)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _previous_answer(view: View) -> str | None:
    answers = (text.strip() for text in reversed(view.assistant_texts))
    return next((answer for answer in answers if re.fullmatch(_NUMBER, answer)), None)


def _formula(question: str, previous: str | None) -> str | None:
    """Write the question as a formula; None when it is not about arithmetic."""
    if len(question) > MAX_QUESTION_CHARACTERS:
        return None
    text = re.sub(r"(?<=\d),(?=\d{3}\b)|[$€£]", "", question.lower())
    if trade := _TRADE.search(text):
        count, bought_at, worth = trade.groups()
        return f"({worth} - {bought_at}) * {count}"
    text = re.sub(r"[?!=:;,]|\.(?!\d)", " ", text)
    text = _NOISE.sub("", " ".join(text.split())).strip()
    if previous is not None:
        text = re.sub(r"\b(?:that|it|this|the (?:result|answer))\b", previous, text)
    for phrase, formula in _PHRASES:
        text = phrase.sub(formula, text)
    text = text.strip()
    # "times 3" goes on from the last answer; "-5 + 3" starts with a negative number instead.
    if previous is not None and re.match(r"[+*/]|-\s", text):
        text = f"{previous} {text}"
    return text if _FORMULA.fullmatch(text) else None


def _plan(formula: str) -> list[_Operation]:
    """The operations of the formula in the order they are worked out; empty when there is none."""
    plan: list[_Operation] = []

    def visit(node: ast.expr) -> float | _Result:
        match node:
            case ast.Constant(value=int() | float() as number):
                return number
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _TOOLS:
                plan.append(_Operation(type(operator), visit(left), visit(right)))
                return _Result(len(plan) - 1)
        message = "not plain arithmetic"
        raise ValueError(message)

    try:
        visit(ast.parse(formula, mode="eval").body)
    except (SyntaxError, ValueError):
        return []
    return plan


def _number(value: float) -> float:
    """A whole number without its fraction, so that tool arguments read as the user wrote them."""
    return int(value) if float(value).is_integer() else value


def _plain(value: float) -> str:
    return str(_number(value))


def _small_talk(text: str) -> str:
    if re.search(r"\b(?:thanks|thank you|cheers)\b", text.lower()):
        return "You're welcome!"
    return f"I'm sorry, I did not understand that. {HELP}"


model = OfflineModel(decide, name="offline-math")
