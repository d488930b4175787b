"""Estimates from simulated traffic: kept by the draw or by a tail rule, scored by a share under a budget that moves.

The draws are the gateway's own (`gateway.tracing.sampling`). The traffic has what makes plain means wrong: failing
conversations are kept more often, long ones fail more often, and the budget is short when most of them fail.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from random import Random
from statistics import fmean, stdev
from typing import NamedTuple

import pytest

from gateway.quality.estimates import Estimate, estimate_mean, estimate_share, weighted_sums
from gateway.tracing.sampling import decide, draw, keep_session


class Turn(NamedTuple):
    """One run, and what a scorer would say of it."""

    passed: bool
    grade: int
    rules: tuple[str, ...]


Conversation = list[Turn]
Day = list[tuple[float, Conversation]]
"""Conversations, each with the share of the day that was over when it began."""


def traffic(sessions: int, failing: float, caught: float) -> Day:
    """Return a day.

    Args:
        sessions: how many.
        failing: share of them that something is wrong with.
        caught: probability with which a turn that fails meets a tail rule.
    """
    chance = Random(1)
    times = [number / sessions for number in range(sessions)]
    # More fails towards the end of the day, in long conversations, and after their first turn.
    return [(time, conversation(chance, chance.random() < failing * (0.5 + time), caught)) for time in times]


def conversation(chance: Random, failing: bool, caught: float) -> Conversation:
    """Return one conversation."""
    turns = []
    for position in range(chance.randint(2, 6) if failing else chance.randint(1, 4)):
        failed = chance.random() < (0.6 if failing and position else 0.01)
        rules = ("error",) if failed and chance.random() < caught else ()
        if chance.random() < 0.02:
            rules += ("slow",)
        turns.append(Turn(not failed, chance.choice((1, 2, 4) if failed else (3, 4, 5, 5)), rules))
    return turns


SHARE = 0.7


def budget(time: float) -> float:
    """Return the factor by which the budget lowers the share: it falls in the course of the day."""
    return 1.0 - 0.7 * time


class Scored(NamedTuple):
    """A score that was made."""

    session: str
    kept: float
    """Probability with which conversations like this one are kept."""
    taken: float
    """Probability with which the scorer took this turn of it."""
    turn: Turn


def score(day: Day, rate: float, key: bytes) -> list[Scored]:
    """Return the scores of a day, as this key's draws have it.

    The probability is that of the conversation's outcome, for all of its turns (`gateway.tracing.sampling`).
    """
    scores = []
    for number, (time, turns) in enumerate(day):
        session = f"s-{number}"
        rules = [rule for turn in turns for rule in turn.rules]
        decision = decide(drawn=keep_session(key, session, rate), rate=rate, rules=rules)
        if not decision.kept:
            continue
        taken = SHARE * budget(time)
        scores += [
            Scored(session, decision.probability, taken, turn)
            for position, turn in enumerate(turns)
            if draw(key, "scorer", "a_scorer", f"{session}/{position}") < taken
        ]
    return scores


def right(each: Scored) -> float:
    """Return the probability with which a score exists."""
    return each.kept * each.taken


def shares(scores: list[Scored], probability: Callable[[Scored], float] = right) -> Estimate:
    """Return the estimated pass share."""
    return estimate_share(weighted_sums((each.session, probability(each), each.turn.passed) for each in scores))


def grades(scores: list[Scored]) -> Estimate:
    """Return the estimated mean grade."""
    seen = [each.turn.grade for each in scores]
    sums = weighted_sums((each.session, right(each), each.turn.grade) for each in scores)
    return estimate_mean(sums, min(seen), max(seen))


def key(number: int) -> bytes:
    """Return one of many deployments' keys."""
    return number.to_bytes(32, "big")


def truth(day: Day) -> tuple[float, float]:
    """Return the pass share and the mean grade of all turns."""
    turns = [turn for _, conversation in day for turn in conversation]
    return fmean(turn.passed for turn in turns), fmean(turn.grade for turn in turns)


def holds(estimate: Estimate, truth: float) -> bool:
    """Whether the estimate's interval, which must be there, holds the truth."""
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


def errors_off(values: list[float], truth: float) -> float:
    """Return by how many of its standard errors the mean of the values is off."""
    return (fmean(values) - truth) / (stdev(values) / math.sqrt(len(values)))


def values(estimates: Iterable[Estimate]) -> list[float]:
    """Return the values, of which each must be there."""
    found = [estimate.value for estimate in estimates]
    assert None not in found
    return [value for value in found if value is not None]


DAY = traffic(1000, failing=0.15, caught=0.6)
RATE = 0.2


@pytest.fixture(scope="module")
def rounds() -> list[list[Scored]]:
    """The scores of one day, as many draws would have it."""
    return [score(DAY, RATE, key(number)) for number in range(150)]


def test_estimates_are_unbiased_and_plain_means_are_not(rounds: list[list[Scored]]) -> None:
    """Over many draws on one day's traffic, estimates are right on average; plain shares and means are far off."""
    pass_share, grade = truth(DAY)

    weighted = values(map(shares, rounds))
    plain = [fmean(each.turn.passed for each in scores) for scores in rounds]

    assert abs(errors_off(weighted, pass_share)) < 4
    assert abs(errors_off(values(map(grades, rounds)), grade)) < 4
    assert errors_off(plain, pass_share) < -40
    assert errors_off([fmean(each.turn.grade for each in scores) for scores in rounds], grade) < -40
    # Not a matter of significance alone: to who reads the page it would be another agent.
    assert abs(fmean(weighted) - pass_share) < 0.005
    assert pass_share - fmean(plain) > 0.05


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(lambda each: each.kept, id="without the budget"),
        pytest.param(lambda each: each.taken, id="without the sampling"),
    ],
)
def test_wrong_probabilities_are_noticed(rounds: list[list[Scored]], wrong: Callable[[Scored], float]) -> None:
    """Estimates are off if a part of the probability is left out."""
    assert abs(errors_off(values(shares(scores, wrong) for scores in rounds), truth(DAY)[0])) > 8


def days(endless: Day, count: int, sessions: int, rate: float) -> Iterator[list[Scored]]:
    """Give the scores of days that are draws from endless traffic."""
    for number in range(count):
        day = sorted(Random(number).choices(endless, k=sessions), key=lambda each: each[0])
        yield score(day, rate, key(number))


@pytest.mark.parametrize("caught", [0.0, 0.6, 1.0])
def test_intervals_hold_the_truth_as_often_as_they_say(caught: float) -> None:
    """On 92 to 97 of 100 days the intervals hold what the agent is like, whether tail rules see its failures or not."""
    endless = traffic(20_000, failing=0.2, caught=caught)
    pass_share, grade = truth(endless)
    count = 400

    hits = [
        (holds(shares(scores), pass_share), holds(grades(scores), grade)) for scores in days(endless, count, 400, 0.4)
    ]

    for hit in zip(*hits, strict=True):
        assert 0.92 <= sum(hit) / count <= 0.97


@pytest.mark.parametrize("caught", [0.0, 0.5, 1.0])
def test_rare_failures_are_not_taken_for_none(caught: float) -> None:
    """Where hardly a failing conversation is seen, intervals are too wide rather than too narrow."""
    endless = traffic(20_000, failing=0.03, caught=caught)
    pass_share, _ = truth(endless)
    count = 100

    hits = [holds(shares(scores), pass_share) for scores in days(endless, count, 500, 0.2)]

    assert sum(hits) / count >= 0.93
