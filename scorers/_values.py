"""The values that a text states: codes, addresses, dates, times and numbers, in whatever form they are written."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ._words import CODE, PLACEHOLDER

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_MONTH = (
    r"(?P<month>jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?"
    r"|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
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
    r"|(?:\.(?P<minutes>\d{2}))?\s*[ap]\.?m\b)",
    re.IGNORECASE,
)
_PHONE = re.compile(r"(?<![\w+.-])\+?\(?\d[\d ()/-]{7,16}\d(?![\w.-]*\d)")
_ADDRESS = re.compile(r"https?://[^\s)>\"']+|(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+")
# "62eur" and "2-day" are amounts, not codes.
_AMOUNT_WITH_UNIT = re.compile(r"\d+-?[A-Za-z]{1,3}|\d+-[A-Za-z]+")
_GROUPING = "'\u2019\u00a0\u202f"  # what separates thousands, besides comma and point
_NUMBER = re.compile(
    rf"(?P<digits>\d{{1,3}}(?:[,.{_GROUPING}]\d{{3}})+(?:[.,]\d+)?(?!\d)|\d+(?:[.,]\d+)?)(?:e(?P<exponent>[+-]?\d+))?"
    r"[ \u00a0-]?(?P<unit>%|percent\b|k\b|thousand\b|m\b|million\b|bn\b|billion\b)?",
    re.IGNORECASE,
)
_LIST_MARK = re.compile(r"(?m)^\s*\d{1,2}[.)]\s")
_SCALES = {"k": 1e3, "thousand": 1e3, "m": 1e6, "million": 1e6, "bn": 1e9, "billion": 1e9}
# "one" is not among them: it is seldom a number ("this one", "one of them").
_NUMBER_WORDS = {
    "zero": 0, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6,
    "seven": 7, "eight": 8, "nine": 9, "ten": 10, "eleven": 11, "twelve": 12, "fourteen": 14, "fifteen": 15,
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "ninety": 90, "hundred": 100, "dozen": 12,
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


def _written(text: str) -> Iterator[tuple[str, list[Amount]]]:
    """Yield each number that is written in digits, with the ways to read it."""
    for match in _NUMBER.finditer(text):
        unit = (match["unit"] or "").lower()
        amounts = []
        # "5 m" may be five metres.
        for scale in {1.0, _SCALES.get(unit, 1.0)}:
            worth = scale * 10.0 ** min(int(match["exponent"] or 0), 300)
            readings = _readings(match["digits"])
            amounts += [Amount(value * worth, step * worth, unit in {"%", "percent"}) for value, step in readings]
        yield match[0].strip(" -\u00a0"), amounts


def _spelled(text: str) -> list[Amount]:
    found = re.findall(r"[a-z]+", text.lower())
    return [Amount(float(_NUMBER_WORDS[word]), 1.0) for word in found if word in _NUMBER_WORDS]


def _dates(match: re.Match[str]) -> set[tuple[int, int, int]]:
    year = int(match["year"] or 0)
    if "first" in match.re.groupindex:
        first, second, year = int(match["first"]), int(match["second"]), year + 2000 if year < 100 else year
        readings = [(first, second), (second, first)]
    else:
        month = match["month"].lower()
        readings = [(int(month) if month.isdigit() else _MONTHS.index(month[:3]) + 1, int(match["day"]))]
    return {(year, month, day) for month, day in readings if 1 <= month <= 12 and 1 <= day <= 31}


def _time(match: re.Match[str]) -> str:
    return f"{int(match['hour']) % 12}:{match['minute'] or match['minutes'] or '00'}"


@dataclass
class Stated:
    """The values of a text, each as it is written."""

    codes: set[str]
    """Identifiers and addresses in lower case; a telephone number as "@" and its digits."""
    dates: list[tuple[str, set[tuple[int, int, int]]]]
    """As written, with the ways to read it: (year or 0, month, day)."""
    times: list[tuple[str, str]]
    """As written, and on a twelve-hour clock: "7:00"."""
    numbers: list[tuple[str, list[Amount]]]
    """As written, with the ways to read it."""
    rest: str
    """What is left of the text: words, and numbers."""


def read_stated(text: str) -> Stated:
    """Return the values in `text`, each as it is written. Numbers that are spelled out are not among them."""
    stated = Stated(set(), [], [], [], text)

    def take(pattern: re.Pattern[str], add: Callable[[re.Match[str]], None]) -> None:
        found = list(pattern.finditer(stated.rest))
        for match in found:
            add(match)
        if found:
            stated.rest = pattern.sub(" ", stated.rest)

    if "<" in text:
        take(PLACEHOLDER, lambda match: stated.codes.add(match[0].lower()))
    if "@" in text or "://" in text:
        take(_ADDRESS, lambda match: stated.codes.add(match[0].lower().rstrip(".,")))
    for pattern in (*_DATES, _NUMERIC_DATE):
        take(pattern, lambda match: stated.dates.append((match[0], _dates(match))))
    take(_TIME, lambda match: stated.times.append((match[0], _time(match))))
    # What comes first in a line of a numbered list is no value.
    if len(_LIST_MARK.findall(stated.rest)) > 1:
        stated.rest = _LIST_MARK.sub(" ", stated.rest)

    def take_phone(match: re.Match[str]) -> str:
        digits = re.sub(r"\D", "", match[0])
        if len(digits) < 9 or (" " not in match[0] and "-" not in match[0]):
            return match[0]
        stated.codes.add(f"@{digits}")
        return " "

    stated.rest = _PHONE.sub(take_phone, stated.rest)

    def take_code(match: re.Match[str]) -> str:
        if _AMOUNT_WITH_UNIT.fullmatch(match[0]):
            return match[0]
        stated.codes.add(match[0].lower())
        return " "

    stated.rest = CODE.sub(take_code, stated.rest)
    stated.numbers = list(_written(stated.rest))
    return stated


_ANY_VALUE = re.compile(r"\d|@|://|<[A-Z_]+:")


def read_values(text: str) -> Values:
    """Return the codes, addresses, dates, times and numbers in `text`, also those that are spelled out."""
    if not _ANY_VALUE.search(text):
        return Values(amounts=_spelled(text))
    stated = read_stated(text)
    return Values(
        codes=stated.codes,
        dates={date for _, dates in stated.dates for date in dates},
        times={time for _, time in stated.times},
        amounts=[amount for _, amounts in stated.numbers for amount in amounts] + _spelled(stated.rest),
    )
