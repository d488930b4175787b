"""What the scorers read out of a trace: its messages, its tool calls, and the words and values that a text states."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from mlflow.entities import Span, SpanStatusCode, SpanType, Trace

# What redaction leaves in place of an e-mail address, a phone number, a card or a key.
PLACEHOLDER = re.compile(r"<[A-Z_]+:[a-z2-7]+>")
# An identifier: letters and digits in one, such as A-1001.
CODE = re.compile(r"(?<![\w-])(?=[\w-]*\d)(?=[\w-]*[A-Za-z])\w+(?:-\w+)*")

# Words that say nothing about the subject of a sentence. Question words other than what and which are not among them:
# "where is my order" and "when is my order" are different questions.
_COMMON = """
    a about after all also am an and any are as at be been before being but by can could did do does doing for had has
    have having he her here hers him his i if in into is it its just let like may me might more most much must my of
    on or our ours out over please shall she should so some than thanks thank that the their them then there these
    they this those to too up us very was we were what which will with would you your yours
"""
STOPWORDS = frozenset(_COMMON.split())


# --- messages and spans ---


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(part.get("text") or "" for part in parts if isinstance(part, dict))


def _texts(messages: Any, role: str) -> list[str]:
    found = [m for m in messages if isinstance(m, dict) and m.get("role") == role] if isinstance(messages, list) else []
    return [text for text in (_content_text(message.get("content")) for message in found) if text.strip()]


def answer_text(outputs: Any) -> str | None:
    """Return the assistant's last message in `outputs`, or None where there is none.

    Knows plain text, `{"messages": [...]}`, the Responses form `{"output": [...]}` and chat completions' `choices`.
    """
    if isinstance(outputs, str):
        return outputs
    if not isinstance(outputs, dict):
        return None
    choices = outputs.get("choices")
    replies = [choice.get("message") for choice in choices if isinstance(choice, dict)] if choices else None
    texts = _texts(outputs.get("messages") or outputs.get("output") or replies, "assistant")
    return texts[-1] if texts else None


def assistant_text(trace: Trace) -> str | None:
    """Return what the agent answered in this turn; None when the run failed."""
    root = next((span for span in trace.data.spans if span.parent_id is None), None)
    return answer_text(root.outputs) if root else None


def user_texts(trace: Trace) -> list[str]:
    """Return what the user wrote in this turn."""
    root = next((span for span in trace.data.spans if span.parent_id is None), None)
    inputs = root.inputs if root else None
    if isinstance(inputs, str):
        return [inputs]
    return _texts(inputs.get("messages") or inputs.get("input"), "user") if isinstance(inputs, dict) else []


def in_order(session: list[Trace]) -> list[Trace]:
    """Return the turns of a session, oldest first."""
    return sorted(session, key=lambda trace: trace.info.timestamp_ms)


def spans_of(trace: Trace, *span_types: str) -> list[Span]:
    """Return the spans of these types in the order in which they started."""
    spans = [span for span in trace.data.spans if span.span_type in span_types]
    return sorted(spans, key=lambda span: span.start_time_ns)


def tool_calls(trace: Trace) -> list[Span]:
    """Return the tool calls in the order in which they started."""
    return spans_of(trace, SpanType.TOOL)


def tool_rounds(trace: Trace) -> list[list[Span]]:
    """Return the tool calls grouped by the model call that asked for them."""
    spans = spans_of(trace, SpanType.TOOL, SpanType.CHAT_MODEL)
    return [list(group) for kind, group in groupby(spans, key=lambda span: span.span_type) if kind == SpanType.TOOL]


def has_failed(span: Span) -> bool:
    """Return whether the span ended with an error."""
    return span.status.status_code == SpanStatusCode.ERROR


# --- words ---


def stem(word: str) -> str:
    """Cut the common English endings, so that "shipped", "ships" and "shipment" are one word."""
    if len(word) > 4:
        short = re.sub(r"(?:ations?|ments?|ings?|ies|ed|es|s|y|e)$", "", word)
        word = short if len(short) > 2 else word
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] else word


def words(text: str, ignored: frozenset[str] = STOPWORDS) -> set[str]:
    """Return the stems of the words of `text`, without those of `ignored`, placeholders, codes and numbers."""
    text = CODE.sub(" ", PLACEHOLDER.sub(" ", text.replace("\u2019", "'"))).lower()
    text = re.sub(r"'(?:s|re|ve|ll|d|m)\b", "", re.sub(r"n't\b", " not", text))
    return {stem(word) for word in re.findall(r"[^\W\d_]+", text) if word not in ignored and len(word) > 1}


# --- values ---

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = rf"(?P<month>{'|'.join(_MONTHS)})[a-z]{{0,6}}\.?"
_DAY = r"(?P<day>\d{1,2})(?:st|nd|rd|th)?"
_YEAR = r"\b(?:,?\s+(?P<year>\d{4}))?"
_DATES = (
    re.compile(r"\b(?P<year>\d{4})-(?P<month>\d{1,2})-(?P<day>\d{1,2})(?!\d)T?"),
    re.compile(rf"\b{_MONTH}\s+{_DAY}{_YEAR}", re.IGNORECASE),
    re.compile(rf"\b{_DAY}\.?\s+(?:of\s+)?{_MONTH}{_YEAR}", re.IGNORECASE),
)
_NUMERIC_DATE = re.compile(r"\b(?P<first>\d{1,2})[./-](?P<second>\d{1,2})[./-](?P<year>\d{4}|\d{2})\b")
_TIME = re.compile(
    r"\b(?P<hour>\d{1,2})(?::(?P<minute>\d{2})(?::\d{2}(?:\.\d+)?)?(?:Z|[+-]\d{2}:?\d{2})?(?:\s*[ap]\.?m)?"
    r"|\s*[ap]\.?m\b)",
    re.IGNORECASE,
)
_ADDRESS = re.compile(r"https?://[^\s)>\"']+|(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
# "62eur" and "2-day" are amounts, not codes.
_AMOUNT_WITH_UNIT = re.compile(r"\d+-?[A-Za-z]{1,3}|\d+-[A-Za-z]+")
_GROUPING = "'\u2019\u00a0\u202f"  # what separates thousands, besides comma and point
_NUMBER = re.compile(
    rf"(?P<digits>\d{{1,3}}(?:[,.{_GROUPING}]\d{{3}})+(?:[.,]\d+)?(?!\d)|\d+(?:[.,]\d+)?)(?:e(?P<exponent>[+-]?\d+))?"
    r"[ \u00a0-]?(?P<unit>%|percent\b|k\b|thousand\b|m\b|million\b|bn\b|billion\b)?",
    re.IGNORECASE,
)
_SCALES = {"k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "bn": 1e9, "billion": 1e9}
# "one" is not among them: it is seldom a number ("this one", "one of them").
_NUMBER_WORDS = {
    "zero": 0, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6,
    "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
}  # fmt: skip


@dataclass(frozen=True)
class Amount:
    """A number as written: `step` is the worth of its last digit, by which it may have been rounded."""

    value: float
    step: float
    is_percent: bool = False

    def agrees_with(self, exact: "Amount") -> bool:
        """Return whether this is `exact`, or `exact` rounded, or a share written as a percentage. Signs are ignored."""
        wanted = [exact.value, exact.value * 100] if self.is_percent else [exact.value]
        # Below ten a whole number is taken as exact: "1" does not stand for 0.92.
        return any(
            abs(self.value - value) <= (self.step * 0.5000001 if self.step < 1 or value >= 10 else 1e-9)
            for value in wanted
            if value or not self.value
        )


@dataclass
class Values:
    """The values that a text states. A number or date that can be read in two ways is there in both."""

    codes: set[str] = field(default_factory=set)
    dates: set[tuple[int, int, int]] = field(default_factory=set)  # (year or 0, month, day)
    times: set[str] = field(default_factory=set)  # on a twelve-hour clock: "7:00"
    amounts: list[Amount] = field(default_factory=list)


def _readings(digits: str) -> list[tuple[float, float]]:
    """Return the (value, step) readings of a number: 1,200 is a thousand or, in other countries, a little over one."""
    plain = re.sub(f"[{_GROUPING}]", "", digits)
    marks = re.findall(r"[.,]", plain)
    as_whole = (float(re.sub(r"[.,]", "", plain)), 1.0)
    if not marks:
        return [as_whole]
    before, _, after = plain.rpartition(marks[-1])
    decimals = len(after)
    as_decimal = (float(f"{re.sub('[.,]', '', before)}.{after}"), 10.0**-decimals)
    if decimals != 3 or len(set(marks)) > 1:
        return [as_decimal]
    return [as_whole] if len(marks) > 1 else [as_whole, as_decimal]


def _amounts(text: str) -> list[Amount]:
    found = []
    for match in _NUMBER.finditer(text):
        unit = (match["unit"] or "").lower()
        # "5 m" may be five metres.
        for scale in {1.0, _SCALES.get(unit, 1.0)}:
            worth = scale * 10.0 ** min(int(match["exponent"] or 0), 300)
            readings = _readings(match["digits"])
            found += [Amount(value * worth, step * worth, unit in {"%", "percent"}) for value, step in readings]
    spelled = re.findall(r"[a-z]+", text.lower())
    return found + [Amount(float(_NUMBER_WORDS[word]), 1.0) for word in spelled if word in _NUMBER_WORDS]


def _dates(match: re.Match[str]) -> set[tuple[int, int, int]]:
    year = int(match["year"] or 0)
    if "first" in match.re.groupindex:
        first, second, year = int(match["first"]), int(match["second"]), year + 2000 if year < 100 else year
        readings = [(first, second), (second, first)]
    else:
        month = match["month"].lower()
        readings = [(int(month) if month.isdigit() else _MONTHS.index(month[:3]) + 1, int(match["day"]))]
    return {(year, month, day) for month, day in readings if 1 <= month <= 12 and 1 <= day <= 31}


def read_values(text: str) -> Values:
    """Return the codes, addresses, dates, times and numbers in `text`."""
    values = Values()

    def take(pattern: re.Pattern[str], add: Callable[[re.Match[str]], None]) -> None:
        nonlocal text
        for match in pattern.finditer(text):
            add(match)
        text = pattern.sub(" ", text)

    take(PLACEHOLDER, lambda match: values.codes.add(match[0].lower()))
    take(_ADDRESS, lambda match: values.codes.add(match[0].lower().rstrip(".,")))
    for pattern in (*_DATES, _NUMERIC_DATE):
        take(pattern, lambda match: values.dates.update(_dates(match)))
    take(_TIME, lambda match: values.times.add(f"{int(match['hour']) % 12}:{match['minute'] or '00'}"))
    # What comes first in a line of a numbered list is no value.
    text = re.sub(r"(?m)^\s*\d{1,2}[.)]\s", " ", text)

    def take_code(match: re.Match[str]) -> str:
        if _AMOUNT_WITH_UNIT.fullmatch(match[0]):
            return match[0]
        values.codes.add(match[0].lower())
        return " "

    values.amounts = _amounts(CODE.sub(take_code, text))
    return values
