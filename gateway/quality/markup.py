"""HTML that is safe by construction, and numbers as people read them.

What the page shows comes from users, models and scorers, so it is hostile until escaped: `fill` escapes every value
that is not `Html` already.
"""

from collections.abc import Iterable
from html import escape

import msgspec


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def fill(template: str, **values: object) -> Html:
    """Return ``template`` with its ``{name}`` fields filled, each value escaped unless it is `Html`."""
    escaped = {name: value if isinstance(value, Html) else escape(str(value)) for name, value in values.items()}
    return Html(template.format_map(escaped))


def join(parts: Iterable[Html]) -> Html:
    """Return the parts as one piece of HTML."""
    return Html("\n".join(parts))


NOTHING = Html("")


def count_text(number: int) -> str:
    """Return a count with its thousands set apart."""
    return f"{number:,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def percent_text(share: float | None) -> str:
    """Return a share as text; never 100 % or 0 % for what only rounds to it, since the exception is the news."""
    if share is None:
        return "\N{EN DASH}"
    percent = 100 * share
    if 0 < percent < 0.1:
        return "< 0.1 %"
    if 99.9 < percent < 100:
        return "> 99.9 %"
    return f"{percent:.0f} %" if percent in (0, 100) else f"{percent:.1f} %"


def mean_text(mean: float) -> str:
    """Return a mean as text of bounded length."""
    return f"{mean:.3f}" if abs(mean) < 1e6 else f"{mean:.3g}"


def value_text(value: object) -> str:
    """Return a score's value as text: a string as it is, anything else as JSON."""
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def shortened(text: str, max_chars: int) -> str:
    """Return the text, cut after ``max_chars`` characters with a sign that it was."""
    return text if len(text) <= max_chars else f"{text[:max_chars].rstrip()} …"


def age_text(seconds: float) -> str:
    """Return how long ago something was, in the largest fitting unit."""
    return f"{duration_text(seconds)} ago"


def duration_text(seconds: float) -> str:
    """Return a stretch of time in the largest fitting unit."""
    if seconds < 60:
        return f"{max(seconds, 0):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.0f} h"
