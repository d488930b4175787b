"""What a person means by ``since``: in commands and in queries."""

import re
from datetime import UTC, datetime, timedelta

SINCE_FORMS = "a time as 2026-01-31T08:00:00Z (ISO 8601), or how long ago as 90s, 15m, 24h or 7d"
"""What `parse_since` takes, in words."""

_AGO = re.compile(r"(\d{1,9})([smhd])", re.ASCII)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def parse_since(text: str, now: datetime) -> datetime | None:
    """Return the time that a person means, in UTC; ``None`` if it has none of `SINCE_FORMS`.

    A time without a zone is taken for UTC.
    """
    try:
        if ago := _AGO.fullmatch(text.strip()):
            return now - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        time = datetime.fromisoformat(text.strip())
        return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError):
        return None
