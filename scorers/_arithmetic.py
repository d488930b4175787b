"""Whether a number, a date or a time follows from others by plain arithmetic."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import date, timedelta
from itertools import islice

from ._values import Amount

# Of many numbers almost everything follows; and the pairs of more than these take too long.
_MOST_NUMBERS = 24
# Between units: of time, of length, weight and volume; half and double; hundreds and thousands.
_FACTORS = (
    *(60.0, 24.0, 7.0, 12.0, 365.0, 3600.0, 1440.0, 52.0, 2.0, 100.0, 1000.0),
    *(1.609344, 0.45359237, 2.54, 0.3048, 28.349523, 3.785412),
)


def _unary(number: float) -> Iterator[float]:
    yield from (number * factor for factor in _FACTORS)
    yield from (number / factor for factor in _FACTORS)
    yield from (number * 9 / 5 + 32, (number - 32) * 5 / 9)


def _sums(one: float, other: float) -> Iterator[float]:
    share = one * other / 100
    yield from (one + other, one - other, one * other, share, one - share, one + share)
    yield from (first / second for first, second in ((one, other), (other, one)) if second and one != other)
    yield from (other - share, other + share)


def _rests(one: float, other: float) -> Iterator[float]:
    for first, second in ((one, other), (other, one)):
        if second and one != other:
            yield from (first // second, first - second * (first // second))


def _shares(one: float, other: float) -> Iterator[float]:
    for first, second in ((one, other), (other, one)):
        if second:
            yield from (first / second * 100, 100 - first / second * 100, first / second * 100 - 100)


def follows(stated: Amount, numbers: Sequence[float], *, steps: int = 1) -> bool:
    """Return whether `stated`, as far as it is written out, is one of the usual sums over `numbers`.

    The sums are those of one operation between two of them, a percentage, a change of unit, and the sum and mean of
    all. With two `steps` the result may go into a second operation. A percentage has to be a share of one number in
    another, or what another leaves of the whole. Signs are ignored.
    """
    known = list(islice(dict.fromkeys(abs(number) for number in numbers), _MOST_NUMBERS))
    if not known:
        return False
    tolerance = stated.step * 0.5000001 if stated.step < 1 or stated.value >= 10 else 1e-9
    low, high = stated.value - tolerance, stated.value + tolerance

    def found(results: Iterable[float]) -> bool:
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
    first = [result for pair in pairs for result in _sums(*pair)]
    if found(first) or any(found(_rests(*pair)) for pair in pairs):
        return True
    if steps < 2:
        return False
    if stated.step >= 1:  # of two operations too many come near a whole number
        low, high = stated.value - 1e-6, stated.value + 1e-6
    return any(found(_sums(result, number)) for result in dict.fromkeys(first) for number in known)


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


def minutes_of(time: str) -> int:
    """Return the minutes since twelve o'clock of a time such as "7:30"."""
    hour, _, minute = time.partition(":")
    return (int(hour) % 12) * 60 + int(minute)


def time_follows(stated: str, times: Collection[str], spans: Collection[float]) -> bool:
    """Return whether a time is so many minutes or hours from one of `times`, on a twelve-hour clock."""
    for start in times:
        ahead = (minutes_of(stated) - minutes_of(start)) % 720
        for away in (ahead, 720 - ahead):
            if away in spans or away / 60 in spans:
                return True
    return False
