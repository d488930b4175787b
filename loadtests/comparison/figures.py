"""The figures that have targets. Some are ratios of the contest, the others take a load of their own.

Each load of its own is measured in as many rounds as the contest, both sides of a ratio in turn in each round. Every
figure is the median of what compares two sides of the same round: what else the machine does weighs on both.
"""

import random
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal
from uuid import uuid4

from .contest import SETTLE_S, Plan, Sample
from .contestants import AGENT_SERVER, AUTOLOG, BARE, LITESTAR, TRACED, UNTRACED, Contestant, ModelKind, Running, body
from .load import Bodies, Load, Outcome
from .processes import Shared

Tell = Callable[[str], None]
HISTORY_TURNS = 20
"""Earlier turns that a run sees: the gateway's default."""
_LONG, _SHORT = 1000, 20
_ITEMS_A_TURN = 4
_HISTORY_ITEMS = 100
_ARRIVALS_S = 10.0  # a round at the least: the p99 of 200 requests would be the third worst of them
_SESSIONS = 500
_THINKING_MS = 300
_CROWD = 500
_CROWD_THINKING_MS = 2000  # a run then takes 4 s, so that some 125 runs/s keep 500 in flight


@dataclass(frozen=True)
class Figure:
    """One row of the table of targets."""

    name: str
    value: float
    unit: str
    bound: Literal["at least", "at most"]
    target: float
    details: list[str] = field(default_factory=list)

    @property
    def met(self) -> bool:
        """Whether the target is met; a figure that could not be measured (nan) is not."""
        return self.value >= self.target if self.bound == "at least" else self.value <= self.target


@dataclass(frozen=True)
class Cost:
    """What a load cost the process that serves."""

    cpu_ms: float
    """Processor time a request."""
    outcome: Outcome

    @property
    def p50_ms(self) -> float:
        """Median latency."""
        return self.outcome.percentile_ms(0.5)

    @property
    def p99_ms(self) -> float:
        """Latency that one request of a hundred exceeds."""
        return self.outcome.percentile_ms(0.99)


class RequestsFailedError(Exception):
    """Requests failed, so that what the load cost says nothing."""


def cost(running: Running, load: Load, bodies: Bodies | None = None) -> Cost:
    """Put a contestant under a load and return what it cost; raise `RequestsFailedError` if a request failed."""
    cpu_s = running.child.cpu_s()
    outcome = running.load(load, bodies)
    time.sleep(SETTLE_S)
    cpu_s = running.child.cpu_s() - cpu_s
    if outcome.failures:
        total = outcome.failures + len(outcome.latencies_s)
        raise RequestsFailedError(f"{outcome.failures} of {total} requests to {running.child.name} failed")
    return Cost(cpu_s * 1000 / len(outcome.latencies_s), outcome)


def in_turn(asked: list[bytes]) -> Bodies:
    """Return what gives these bodies over and over."""
    return lambda number: asked[number % len(asked)]


def from_contest(samples: list[Sample]) -> list[Figure]:
    """Return the figures that compare contestants; the target is for the model in the process, if that was run."""
    models = sorted({sample.model for sample in samples}, key=lambda model: model == "http")
    figures = []
    for name, unit, bound, target, value in _RATIOS:
        values = {model: value(_Rounds(samples, model)) for model in models}
        known = {model: each for model, each in values.items() if each is not None}
        if known:
            first, *others = known.items()
            details = [f"model {first[0]}", *(f"model {model}: {each[0]:.2f} {unit}".strip() for model, each in others)]
            details += [f"model {model}: {line}" for model, (_, lines) in known.items() for line in lines]
            figures.append(Figure(name, first[1][0], unit, bound, target, details))
    return figures


class _Rounds:
    """The samples of a contest with one kind of model. What is compared is of the same round each."""

    def __init__(self, samples: list[Sample], model: ModelKind):
        self._samples = {(each.contestant, each.round): each for each in samples if each.model == model}
        self._rounds = sorted({number for _, number in self._samples})

    def of(self, contestant: Contestant) -> list[Sample]:
        """Return a contestant's samples; none if it did not take part."""
        return [found for number in self._rounds if (found := self._samples.get((contestant.name, number)))]

    def over(
        self, ours: Contestant, theirs: Contestant, value: Callable[[Sample, Sample], float]
    ) -> tuple[float, str] | None:
        """Return the median over the rounds of what compares two contestants, and in words between what it lay."""
        pairs = list(zip(self.of(ours), self.of(theirs), strict=False))
        if not pairs:
            return None
        values = sorted(value(*pair) for pair in pairs)
        return statistics.median(values), f"{values[0]:.2f} to {values[-1]:.2f} in {len(values)} rounds"


_Value = tuple[float, list[str]]


def _requests_ratio(ours: Sample, theirs: Sample) -> float:
    return ours.requests_per_s / theirs.requests_per_s


def _cpu_ratio(ours: Sample, theirs: Sample) -> float:
    return theirs.cpu_ms / ours.cpu_ms


