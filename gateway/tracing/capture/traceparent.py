"""The caller's place in its own trace: the W3C headers ``traceparent`` and ``tracestate``.

Contract: W3C Trace Context, level 1 (https://www.w3.org/TR/trace-context/).
"""

import re
from typing import NamedTuple

_HEADER = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_NO_VERSION = "ff"  # forbidden by the specification
_SAMPLED = 1


class TraceParent(NamedTuple):
    """What a valid ``traceparent`` says."""

    trace_id: str
    """32 hexadecimal digits, not all zero."""
    span_id: str
    """16 hexadecimal digits, not all zero: the caller's span."""
    flags: int
    """Bit 0: the caller records its trace."""

    @property
    def sampled(self) -> bool:
        """Whether the caller records its trace."""
        return bool(self.flags & _SAMPLED)

    def __str__(self) -> str:
        """Return the header that says it, in version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


def parse_traceparent(header: str | None) -> TraceParent | None:
    """Return what the header says; ``None`` if there is none, or an invalid one, which is to be passed over.

    A header of a later version is read as one of version 00, as the specification asks; only it may go on after the
    flags.
    """
    match = _HEADER.fullmatch(header.strip(" \t")) if header else None
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == _NO_VERSION or (version == "00" and more) or not (int(trace_id, 16) and int(span_id, 16)):
        return None
    return TraceParent(trace_id, span_id, int(flags, 16))
