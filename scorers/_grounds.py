"""What a turn had to go by, and which values of its answer that does not account for."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from mlflow.entities import Trace

from ._arithmetic import day_follows, follows, minutes_of, time_follows
from ._trace import earlier_messages, failure_of, instructions, leaves, parsed, text_leaves, tool_calls, user_texts
from ._values import Amount, Stated, Values, read_stated, read_values

# Numbers that claim nothing exact, that count or name a part of the text, or that show a form.
_NO_CLAIM = re.compile(
    r"(?:\b(?:about|around|roughly|approx(?:\.|imately)?|nearly|almost|over|more than|less than|under|circa|ca\."
    r"|some)|[~\u2248])\s*[$\u20ac\u00a3]?\s?\d[\d.,]*\b(?:%|k\b)?"
    r"|\b\d+(?:st|nd|rd|th)\b|\b24/7\b|\b24 hours a day\b"
    r"|\b(?:steps?|options?|sections?|chapters?|pages?|questions?|parts?|examples?) \d+\b"
    r"|\b(?:such as|e\.g\.|for example|for instance|like|format(?:ted)?|looks? like)[:,]?\s+[\"'(]?[#\w-]*\d[\w-]*"
    r"|\b\d\s*(?:-|\u2013|to|or)\s*\d (?:sentences?|words?|lines?)\b",
    re.IGNORECASE,
)
# "3D", "B2B" or "MP3" name things; an identifier has more digits than that.
_IDENTIFIER = re.compile(r"(?=(?:\D*\d){2})[\w-]{4,}|[<@].*|.*[@/].*")
_RELATIVE = re.compile(
    r"\b(?:today|tonight|tomorrow|yesterday|now|next|last|this|coming|weekend|weeks?|(?:mon|tues|wednes|thurs|fri"
    r"|satur|sun)day)\b",
    re.IGNORECASE,
)
_MOST_FOR_TWO_STEPS = 4
"""Numbers known, up to which a sum of two operations is tried: of more, too much follows."""
_MOST_FOR_TWO_EXACT = 7
"""The same for numbers with decimals, which are seldom met by chance."""
_CONSTANTS = frozenset({60.0, 100.0, 365.0, 1000.0})
"""What minutes, per cents, days and metres are counted in."""


@dataclass
class Grounds:
    """What the user, the tools, the instructions and the earlier turns gave."""

    values: Values = field(default_factory=Values)
    numbers: list[float] = field(default_factory=list)
    """Those of this turn's user and tools, to work with; `values` has all that were mentioned."""
    earlier: list[float] = field(default_factory=list)
    """Those of the turns before."""
    columns: dict[str, list[float]] = field(default_factory=dict)
    """The numbers that stand under one key of the results: what a total or a mean is taken of."""
    most_counted: int = 0
    """The length of the longest list."""
    text: str = ""
    today: date = date.min
    is_relative: bool = False
    """Whether the user spoke of days relative to today."""


def grounds_of(trace: Trace, *, with_earlier: bool = True) -> Grounds:
    """Return what this turn had to go by, with or without the instructions and the turns before it."""
    calls = tool_calls(trace)
    asked = user_texts(trace)
    close = [
        *asked,
        *(text for call in calls for given in (call.outputs, call.inputs) for _, text in text_leaves(given)),
    ]
    before = earlier_messages(trace) if with_earlier else []
    rules = instructions(trace) if with_earlier else []
    near, past, rest = (read_values("\n".join(texts)) for texts in (close, before, rules))
    grounds = Grounds(text="\n".join([*close, *before, *rules]).lower())
    grounds.values = Values(
        near.codes | past.codes | rest.codes,
        near.dates | past.dates | rest.dates,
        near.times | past.times | rest.times,
        near.amounts + past.amounts + rest.amounts,
    )
    grounds.numbers = [amount.value for amount in near.amounts]
    grounds.earlier = [amount.value for amount in past.amounts]
    grounds.is_relative = any(_RELATIVE.search(text) for text in asked)
    if trace.info.timestamp_ms:
        grounds.today = datetime.fromtimestamp(trace.info.timestamp_ms / 1000, UTC).date()
    for call in calls:
        _count(call.outputs, grounds)
    grounds.most_counted = max(grounds.most_counted, len(calls))
    return grounds


