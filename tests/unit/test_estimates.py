"""Estimates: weights, sessions as clusters, intervals, and when there is not enough data."""

import math
import random
from collections.abc import Iterable
from statistics import mean, stdev

import pytest

from gateway.quality.estimates import NEEDED_N, Estimate, estimate_mean, estimate_share, weighted_sums

Scores = list[tuple[str, float, float]]


def alone(values: Iterable[float], probability: float = 1.0, prefix: str = "s") -> Scores:
    """Return scores of sessions with one turn each."""
    return [(f"{prefix}-{number}", probability, value) for number, value in enumerate(values)]


def share_of(scores: Scores) -> Estimate:
    """Return the estimated share."""
    return estimate_share(weighted_sums(scores))


def mean_of(scores: Scores) -> Estimate:
    """Return the estimated mean."""
    seen = [value for _, _, value in scores]
    return estimate_mean(weighted_sums(scores), min(seen, default=0.0), max(seen, default=0.0))


def ends(estimate: Estimate) -> tuple[float, float]:
    """Return both ends of the interval."""
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def width(estimate: Estimate) -> float:
    """Return how wide the interval is."""
    low, high = ends(estimate)
    return high - low


def test_kept_failures_weigh_no_more_than_they_should() -> None:
    """All of 20 failures and a tenth of 980 passes are the share of the traffic, not that of what was scored."""
    estimate = share_of(alone([0] * 20, 1.0, "failed") + alone([1] * 98, 0.1, "passed"))

    assert estimate.value == pytest.approx(0.98)
    assert (estimate.count, estimate.sessions) == (118, 118)
    assert estimate.effective_n == pytest.approx(1000**2 / (20 + 98 * 100))


def test_even_weights_give_wilsons_interval() -> None:
    """With sessions of one turn and even weights the interval is Wilson's, whatever the weight is."""
    # 90 of 100, with t for 99 degrees of freedom in place of 1.96: by hand from Wilson's formula.
    expected = (0.8247, 0.9450)
    scores = [0] * 10 + [1] * 90

    assert ends(share_of(alone(scores))) == pytest.approx(expected, abs=0.001)
    assert ends(share_of(alone(scores, 0.01))) == pytest.approx(ends(share_of(alone(scores))))


@pytest.mark.parametrize("passed", [0, 1])
def test_nothing_but_one_verdict_is_no_certainty(passed: int) -> None:
    """Where every score passed, or none did, the interval is that of as many sessions as the weights are worth."""
    estimate = share_of(alone([passed] * 50, 0.5) + alone([passed] * 50, 0.05, "rare"))

    n = (50 * 2 + 50 * 20) ** 2 / (50 * 4 + 50 * 400)
    t = 2.003  # Student's, for n - 1 degrees of freedom
    assert estimate.effective_n == pytest.approx(n)
    assert estimate.value == passed
    assert width(estimate) == pytest.approx((t * t / n) / (1 + t * t / n), rel=0.02)


def test_verdicts_mirror_each_other() -> None:
    """The interval of those that failed is that of those that passed, seen from the other end."""
    scores = alone([0, 1, 1, 0, 1] * 12, 0.3) + alone([0] * 5, 1.0, "kept")

    low, high = ends(share_of(scores))
    mirrored = ends(share_of([(session, probability, 1 - value) for session, probability, value in scores]))

    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_turns_of_a_session_are_not_independent() -> None:
    """Ten turns that all say the same tell as much as one: the interval is that of the sessions."""
    verdicts = [0, 1, 1, 1] * 25
    repeated = [(f"s-{number}", 1.0, value) for number, value in enumerate(verdicts) for _ in range(10)]

    once, tenfold = share_of(alone(verdicts)), share_of(repeated)

    assert tenfold.value == once.value
    assert tenfold.effective_n == pytest.approx(once.effective_n) == 100
    assert ends(tenfold) == pytest.approx(ends(once))


def test_turns_that_differ_tell_more_than_their_sessions() -> None:
    """Where turns of a session are not alike, the interval is narrower than that of the sessions alone."""
    verdicts = random.Random(1).choices([0, 1], [1, 3], k=1000)
    sessions = [(f"s-{number % 100}", 1.0, float(value)) for number, value in enumerate(verdicts)]

    assert width(share_of(sessions)) < 0.5 * width(share_of(alone(verdicts[:100])))


def test_a_few_heavy_scores_are_not_enough() -> None:
    """However many scores there are, a few that stand for most of the traffic are not enough data."""
    estimate = share_of(alone([1] * 1000) + alone([1] * 10, 0.001, "heavy"))

    assert estimate.count == 1010
    assert estimate.effective_n < NEEDED_N
    assert (estimate.value, estimate.low, estimate.high) == (None, None, None)


@pytest.mark.parametrize("estimate", [share_of, mean_of])
def test_the_bound_is_on_sessions(estimate) -> None:
    """Thirty sessions are enough, 29 are not, and a thousand turns of one session are not either."""
    assert estimate(alone([0, 1] * 15)).value == 0.5
    assert estimate(alone([0, 1] * 14 + [1])).value is None
    assert estimate([("s-1", 1.0, 0.0), ("s-1", 1.0, 1.0)] * 500).value is None
    assert estimate([]).value is None
    assert estimate([]).effective_n == 0


def test_even_weights_give_about_students_interval() -> None:
    """With many sessions of one turn and even weights the mean's interval is the one of every textbook."""
    chance = random.Random(2)
    values = [chance.gauss(3.5, 0.8) for _ in range(400)]

    estimate = mean_of(alone(values, 0.25))

    half = 1.966 * stdev(values) / math.sqrt(400)  # Student's t for 399 degrees of freedom
    assert estimate.value == pytest.approx(mean(values))
    assert ends(estimate) == pytest.approx((mean(values) - half, mean(values) + half), abs=0.1 * half)


def test_grades_are_treated_as_shares_of_their_span() -> None:
    """Grades at both ends of a scale have the interval of the share that they are, on that scale."""
    grades = mean_of(alone([1] * 8 + [5] * 52, 0.3))
    low, high = ends(share_of(alone([0] * 8 + [1] * 52, 0.3)))

    assert ends(grades) == pytest.approx((1 + 4 * low, 1 + 4 * high))


@pytest.mark.parametrize("value", [0.0, 0.1, 5.0, -1e9])
def test_values_that_are_all_alike_have_no_interval(value: float) -> None:
    """The spread of values that are all alike is not known, so nothing is claimed of it."""
    estimate = mean_of([(f"s-{number % 40}", 0.3, value) for number in range(100)])

    assert estimate.value == pytest.approx(value)
    assert (estimate.low, estimate.high) == (None, None)


def test_ends_are_shares_and_hold_the_estimate() -> None:
    """Whatever the weights and verdicts: 0 <= low <= share <= high <= 1, and the interval has a width."""
    chance = random.Random(3)
    for _ in range(300):
        pass_share = chance.choice([0.0, 0.001, 0.5, 0.97, 1.0])
        scores = [
            (f"s-{chance.randrange(200)}", chance.choice([1.0, 0.7, 0.1, 0.003]), float(chance.random() < pass_share))
            for _ in range(chance.randrange(100, 600))
        ]
        estimate = share_of(scores)
        if estimate.value is None:
            continue
        low, high = ends(estimate)
        assert 0 <= low <= estimate.value <= high <= 1
        assert low < high
