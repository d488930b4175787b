"""Sampling: which conversations are kept, and why, is a pure function of settings, session and outcome."""

import math
from itertools import pairwise

import pytest

from gateway.rules import AgentRule
from gateway.settings import Settings
from gateway.tracing.sampling import decide, draw, keep_session, rate_of, rules_met
from gateway.tracing.spans import Outcome

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


QUIET = Outcome(failed=False, tool_failed=False, guardrail_tripped=False, duration_s=0.5)


def settings(**values: object) -> Settings:
    """Return settings; keyword arguments override."""
    return Settings(**values)  # type: ignore[arg-type]


def test_an_agent_may_have_a_rate_of_its_own():
    """An agent's own rate counts, also if it is 0; the others have the common one."""
    rules = {"math": AgentRule(sample_rate=0.0), "support": AgentRule(slow_s=3.0)}
    common = settings(sample_rate=0.25, agents=rules)
    assert [rate_of(common, name) for name in ("math", "support", "clerk")] == [0.0, 0.25, 0.25]


@pytest.mark.parametrize(
    ("outcome", "asked", "met"),
    [
        (QUIET, False, ()),
        (QUIET._replace(failed=True), False, ("error",)),
        (QUIET._replace(tool_failed=True), False, ("tool_error",)),
        (QUIET._replace(guardrail_tripped=True), False, ("guardrail",)),
        (QUIET._replace(duration_s=29.999), False, ()),
        (QUIET._replace(duration_s=30.0), False, ("slow",)),
        (QUIET, True, ("asked",)),
        (Outcome(failed=True, tool_failed=True, guardrail_tripped=False, duration_s=31.0), True,
         ("error", "tool_error", "slow", "asked")),
    ],
)  # fmt: skip
def test_tail_rules(outcome, asked, met):
    """A turn meets exactly the rules that its outcome says."""
    assert rules_met(settings(), "math", outcome, asked=asked) == met


def test_only_the_rules_that_are_set_count():
    """A rule that is not among the settings is met by nothing."""
    everything = Outcome(failed=True, tool_failed=True, guardrail_tripped=True, duration_s=1e6)
    assert rules_met(settings(tail_rules=("guardrail",)), "math", everything, asked=True) == ("guardrail",)
    assert rules_met(settings(tail_rules=()), "math", everything, asked=True) == ()


def test_an_agent_may_have_a_bound_of_its_own():
    """What is slow for one agent need not be for another."""
    rules = settings(agents={"math": AgentRule(slow_s=1.0)})
    turn = QUIET._replace(duration_s=1.0)
    assert rules_met(rules, "math", turn, asked=False) == ("slow",)
    assert rules_met(rules, "support", turn, asked=False) == ()


@pytest.mark.parametrize(
    ("drawn", "rules", "decision"),
    [
        (False, (), (False, (), 0.1)),
        (True, (), (True, ("sampled",), 0.1)),
        (False, ("error",), (True, ("error",), 1.0)),
        (True, ("error", "slow", "error"), (True, ("sampled", "error", "slow"), 1.0)),
    ],
)
def test_the_probability_is_one_of_the_outcome(drawn, rules, decision):
    """Whoever meets a tail rule has probability 1, also if the draw had kept it; else it is the pinned rate."""
    assert decide(drawn=drawn, rate=0.1, rules=rules) == decision


@pytest.mark.parametrize("rate", [0.05, 0.3])
def test_weighting_by_the_probability_gives_the_whole_traffic(rate):
    """One in ten fails and all of those are kept: counts weighted by inverse probability are those of all sessions."""
    failing = {session for number, session in enumerate(SESSIONS) if number % 10 == 0}
    kept_ones = {
        session: decision
        for session in SESSIONS
        if (
            decision := decide(
                drawn=keep_session(KEY, session, rate), rate=rate, rules=["error"] if session in failing else []
            )
        ).kept
    }
    assert failing <= set(kept_ones)
    well = sum(1 / decision.probability for session, decision in kept_ones.items() if session not in failing)
    assert sum(1 / kept_ones[session].probability for session in failing) == len(failing)
    spread = math.sqrt(0.9 * len(SESSIONS) * (1 - rate) / rate)  # of the Horvitz-Thompson estimate of a count
    assert abs(well - 0.9 * len(SESSIONS)) <= 5 * spread
    assert len(kept_ones) < (0.1 + 0.9 * rate) * len(SESSIONS) + 5 * math.sqrt(len(SESSIONS))
