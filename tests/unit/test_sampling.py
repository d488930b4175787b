"""Sampling: which sessions are kept is a pure function of key, session and rate."""

import math
from itertools import pairwise

import pytest

from gateway.tracing.sampling import draw, keep_session

KEY = b"k" * 32
SESSIONS = [f"s-{number}" for number in range(20_000)]


def kept(rate: float, key: bytes = KEY) -> set[str]:
    """The sessions that are kept at this rate."""
    return {session for session in SESSIONS if keep_session(key, session, rate)}


def within(count: int, expected: float, share: float) -> bool:
    """Whether a count is within five standard deviations of a binomial's mean: one false alarm in a million."""
    return abs(count - expected) <= 5 * math.sqrt(expected * (1 - share))


def test_deterministic():
    """The same key and session give the same point in [0, 1), everywhere and always."""
    assert draw(KEY, "s-1") == draw(KEY, "s-1") == 0.05814700883688057
    assert all(0 <= draw(KEY, session) < 1 for session in SESSIONS)


def test_monotonic():
    """Raising the rate only adds sessions."""
    rates = [0.0, 0.01, 0.1, 0.5, 0.9, 1.0]
    sets = [kept(rate) for rate in rates]
    assert all(lower <= higher for lower, higher in pairwise(sets))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.25, 0.5, 0.9, 0.99])
def test_share(rate):
    """The share that is kept is the rate."""
    assert within(len(kept(rate)), rate * len(SESSIONS), rate)


def test_none_and_all():
    """Rate 0 keeps nothing, rate 1 everything."""
    assert kept(0.0) == set()
    assert len(kept(1.0)) == len(SESSIONS)


def test_keys_are_independent():
    """What one key keeps says nothing about what another keeps."""
    assert within(len(kept(0.5) & kept(0.5, b"j" * 32)), 0.25 * len(SESSIONS), 0.25)


def test_salts_are_independent():
    """Draws with two salts are independent: half of the half that one keeps is kept by the other."""
    both = sum(draw(KEY, "scorer", "a", each) < 0.5 and draw(KEY, "scorer", "b", each) < 0.5 for each in SESSIONS)
    assert within(both, 0.25 * len(SESSIONS), 0.25)


def test_parts_are_kept_apart():
    """A subject's parts do not run into each other."""
    assert draw(KEY, "ab", "c") != draw(KEY, "a", "bc")
