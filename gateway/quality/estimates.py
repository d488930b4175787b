"""Estimates of what all of the traffic is like, from the part of it that was scored: pure functions of sums.

Scores do not exist with one probability: tail rules keep every failure, shares and the budget take a part. A score
that exists with probability p stands for 1/p of the traffic, so that is its weight.

**Estimate**: the weighted mean, sum(w y) / sum(w): Hájek's ratio form of the estimator of Horvitz and Thompson (Hájek
1971, comment on Basu; Särndal, Swensson, Wretman 1992, section 5.7). Scores that were never made have no say in it,
and do not have to be known.

**Clusters**: turns of one session are kept or dropped together, and are alike. So sessions count, not scores: with
W = sum(w) and T = sum(w y) of a session, the estimate is sum(T) / sum(W), and its variance is linearised (Woodruff
1971; Särndal et al., section 5.7): m/(m-1) sum((T - estimate W)^2) / sum(W)^2 over m sessions. This takes sessions for
draws from endless traffic of this kind; the interval is for that traffic, not for this hour's alone, and where
everything was scored there still is one.

**Effective sample size**: sum(W)^2 / sum(W^2), Kish's (1965; 1992) approximation with the sessions' weights: that many
sessions of even weight tell as much, at the least. It knows nothing of what the scores say. Below `NEEDED_N` there
is no estimate; the bound is that of the standards of the US National Center for Health Statistics for proportions
(Parker et al. 2017).

**Interval of a share**: Wilson's (1927), with p(1-p)/variance in place of the sample size (Korn and Graubard 1998;
compared by Franco, Little, Louis, Slud 2019), and Student's t, with the effective sample size less one as degrees of
freedom. That ratio is worth nothing where a share is near 0 or 1: then what would move it is what has hardly been seen.
So one session more is counted as seen, of the usual weight sum(W^2) / sum(W), half of it passed and half of it failed.
With nothing but passes the ratio is then Kish's size; with many of both it is Korn's and Graubard's. (That an unseen
event of a large weight has to be allowed for is an idea of Fay and Feuer 1997; this form of it is ours, and
`tests/unit/test_unbiased.py` holds it against simulated traffic.)

**Interval of a mean**: the same, on the span from the lowest to the highest value seen in place of that from 0 to 1: a
grade of 4 among grades of 1 to 5 is three quarters of a pass. The interval of the textbooks, t sqrt(variance) to either
side, is too narrow where few sessions have most of the low values, and those are what a scorer is there for.
"""

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

import msgspec

CONFIDENCE = 0.95
"""How often an interval holds what it estimates."""
NEEDED_N = 30
"""Effective sample size from which on there is an estimate."""

_Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


class Sums(NamedTuple):
    """All that an estimate needs: sums over sessions, so a database can make them in one pass.

    W is the sum of a session's weights, T that of its weights times values (0 or 1 for a share).
    """

    scores: int
    sessions: int
    """Sessions that the scores are of."""
    weight: float
    """Sum of W."""
    total: float
    """Sum of T."""
    weight_squares: float
    """Sum of W W."""
    products: float
    """Sum of W T."""
    total_squares: float
    """Sum of T T."""

    @property
    def effective_n(self) -> float:
        """Kish's effective sample size, in sessions; 0 without scores."""
        return self.weight * self.weight / self.weight_squares if self.weight_squares > 0 else 0.0

    @property
    def residual_squares(self) -> float:
        """Sum of (T - estimate W)^2."""
        mean = self.total / self.weight
        return max(self.total_squares - 2 * mean * self.products + mean * mean * self.weight_squares, 0.0)


class Estimate(msgspec.Struct):
    """What a share or a mean is likely to be in all of the traffic."""

    value: float | None
    """``None``: not enough data, ``effective_n`` is below ``needed_n``."""
    low: float | None
    """Lower end of the 95 % interval; ``None``: not enough data, or a mean of values that are all alike."""
    high: float | None
    """Upper end, as above."""
    effective_n: float
    """Effective sample size: so many conversations of even weight tell as much, at the least."""
    needed_n: int
    """The effective sample size that an estimate takes."""
    count: int
    """Scores that it is made from."""
    sessions: int
    """Sessions that they are of."""


def weighted_sums(scores: Iterable[tuple[str, float, float]]) -> Sums:
    """Return the sums of scores, each given as session, inclusion probability (above 0, up to 1) and value."""
    weights: dict[str, float] = {}
    totals: dict[str, float] = {}
    count = 0
    for session, probability, value in scores:
        weights[session] = weights.get(session, 0.0) + 1 / probability
        totals[session] = totals.get(session, 0.0) + value / probability
        count += 1
    pairs = [(weights[session], totals[session]) for session in weights]
    return Sums(
        scores=count,
        sessions=len(pairs),
        weight=math.fsum(weight for weight, _ in pairs),
        total=math.fsum(total for _, total in pairs),
        weight_squares=math.fsum(weight * weight for weight, _ in pairs),
        products=math.fsum(weight * total for weight, total in pairs),
        total_squares=math.fsum(total * total for _, total in pairs),
    )


def estimate_share(sums: Sums) -> Estimate:
    """Return the share of values that are 1, the others being 0."""
    return estimate_mean(sums, 0.0, 1.0)


def estimate_mean(sums: Sums, lowest: float, highest: float) -> Estimate:
    """Return the mean of values, of which ``lowest`` and ``highest`` are the ends.

    Without an interval where these are the same: how much such values spread is not known.
    """
    effective_n = sums.effective_n
    estimate = Estimate(None, None, None, effective_n, NEEDED_N, sums.scores, sums.sessions)
    if effective_n < NEEDED_N:
        return estimate
    # Rounding must put neither the mean outside of its values, nor the interval beside the mean.
    mean = estimate.value = min(max(sums.total / sums.weight, lowest), highest)
    if span := highest - lowest:
        place = (mean - lowest) / span
        low, high = _wilson(place, _equivalent_n(sums, place, span), _t_quantile(effective_n - 1))
        estimate.low = min(lowest + span * max(low, 0.0), mean)
        estimate.high = max(lowest + span * min(high, 1.0), mean)
    return estimate


def _wilson(share: float, n: float, t: float) -> tuple[float, float]:
    spread = t * t / n
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return (middle - half) / (1 + spread), (middle + half) / (1 + spread)


def _equivalent_n(sums: Sums, share: float, span: float) -> float:
    """Return the size of a simple random sample whose share would vary as much, one session more being counted."""
    unseen = sums.weight / sums.effective_n
    passed, failed = sums.weight * share + unseen / 2, sums.weight * (1 - share) + unseen / 2
    unseen_squares = unseen * unseen * (share * share + (1 - share) * (1 - share)) / 2
    squares = sums.residual_squares / (span * span) * sums.sessions / (sums.sessions - 1)
    return passed * failed / (squares + unseen_squares)


def _t_quantile(degrees: float) -> float:
    """Return Student's t for `CONFIDENCE`, two-sided, by its expansion in 1/degrees (Abramowitz, Stegun 26.7.5).

    Right to 0.0002 from 29 degrees of freedom on, which is where it is used.
    """
    z = _Z
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2
