"""The judges' budget: what is spent stays within it, evenly, and the share comes back."""

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import pairwise

import pytest

from gateway.evaluation.judging.budget import Budget, Spent, judged_share, used

NOON = datetime(2026, 3, 5, 12, tzinfo=UTC)
MIDNIGHT = NOON.replace(hour=0)
HOURLY = Budget(usd_per_hour=10.0)
DAILY = Budget(usd_per_day=240.0)


@dataclass
class Simulation:
    """Judging at a demand that is given as a multiple of the budget's pace (USD 10 an hour)."""

    budget: Budget
    demand: Callable[[timedelta], float]
    step_s: float = 4.0
    waiting_s: float = 12.0
    """From the decision to judge until the calls leave."""
    billing_s: float = 4.0
    """From then until all workers know what they took."""
    noise: random.Random = field(default_factory=lambda: random.Random(7))
    begin: datetime = NOON
    hours: dict[datetime, Spent] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)

    def run(self, hours: float) -> "Simulation":
        """Let time pass."""
        waiting, unknown = (deque([0.0] * round(each / self.step_s)) for each in (self.waiting_s, self.billing_s))
        for step in range(round(hours * 3600 / self.step_s)):
            passed = timedelta(seconds=step * self.step_s)
            now = self.begin + passed
            share = judged_share(self.budget, self.hours, now)
            self.shares.append(share)
            # Calls come by chance and cost differently: a gamma of mean 1 for the sum of some of them.
            chance = self.noise.gammavariate(4.0, 0.25)
            waiting.append(self.demand(passed) * share * chance * 10.0 * self.step_s / 3600)
            leaving = waiting.popleft()
            unknown.append(leaving if used(self.budget, self.hours, now) < 1.0 else 0.0)
            self._spend(now, unknown.popleft())
        return self

    def share_at(self, minutes: float) -> float:
        """The share after so many minutes."""
        return self.shares[int(minutes * 60 / self.step_s)]

    def _spend(self, now: datetime, usd: float) -> None:
        hour = now.replace(minute=0, second=0, microsecond=0)
        self.hours[hour] = self.hours.get(hour, Spent()) + Spent(usd, int(usd * 1000))


@pytest.mark.parametrize("demand", [1.5, 10.0, 100.0])
def test_steady_demand(demand):
    """Where judging all would cost a multiple of the budget, each hour spends 90 to 105 % of it, at a steady share."""
    simulation = Simulation(HOURLY, lambda _: demand).run(2)
    assert all(9.0 <= spent.usd <= 10.5 for spent in simulation.hours.values())
    settled = simulation.shares[int(1.2 * 3600 / 4) :]
    minutes = [sum(settled[begin : begin + 15]) / 15 for begin in range(0, len(settled) - 15, 15)]
    assert all(0.6 * 0.95 / demand <= share <= 1.5 * 0.95 / demand for share in minutes)


def test_new_hour_does_not_begin_with_a_burst():
    """At steady demand the share is about the same before and after an hour changes."""
    simulation = Simulation(HOURLY, lambda _: 50.0).run(2.1)
    assert simulation.share_at(121) < 1.5 * simulation.share_at(118)


def test_low_demand_is_judged_whole():
    """While judging everything keeps within the pace, the share is 1."""
    simulation = Simulation(HOURLY, lambda _: 0.8).run(2)
    assert sum(share > 0.99 for share in simulation.shares) > 0.95 * len(simulation.shares)


@pytest.mark.parametrize("at_minute", [0, 30, 55])
def test_bursts_stay_within_the_budget(at_minute):
    """A burst of five minutes out of silence, early or late in the hour, never takes more than 105 % of the budget."""

    def burst(passed: timedelta) -> float:
        return 40.0 if at_minute <= passed.total_seconds() / 60 % 60 < at_minute + 5 else 0.0

    simulation = Simulation(HOURLY, burst).run(2)
    assert all(spent.usd <= 10.5 for spent in simulation.hours.values())


def test_share_recovers_after_a_burst():
    """Some minutes after a burst has ended, everything is judged again."""
    simulation = Simulation(HOURLY, lambda passed: 30.0 if passed < timedelta(minutes=10) else 0.5).run(1)
    assert simulation.share_at(9) < 0.1
    assert simulation.share_at(30) > 0.99


def test_share_falls_without_a_cliff():
    """As spending runs ahead of its pace, no small amount takes much of the share away."""
    spendings = [Spent(4.75 + cents / 100) for cents in range(500)]
    shares = [judged_share(HOURLY, {NOON: spent}, NOON + timedelta(minutes=30)) for spent in spendings]
    assert shares[0] == 1.0
    assert all(before >= after and before - after < 0.1 for before, after in pairwise(shares))


def test_used_up_is_used_up():
    """At 100 % of a budget nothing is judged, whatever the time."""
    assert judged_share(HOURLY, {NOON: Spent(10.0)}, NOON + timedelta(minutes=59, seconds=59)) == 0.0
    assert used(HOURLY, {NOON: Spent(10.0)}, NOON + timedelta(minutes=59)) == 1.0


def test_tightest_budget_decides():
    """Of several budgets the one that is most ahead of its pace gives the share, be it money or tokens."""
    spent = {NOON: Spent(usd=5.0, tokens=5_000)}
    now = NOON + timedelta(minutes=30)
    shares = [
        judged_share(budget, spent, now)
        for budget in (
            Budget(usd_per_hour=100.0),
            Budget(tokens_per_hour=10_000),
            Budget(usd_per_hour=100.0, tokens_per_hour=10_000),
        )
    ]
    assert shares == [1.0, shares[1], shares[1]]
    assert 0.0 < shares[1] < 1.0


def test_day_keeps_within_its_budget():
    """A daily budget holds over three days of a steady demand of five times as much, and is used."""
    simulation = Simulation(
        DAILY, lambda _: 5.0, step_s=60, waiting_s=60, billing_s=60, begin=NOON.replace(hour=0)
    ).run(72)
    days = [sum(spent.usd for hour, spent in simulation.hours.items() if hour.day == day) for day in (5, 6, 7)]
    assert all(0.9 * 240 <= day <= 1.05 * 240 for day in days)


def test_quiet_night_pays_for_the_day():
    """What a quiet night left of a daily budget may be spent in the day."""

    def working_hours(passed: timedelta) -> float:
        return 3.0 if 8 <= passed.total_seconds() / 3600 % 24 < 18 else 0.0

    simulation = Simulation(
        DAILY, working_hours, step_s=60, waiting_s=60, billing_s=60, begin=NOON.replace(hour=0)
    ).run(24)
    assert simulation.share_at(9 * 60) == 1.0
    assert 0.65 * 240 <= sum(spent.usd for spent in simulation.hours.values()) <= 1.05 * 240


def test_lowered_budget_is_no_punishment():
    """A budget that is lowered while much is spent judges again in the next hour, not when all is paid back."""
    hours = {NOON - timedelta(hours=1): Spent(100.0)}
    assert judged_share(HOURLY, hours, NOON + timedelta(minutes=15)) == 1.0


def test_no_budget_judges_everything():
    """Without a budget the share is 1, whatever was spent."""
    assert judged_share(Budget(), {NOON: Spent(1e9, 10**15)}, NOON) == 1.0


def test_budget_of_nothing_judges_nothing():
    """A budget of 0 allows nothing from the first second on."""
    assert judged_share(Budget(usd_per_day=0.0), {}, NOON) == 0.0
