"""Whether a number, a date or a time follows from others by plain arithmetic."""

import ast
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import date, timedelta
from itertools import islice

from ._values import Amount

# Of many numbers almost everything follows; and the pairs of more than these take too long.
_MOST_NUMBERS = 24
# By so much two sums of money may differ that are the same, each being rounded.
_CENT = 0.0051
# Between units: of time, of length, weight and volume; half and double; hundreds and thousands.
_FACTORS = (
    *(60.0, 24.0, 7.0, 12.0, 365.0, 3600.0, 1440.0, 52.0, 2.0, 100.0, 1000.0),
    *(1.609344, 0.45359237, 2.54, 0.3048, 28.349523, 3.785412),
)


def _unary(number: float) -> Iterator[float]:
    yield from (number * factor for factor in _FACTORS)
    yield from (number / factor for factor in _FACTORS)
    yield from (number * 9 / 5 + 32, (number - 32) * 5 / 9)


def _products(one: float, other: float) -> Iterator[float]:
    share = one * other / 100
    yield from (one * other, share, one - share, one + share)
    yield from (first / second for first, second in ((one, other), (other, one)) if second and one != other)
    yield from (other - share, other + share)


def _sums(one: float, other: float) -> Iterator[float]:
    yield from (one + other, one - other)


def _rests(one: float, other: float) -> Iterator[float]:
    for first, second in ((one, other), (other, one)):
        if second and one != other:
            times = math.floor(first / second + 1e-9)  # 640 // 25.6 would be 24
            yield from (float(times), first - second * times)


def _shares(one: float, other: float) -> Iterator[float]:
    for first, second in ((one, other), (other, one)):
        if second:
            yield from (first / second * 100, 100 - first / second * 100, first / second * 100 - 100)


def follows(stated: Amount, numbers: Sequence[float], *, steps: int = 1) -> bool:
    """Return whether `stated`, as far as it is written out, is one of the usual sums over `numbers`.

    The sums are those of one operation between two of them, a percentage, a change of unit, and the sum and mean of
    all. With two `steps` the result may go into a second operation. A percentage has to be a share of one number in
    another, or what another leaves of the whole. A sum or difference is not rounded, but for fractions of a cent: of
    many numbers too much comes near a whole one. Signs are ignored.
    """
    known = list(islice(dict.fromkeys(abs(number) for number in numbers), _MOST_NUMBERS))
    if not known:
        return False
    tolerance = stated.step * 0.5000001 if stated.step < 1 or stated.value >= 10 else 1e-9

    def found(results: Iterable[float], within: float = tolerance) -> bool:
        low, high = stated.value - within, stated.value + within
        return any(low <= abs(result) <= high for result in results)

    pairs = [(one, other) for place, one in enumerate(known) for other in known[place:]]
    if stated.is_percent:
        return found(100 - number for number in known) or any(
            found(_shares(*pair)) for pair in pairs if len(set(pair)) > 1
        )
    if found((sum(numbers), sum(numbers) / len(numbers), sum(known), sum(known) / len(known))):
        return True
    if any(found(_unary(number)) for number in known):
        return True
    sums = [result for pair in pairs for result in _sums(*pair)]
    products = [result for pair in pairs for result in _products(*pair)]
    if found(sums, min(tolerance, _CENT)) or found(products) or any(found(_rests(*pair)) for pair in pairs):
        return True
    if steps < 2:
        return False
    # Of two operations too many come near a whole number.
    within = 1e-6 if stated.step >= 1 else tolerance
    return any(
        found((*_sums(result, number), *_products(result, number)), within)
        for result in dict.fromkeys(sums + products)
        for number in known
    )


def day_follows(stated: Collection[tuple[int, int, int]], days: Collection[date], spans: Collection[float]) -> bool:
    """Return whether one reading of a date, (year or 0, month, day), is so many days or weeks from one of `days`."""
    for year, month, day in stated:
        for start in days:
            with_year = year or start.year
            for reading in {with_year, with_year if year else start.year + 1}:
                away = _days_between(start, reading, month, day)
                if away is not None and (away in spans or (away % 7 == 0 and away // 7 in spans) or away <= 1):
                    return True
    return False


def _days_between(start: date, year: int, month: int, day: int) -> int | None:
    try:
        return abs((date(year, month, day) - start) // timedelta(days=1))
    except (ValueError, OverflowError):
        return None


def business_days_after(start: date, number: int) -> date:
    """Return the day that is so many days after `start`, Saturdays and Sundays not counted."""
    weeks, rest = divmod(number, 5)
    day = start + timedelta(weeks=weeks)
    while rest:
        day += timedelta(days=1)
        rest -= day.weekday() < 5
    return day


_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip
_LONGEST_SUM = 80


def worth_of(written: str) -> float | None:
    """Return what a sum such as "3 \u00d7 (42 + 38.50)" comes to; None if it is no sum."""
    text = written.translate(str.maketrans("\u00d7x\u00f7\u2212\u2013", "**/--")).strip()
    if len(text) > _LONGEST_SUM:
        return None
    try:
        return _worth(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError):
        return None


def _worth(node: ast.expr) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return float(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_worth(node.left), _worth(node.right))
    raise ValueError("no plain sum")


def minutes_of(time: str) -> int:
    """Return the minutes since twelve o'clock of a time such as "7:30"."""
    hour, _, minute = time.partition(":")
    return (int(hour) % 12) * 60 + int(minute)


def time_follows(stated: str, times: Collection[str], spans: Collection[float]) -> bool:
    """Return whether a time is one of `spans`, in minutes, away from one of `times`, on a twelve-hour clock."""
    for start in times:
        ahead = (minutes_of(stated) - minutes_of(start)) % 720
        if ahead in {span % 720 for span in spans} or 720 - ahead in spans:
            return True
    return False