def _cpu_more_ms(ours: Sample, theirs: Sample) -> float:
    return ours.cpu_ms - theirs.cpu_ms


def _stored_share(samples: list[Sample]) -> float:
    return sum(each.stored or 0 for each in samples) / max(sum(each.requests for each in samples), 1)


def _against_autolog(rounds: _Rounds) -> _Value | None:
    ratio, cpu = rounds.over(TRACED, AUTOLOG, _requests_ratio), rounds.over(TRACED, AUTOLOG, _cpu_ratio)
    if ratio is None or cpu is None:
        return None
    ours, theirs = _stored_share(rounds.of(TRACED)), _stored_share(rounds.of(AUTOLOG))
    return ratio[0], [ratio[1], f"by CPU a request {cpu[0]:.2f}", f"traces stored {ours:.1%} against {theirs:.1%}"]


def _stored(rounds: _Rounds) -> _Value | None:
    ours = rounds.of(TRACED)
    return (_stored_share(ours) * 100, []) if ours else None


def _against_untraced(rounds: _Rounds) -> _Value | None:
    ratio, cpu = rounds.over(TRACED, UNTRACED, _requests_ratio), rounds.over(TRACED, UNTRACED, _cpu_ratio)
    more = rounds.over(TRACED, UNTRACED, _cpu_more_ms)
    if ratio is None or cpu is None or more is None:
        return None
    return ratio[0], [ratio[1], f"by CPU a request {cpu[0]:.2f}, {more[0]:.2f} ms more"]


def _own_cpu(rounds: _Rounds) -> _Value | None:
    more = rounds.over(UNTRACED, BARE, _cpu_more_ms)
    if more is None:
        return None
    others = [(each.name, rounds.over(each, BARE, _cpu_more_ms)) for each in (LITESTAR, AGENT_SERVER)]
    beside = ", ".join(f"{name} {found[0]:.2f} ms" for name, found in others if found)
    bare = statistics.median(each.cpu_ms for each in rounds.of(BARE))
    return more[0], [f"{more[1]}; bare loop {bare:.2f} ms; over it: {beside or 'no others were run'}"]


_RATIOS: list[tuple[str, str, Literal["at least", "at most"], float, Callable[[_Rounds], _Value | None]]] = [
    ("requests/s, traced gateway / AgentServer with autolog", "", "at least", 2.5, _against_autolog),
    ("traces stored of requests served, traced gateway", "%", "at least", 100.0, _stored),
    ("requests/s, traced / untraced, same gateway", "", "at least", 0.90, _against_untraced),
    ("gateway's own CPU a request over the bare loop, untraced", "ms", "at most", 0.5, _own_cpu),
]


def turns(shared: Shared, plan: Plan, tell: Tell) -> Figure:
    """Measure a turn of a session of 1,000 turns against one of 20, at the default history limit."""
    measured = max(40, round(plan.seconds * 20))
    each = measured // _SHORT
    ratios: list[float] = []
    latencies: list[float] = []
    with UNTRACED.running(shared, "in-process", GATEWAY_HISTORY_TURNS=str(HISTORY_TURNS)) as gateway:
        long = body(session_id=_session())
        cost(gateway, Load(seconds=600, connections=1, requests=_LONG), in_turn([long]))
        tell(f"a session has {_LONG} turns")
        for _ in range(plan.rounds):
            short = [body(session_id=_session()) for _ in range(_SHORT)]
            cost(gateway, Load(seconds=600, connections=1, requests=_SHORT * len(short)), in_turn(short))
            load = Load(seconds=600, connections=1, requests=each * _SHORT)
            young = cost(gateway, load, in_turn(short))
            old = cost(gateway, load, in_turn([long]))
            ratios.append(old.cpu_ms / young.cpu_ms)
            latencies.append(old.p50_ms / young.p50_ms)
            tell(f"a turn: {young.cpu_ms:.2f} ms after {_SHORT} turns, {old.cpu_ms:.2f} ms after {_LONG}")
    return Figure(
        "cost of a turn, 1,000-turn session / 20-turn session",
        statistics.median(ratios),
        "",
        "at most",
        1.3,
        [
            f"CPU of the web process; default history limit: {HISTORY_TURNS} turns",
            f"latency p50: {statistics.median(latencies):.2f}",
        ],
    )


