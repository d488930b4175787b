"""What a turn had to go by, and which values of its answer that does not account for."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Any

from mlflow.entities import Trace

from ._arithmetic import business_days_after, day_follows, follows, minutes_of, time_follows, worth_of
from ._trace import earlier_messages, failure_of, instructions, leaves, parsed, text_leaves, tool_calls, user_texts
from ._values import Amount, Stated, Values, read_stated, read_values

# Numbers that claim nothing exact, that count or name a part of the text, or that show a form.
_NO_CLAIM = re.compile(
    # "about 9.30" claims more than a round figure does.
    r"(?:\b(?:about|around|roughly|approx(?:\.|imately)?|nearly|almost|over|more than|less than|under|circa|ca\."
    r"|some)|[~\u2248])\s*[$\u20ac\u00a3]?\s?\d(?:\d|[.,]\d{3}(?!\d))*(?![\d.,]*\d)(?:%|k\b)?"
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
_MOST_BUSINESS_DAYS = 100
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
    is_prose: bool = False
    """Whether tools were called and what they returned has numbers in texts only, such as rules that were looked up."""
    is_worked_out: bool = False
    """Whether a tool gave a bare number, as one that calculates does: the answer has no need to do it in its head."""
    workings: list[float] = field(default_factory=list)
    """What the sums that the answer shows come to."""
    today: date = date.min
    is_relative: bool = False
    """Whether the user spoke of days relative to today."""


def grounds_of(trace: Trace, *, with_earlier: bool = True, with_own: bool = True) -> Grounds:
    """Return what this turn had to go by.

    Args:
        trace: the turn.
        with_earlier: whether the instructions and the turns before count.
        with_own: whether what the assistant itself said in earlier turns counts.
    """
    calls = tool_calls(trace)
    asked = user_texts(trace)
    close = [
        *asked,
        *(text for call in calls for given in (call.outputs, call.inputs) for _, text in text_leaves(given)),
    ]
    before = earlier_messages(trace, *(() if with_own else ("user", "tool"))) if with_earlier else []
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
    grounds.numbers += _of_company([*asked, *(earlier_messages(trace, "user") if with_earlier else ())])
    grounds.earlier = [amount.value for amount in past.amounts]
    grounds.is_relative = any(_RELATIVE.search(text) for text in asked)
    if trace.info.timestamp_ms:
        grounds.today = datetime.fromtimestamp(trace.info.timestamp_ms / 1000, UTC).date()
    for call in calls:
        _count(call.outputs, grounds)
    grounds.most_counted = max(grounds.most_counted, len(calls))
    grounds.is_prose = bool(calls) and not grounds.columns
    grounds.is_worked_out = bool(grounds.columns.get(""))
    return grounds


_COMPANY = re.compile(r"\b(\w+) (?:friends|others|colleagues|kids|children)\b", re.IGNORECASE)


def _of_company(texts: list[str]) -> list[float]:
    """Return how many the user and others are: "me and three friends" are four."""
    return [each.value + 1 for text in texts for match in _COMPANY.finditer(text) for each in _amounts(match[1])]


# A sum that is written out, such as "3 x (42 + 38.50) =".
_SUM = re.compile(r"[\d($\u20ac\u00a3][\d.,()\u00d7x*+\u2212\u2013/\u00f7\s$\u20ac\u00a3-]*[\d)]\s*(?==)")


def _workings(answer: str) -> list[float]:
    """Return what the sums come to that the answer shows."""
    sums = (re.sub(r",(?=\d{3}(?!\d))|[$\u20ac\u00a3]", "", match[0]) for match in _SUM.finditer(answer))
    return [worth for written in sums if (worth := worth_of(written)) is not None]


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


def unknown_values(trace: Trace, answer: str, *, with_own: bool = True) -> tuple[list[Unknown], int]:
    """Return the values of the answer that nothing accounts for, and how many it states in all.

    What the assistant itself said in earlier turns accounts for a value only `with_own`.
    """
    answer, durations = _without_durations(answer)
    stated = claims_of(answer)
    stated.codes = {code for code in stated.codes if _IDENTIFIER.fullmatch(code)}
    number = len(stated.codes) + len(stated.dates) + len(stated.times) + len(stated.numbers) + len(durations)
    unknown = _unknown(stated, durations, grounds_of(trace, with_earlier=False), answer) if number else []
    return _unknown(stated, durations, grounds_of(trace, with_own=with_own), answer) if unknown else [], number


# What is said to have happened on a day was told of it, and is no sum.
_HAPPENED = re.compile(
    r"(?:[a-z]+ed|sent|made|paid|left|bought)(?: (?:up|out|off|in|back|over))? on (?:\w+day,? )?(?:the )?$"
)
_SPAN = re.compile(r"\b(\w+)[ -](?:(?:business|working|calendar) )?(day|week|month|hour|year)s?\b")


def _has_happened(answer: str, day: str) -> bool:
    return _HAPPENED.search(answer[: max(answer.find(day), 0)]) is not None


def _unknown(stated: Stated, durations: list[tuple[str, int]], grounds: Grounds, answer: str) -> list[Unknown]:
    grounds.workings = _workings(answer) if "=" in answer else []
    spans = dict(_SPAN.findall(answer)) if grounds.is_prose else {}
    unknown = [Unknown("code", code) for code in sorted(stated.codes) if not _is_known_code(code, grounds)]
    unknown += [
        Unknown("date", text)
        for text, dates in stated.dates
        if dates and not _is_known_date(dates, grounds, is_past=_has_happened(answer, text))
    ]
    unknown += [Unknown("time", text) for text, time in stated.times if not _is_known_time(time, grounds)]
    unknown += [Unknown("number", text) for text, minutes in durations if not _is_known_duration(minutes, grounds)]
    for text, readings in stated.numbers:
        if not (_is_known_span(text, spans, grounds) if text in spans else _is_known_number(readings, grounds)):
            unknown.append(Unknown("number", text))
        elif len(readings) == 1:
            grounds.workings.append(readings[0].value)  # the answer may go on from there
    return unknown


_HOURS = {"hour": 1, "day": 24, "week": 168, "month": 720, "year": 8760}


def _is_known_span(written: str, spans: dict[str, str], grounds: Grounds) -> bool:
    """Return whether a number of days or weeks is given, in whatever unit, or is what one given leaves of another."""
    hours = float(written) * _HOURS[spans[written]]
    given = {amount.value * _HOURS[unit] for number, unit in _SPAN.findall(grounds.text) for amount in _amounts(number)}
    if hours in given or hours in {one - other for one in given for other in given}:
        return True
    return any(amount.value == float(written) for amount in grounds.values.amounts) or (
        hours / 24 in _days_between(grounds)
    )


def _amounts(number: str) -> list[Amount]:
    return read_values(number).amounts


def _days_between(grounds: Grounds) -> set[int]:
    days = sorted(set(_whole(grounds.values.dates, grounds.today)))[-6:]
    return {(other - one).days for one in days for other in days if one < other}


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
    # "18h38" is a time of day in many countries.
    if any((one - other) % 720 == minutes % 720 for one in times for other in times) or minutes % 720 in times:
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


_BUSINESS_DAYS = re.compile(r"\b(\w+) (?:business|working) days?\b")
_ORDINAL = re.compile(r"\b(\d{1,2})(?:st|nd|rd|th)\b")


def _is_known_date(stated: set[tuple[int, int, int]], grounds: Grounds, *, is_past: bool) -> bool:
    known = grounds.values.dates
    for year, month, day in stated:
        if any(each[1:] == (month, day) and (not year or not each[0] or year == each[0]) for each in known):
            return True
    if is_past:
        return False
    if grounds.is_relative or {str(day) for *_, day in stated} & set(_ORDINAL.findall(grounds.text)):
        return True
    days = set(_whole(known, grounds.today))
    if day_follows(stated, days, _spans(grounds)):
        return True
    counts = [int(each.value) for text in _BUSINESS_DAYS.findall(grounds.text) for each in read_values(text).amounts]
    after = {business_days_after(day, count) for count in counts if count < _MOST_BUSINESS_DAYS for day in days}
    return any((day.month, day.day) == each[1:] for day in after for each in stated)


def _whole(dates: set[tuple[int, int, int]], today: date) -> Iterator[date]:
    """Yield the dates as days, in this year where none is given."""
    for year, month, day in dates:
        try:
            yield date(year or today.year, month, day)
        except ValueError:
            continue
    yield today


_IN_HOURS = re.compile(r"\b(\w+)[ -]?(?:hours?|hrs?|h)\b")
_LEAST_MINUTES = 5


def _is_known_time(time: str, grounds: Grounds) -> bool:
    hour, _, minute = time.partition(":")
    if time in grounds.values.times:
        return True
    if minute == "00" and any(amount.value % 12 == int(hour) for amount in grounds.values.amounts):
        return True
    hours = {amount.value * 60 for number in _IN_HOURS.findall(grounds.text) for amount in _amounts(number)}
    hours |= {each * 60 for key, column in grounds.columns.items() if "hour" in key.lower() for each in column}
    minutes = {span for span in _spans(grounds) if span >= _LEAST_MINUTES} | hours
    minutes |= {float(duration) for _, duration in _without_durations(grounds.text)[1]}
    return time_follows(time, grounds.values.times, minutes)


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
    between = _days_between(grounds)
    if any(reading.value in between or reading.value * 7 in between for reading in readings):
        return True
    clock = [minutes_of(time) for time in values.times]
    if any(reading.value in {(one - other) % 720 for one in clock for other in clock} for reading in readings):
        return True
    near = [*grounds.numbers, *grounds.workings]
    if any(reading.agrees_with(Amount(worth, 1e-9)) for reading in readings for worth in grounds.workings):
        return True
    exact = min((reading.step for reading in readings), default=1.0) < 1
    steps = 2 if len(set(near)) <= (_MOST_FOR_TWO_EXACT if exact else _MOST_FOR_TWO_STEPS) else 1
    if grounds.is_worked_out:
        steps = 1
    # The latest of the earlier turns are likeliest to go on with.
    return any(
        follows(reading, near, steps=steps) or follows(reading, [*near[-8:], *grounds.earlier[::-1]])
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


_MOST_EARLIER = 4
_LONGEST_EARLIER = 4000


def earlier_facts(trace: Trace) -> list[Fact]:
    """Return what the last results of the turns before this one hold, as far as the model's messages show them."""
    results = earlier_messages(trace, "tool")[-_MOST_EARLIER:]
    return [
        Fact("an earlier call", key, value, place, (place, thing))
        for place, result in enumerate(results)
        if len(result) < _LONGEST_EARLIER
        for thing, part in enumerate(_things(_written_out(result)))
        for key, value in leaves(part)
    ]


def _written_out(result: str) -> Any:
    """Return the value that a message holds as JSON, or as Python writes it."""
    try:
        return parsed(result) if parsed(result) is not result else ast.literal_eval(result)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return result


def _things(result: Any) -> list[Any]:
    """Return the objects of a list of objects, wherever it stands in the result; else the result as one thing."""
    result = parsed(result)
    if isinstance(result, dict):
        lists = [each for each in result.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        if len(lists) == 1:
            rest = {key: value for key, value in result.items() if value is not lists[0]}
            return [*lists[0], rest]
    return list(result) if isinstance(result, list) and result and isinstance(result[0], dict) else [result]