def _count(result: Any, grounds: Grounds) -> None:
    met: dict[str, int] = {}
    for key, value in leaves(result):
        met[key] = met.get(key, 0) + 1
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
            grounds.columns.setdefault(key, []).append(float(value))
    grounds.most_counted = max(grounds.most_counted, *met.values(), 0) if met else grounds.most_counted


def claims_of(answer: str) -> Stated:
    """Return the values that an answer states as facts, without round figures, counts of its own and examples."""
    return read_stated(_NO_CLAIM.sub(" ", answer))


@dataclass(frozen=True)
class Unknown:
    """A value of an answer that nothing accounts for."""

    kind: str
    """code, date, time or number"""
    written: str


def unknown_values(trace: Trace, answer: str) -> tuple[list[Unknown], int]:
    """Return the values of the answer that nothing accounts for, and how many it states in all."""
    answer, durations = _without_durations(answer)
    stated = claims_of(answer)
    stated.codes = {code for code in stated.codes if _IDENTIFIER.fullmatch(code)}
    number = len(stated.codes) + len(stated.dates) + len(stated.times) + len(stated.numbers) + len(durations)
    unknown = _unknown(stated, durations, grounds_of(trace, with_earlier=False)) if number else []
    return _unknown(stated, durations, grounds_of(trace)) if unknown else [], number


def _unknown(stated: Stated, durations: list[tuple[str, int]], grounds: Grounds) -> list[Unknown]:
    unknown = [Unknown("code", code) for code in sorted(stated.codes) if not _is_known_code(code, grounds)]
    unknown += [Unknown("date", text) for text, dates in stated.dates if dates and not _is_known_date(dates, grounds)]
    unknown += [Unknown("time", text) for text, time in stated.times if not _is_known_time(time, grounds)]
    unknown += [Unknown("number", text) for text, minutes in durations if not _is_known_duration(minutes, grounds)]
    unknown += [Unknown("number", text) for text, amounts in stated.numbers if not _is_known_number(amounts, grounds)]
    return unknown


_DURATION = re.compile(
    r"\b(?:(\d{1,3}) ?(?:d|days?),?(?: and)? )?(\d{1,2}) ?(?:h|hrs?|hours?),?(?: and)? ?(\d{1,2})(?: ?(?:m|mins?"
    r"|minutes?))?\b",
    re.IGNORECASE,
)


def _without_durations(answer: str) -> tuple[str, list[tuple[str, int]]]:
    """Return the text without durations such as "5 h 39", and those, each with its minutes."""
    matches = list(_DURATION.finditer(answer))
    found = [(each[0], (int(each[1] or 0) * 24 + int(each[2])) * 60 + int(each[3])) for each in matches]
    return (_DURATION.sub(" ", answer), found) if found else (answer, [])


def _is_known_duration(minutes: int, grounds: Grounds) -> bool:
    times = [minutes_of(time) for time in grounds.values.times]
    if any((one - other) % 720 == minutes % 720 for one in times for other in times):
        return True
    return any(amount.value in (minutes, minutes / 60) for amount in grounds.values.amounts)


def _is_known_code(code: str, grounds: Grounds) -> bool:
    if code in grounds.values.codes or code in grounds.text:
        return True
    bare = re.sub(r"[\W_]", "", code)
    # A telephone number may be written with other gaps.
    ignored = r"\D+" if code.startswith("@") and bare.isdigit() else r"[^\w\s]|_"
    return bare in re.sub(ignored, "", grounds.text)


