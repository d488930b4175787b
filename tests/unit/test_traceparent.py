"""The W3C header `traceparent`, as its specification has it."""

import pytest

from gateway.tracing.capture.traceparent import TraceParent, parse_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (f"00-{TRACE}-{SPAN}-01", 1),
        (f" 00-{TRACE}-{SPAN}-00\t", 0),
        (f"00-{TRACE}-{SPAN}-ff", 255),
        (f"01-{TRACE}-{SPAN}-01", 1),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", 1),
    ],
)
def test_valid(header, flags):
    """A valid header is read; one of a later version as one of the first."""
    parsed = parse_traceparent(header)
    assert parsed == TraceParent(TRACE, SPAN, flags)
    assert str(parsed) == f"00-{TRACE}-{SPAN}-{flags:02x}"
    assert parsed.sampled is bool(flags & 1)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "nonsense",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"01-{TRACE}-{SPAN}-01x",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_invalid(header):
    """An invalid header is passed over."""
    assert parse_traceparent(header) is None