def history(shared: Shared, plan: Plan, tell: Tell) -> Figure:
    """Measure a run with 100 history items over the HTTP model against one with none."""
    turns_needed = _HISTORY_ITEMS // _ITEMS_A_TURN
    ratios: list[float] = []
    details = [f"{turns_needed} turns of {_ITEMS_A_TURN} items, GATEWAY_HISTORY_TURNS={turns_needed}, tracing off"]
    with UNTRACED.running(shared, "http", GATEWAY_HISTORY_TURNS=str(turns_needed)) as gateway:
        asked = [body(session_id=_session()) for _ in range(4)]
        cost(gateway, Load(seconds=600, connections=1, requests=turns_needed * len(asked)), in_turn(asked))
        load = Load(seconds=600, connections=1, requests=max(40, round(plan.seconds * 10)))
        for _ in range(plan.rounds):
            none = cost(gateway, load, in_turn([body()]))
            full = cost(gateway, load, in_turn(asked))
            ratios.append(full.cpu_ms / none.cpu_ms)
            tell(f"a run: {none.cpu_ms:.2f} ms without history, {full.cpu_ms:.2f} ms with {_HISTORY_ITEMS} items")
            details.append(f"{none.cpu_ms:.2f} ms without, {full.cpu_ms:.2f} ms with")
    name = f"CPU of a run over the HTTP model, {_HISTORY_ITEMS} history items / none"
    return Figure(name, statistics.median(ratios), "", "at most", 2.0, details)


def arrivals(shared: Shared, plan: Plan, tell: Tell) -> Figure:
    """Measure the p99 of random arrivals on 500 open sessions, each model call 300 ms, over the bare loop's."""
    over: dict[str, list[float]] = {TRACED.name: [], UNTRACED.name: []}
    details = [
        f"random arrivals, the same for all; {_SESSIONS} sessions, in the process's model {_THINKING_MS} ms a call"
    ]
    with ExitStack() as stack:
        bare = stack.enter_context(BARE.running(shared, "in-process"))
        cost(bare, Load(seconds=plan.warm_up_s, connections=16))
        gateways = [(each, stack.enter_context(each.running(shared, "in-process"))) for each in (TRACED, UNTRACED)]
        sessions = [_session() for _ in range(_SESSIONS)]
        for _, gateway in gateways:
            first = [body(session_id=each) for each in sessions]
            cost(gateway, Load(seconds=60, requests=_SESSIONS), in_turn(first))
        asked = [body(session_id=each, thinking_ms=_THINKING_MS) for each in sessions]
        for number in range(plan.rounds):
            moments = _moments(plan.arrivals_per_s, max(plan.seconds, _ARRIVALS_S), seed=number)
            load = Load(due_s=moments, thinking_ms=_THINKING_MS)
            floor = cost(bare, load)
            for contestant, gateway in gateways:
                ours = cost(gateway, load, in_turn(asked))
                over[contestant.name].append(ours.p99_ms - floor.p99_ms)
                line = f"{contestant.title}: p99 {ours.p99_ms:.0f} ms, bare loop {floor.p99_ms:.0f} ms"
                tell(line)
                details.append(line)
    untraced = statistics.median(over[UNTRACED.name])
    return Figure(
        f"p99 over the bare loop, {plan.arrivals_per_s:g} requests/s arriving, {_SESSIONS} open sessions",
        statistics.median(over[TRACED.name]),
        "ms",
        "at most",
        50.0,
        [*details, f"with tracing off: {untraced:.1f} ms"],
    )


def crowd(shared: Shared, plan: Plan, tell: Tell) -> Figure:
    """Measure the CPU of a run while 500 are in flight against one alone."""
    ratios: dict[str, list[float]] = {UNTRACED.name: [], BARE.name: []}
    details = [f"models that think {_CROWD_THINKING_MS / 1000:g} s a call keep {_CROWD} in flight; tracing off"]
    for _ in range(plan.rounds):
        for contestant in (UNTRACED, BARE):
            with contestant.running(shared, "in-process") as running:
                cost(running, Load(seconds=plan.warm_up_s, connections=1))
                alone = cost(running, Load(seconds=plan.seconds, connections=1))
                ramp_s = 2 * _CROWD_THINKING_MS / 1000
                seconds = max(plan.seconds, 2 * ramp_s)
                load = Load(seconds=seconds, connections=_CROWD, thinking_ms=_CROWD_THINKING_MS, ramp_s=ramp_s)
                many = cost(running, load)
            ratios[contestant.name].append(many.cpu_ms / alone.cpu_ms)
            line = f"{contestant.title}: {alone.cpu_ms:.2f} ms alone, {many.cpu_ms:.2f} ms with {_CROWD}"
            tell(line)
            details.append(line)
    bare = statistics.median(ratios[BARE.name])
    return Figure(
        f"CPU of a run, {_CROWD} in flight / one in flight",
        statistics.median(ratios[UNTRACED.name]),
        "",
        "at most",
        1.3,
        [*details, f"bare loop, all on one Agent object: {bare:.2f}"],
    )


OWN_LOADS: dict[str, Callable[[Shared, Plan, Tell], Figure]] = {
    "turns": turns,
    "history": history,
    "arrivals": arrivals,
    "crowd": crowd,
}
"""Figures that take a load of their own, by the name that ``--only`` takes."""


def _moments(per_s: float, seconds: float, seed: int) -> list[float]:
    """Return random moments (a Poisson process), so many a second on average."""
    draw, moment, moments = random.Random(seed), 0.0, []
    while (moment := moment + draw.expovariate(per_s)) < seconds:
        moments.append(moment)
    return moments


def _session() -> str:
    return f"compare-{uuid4().hex}"