def _spans(grounds: Grounds) -> set[float]:
    return {amount.value for amount in grounds.values.amounts if amount.value.is_integer()}


def _is_known_date(stated: set[tuple[int, int, int]], grounds: Grounds) -> bool:
    known = grounds.values.dates
    for year, month, day in stated:
        if any(each[1:] == (month, day) and (not year or not each[0] or year == each[0]) for each in known):
            return True
    if grounds.is_relative:
        return True
    days = set(_whole(known, grounds.today))
    return day_follows(stated, days, _spans(grounds))


def _whole(dates: set[tuple[int, int, int]], today: date) -> Iterator[date]:
    """Yield the dates as days, in this year where none is given."""
    for year, month, day in dates:
        try:
            yield date(year or today.year, month, day)
        except ValueError:
            continue
    yield today


def _is_known_time(time: str, grounds: Grounds) -> bool:
    hour, _, minute = time.partition(":")
    if time in grounds.values.times:
        return True
    if minute == "00" and any(amount.value % 12 == int(hour) for amount in grounds.values.amounts):
        return True
    return time_follows(time, grounds.values.times, _spans(grounds))


def _is_known_number(readings: list[Amount], grounds: Grounds) -> bool:
    values = grounds.values
    if any(reading.agrees_with(exact) for reading in readings for exact in values.amounts):
        return True
    for reading in readings:
        value = reading.value
        if value in _CONSTANTS:
            return True
        if value.is_integer() and (value <= grounds.most_counted or _is_part(int(value), grounds)):
            return True
    if any(follows(reading, column) for reading in readings for column in grounds.columns.values()):
        return True
    days = sorted(set(_whole(values.dates, grounds.today)))[-6:]
    between = {(other - one).days for one in days for other in days if one < other}
    if any(reading.value in between or reading.value * 7 in between for reading in readings):
        return True
    near = grounds.numbers
    exact = min((reading.step for reading in readings), default=1.0) < 1
    steps = 2 if len(set(near)) <= (_MOST_FOR_TWO_EXACT if exact else _MOST_FOR_TWO_STEPS) else 1
    # The latest of the earlier turns are likeliest to go on with.
    return any(
        follows(reading, near, steps=steps) or follows(reading, [*grounds.numbers[-8:], *grounds.earlier[::-1]])
        for reading in readings
    )


def _is_part(number: int, grounds: Grounds) -> bool:
    """Return whether the number is a year, month or day of a known date, or the end of a known identifier."""
    if any(number in each for each in grounds.values.dates) or number == grounds.today.year:
        return True
    return number > 99 and bool(re.search(rf"\d{number}(?!\d)", grounds.text))


@dataclass(frozen=True)
class Fact:
    """One value that a tool returned."""

    tool: str
    key: str
    """What it stands under; empty for a bare value."""
    value: Any
    place: int
    """Number of the call."""
    thing: tuple[int, int]
    """The object that it is part of: what stands beside it is said of the same thing."""

    @property
    def name(self) -> str:
        """The value with its key."""
        return f"{self.key or 'the value'} {self.value!r}"


def facts_of(trace: Trace) -> list[Fact]:
    """Return what the turn's successful calls returned, value by value."""
    return [
        Fact(call.name, key, value, place, (place, thing))
        for place, call in enumerate(tool_calls(trace))
        if failure_of(call) is None
        for thing, part in enumerate(_things(call.outputs))
        for key, value in leaves(part)
    ]


def _things(result: Any) -> list[Any]:
    """Return the objects of a list of objects, wherever it stands in the result; else the result as one thing."""
    result = parsed(result)
    if isinstance(result, dict):
        lists = [each for each in result.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        if len(lists) == 1:
            rest = {key: value for key, value in result.items() if value is not lists[0]}
            return [*lists[0], rest]
    return list(result) if isinstance(result, list) and result and isinstance(result[0], dict) else [result]
