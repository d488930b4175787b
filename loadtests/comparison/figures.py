"""The figures that have targets. Some are ratios of the contest, the others take a load of their own.

Each load of its own is measured in as many rounds as the contest, both sides of a ratio in turn in each round, and the
figure is the median of the rounds' ratios: what else the machine does then weighs on both sides.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal
from uuid import uuid4

from .contest import SETTLE_S, Plan, Summary
from .contestants import AGENT_SERVER, AUTOLOG, BARE, LITESTAR, TRACED, UNTRACED, ModelKind, Running, body
from .load import Bodies, Load, Outcome
from .processes import Shared

Tell = Callable[[str], None]
HISTORY_TURNS = 20
"""Earlier turns that a run sees: the gateway's default."""
_LONG, _SHORT = 1000, 20
_ITEMS_A_TURN = 4
_HISTORY_ITEMS = 100
_ARRIVALS_PER_S = 100
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


def from_contest(found: dict[tuple[ModelKind, str], Summary]) -> list[Figure]:
    """Return the figures that compare contestants; the target is for the model in the process, if that was run."""
    models = sorted({model for model, _ in found}, key=lambda model: model == "http")
    figures = []
    for name, unit, bound, target, value in _RATIOS:
        values = {model: value(model, found) for model in models}
        known = {model: each for model, each in values.items() if each is not None}
        if known:
            first, *others = known.items()
            details = [f"model {first[0]}", *(f"model {model}: {each[0]:.2f} {unit}".strip() for model, each in others)]
            details += [line for _, (_, lines) in known.items() for line in lines]
            figures.append(Figure(name, first[1][0], unit, bound, target, details))
    return figures


_Found = dict[tuple[ModelKind, str], Summary]
_Value = tuple[float, list[str]]


def _against_autolog(model: ModelKind, found: _Found) -> _Value | None:
    ours, theirs = found.get((model, TRACED.name)), found.get((model, AUTOLOG.name))
    if ours is None or theirs is None:
        return None
    shares = f"traces stored {ours.stored_share or 0:.1%} against {theirs.stored_share or 0:.1%}"
    by_cpu = f"by CPU a request: {theirs.cpu_ms / ours.cpu_ms:.2f}"
    return ours.requests_per_s / theirs.requests_per_s, [f"model {model}: {shares}; {by_cpu}"]


def _stored(model: ModelKind, found: _Found) -> _Value | None:
    ours = found.get((model, TRACED.name))
    return None if ours is None or ours.stored_share is None else (ours.stored_share * 100, [])


def _against_untraced(model: ModelKind, found: _Found) -> _Value | None:
    traced, untraced = found.get((model, TRACED.name)), found.get((model, UNTRACED.name))
    if traced is None or untraced is None:
        return None
    extra = f"{traced.cpu_ms - untraced.cpu_ms:.2f} ms more CPU a request"
    by_cpu = f"by CPU a request: {untraced.cpu_ms / traced.cpu_ms:.2f}"
    return traced.requests_per_s / untraced.requests_per_s, [f"model {model}: {extra}; {by_cpu}"]


def _own_cpu(model: ModelKind, found: _Found) -> _Value | None:
    ours, bare = found.get((model, UNTRACED.name)), found.get((model, BARE.name))
    if ours is None or bare is None:
        return None
    others = [found.get((model, each.name)) for each in (LITESTAR, AGENT_SERVER)]
    beside = [f"{each.contestant} {each.cpu_ms - bare.cpu_ms:.2f} ms" for each in others if each]
    lines = [f"model {model}: bare loop {bare.cpu_ms:.2f} ms; over it: {', '.join(beside) or 'no others were run'}"]
    return ours.cpu_ms - bare.cpu_ms, lines


_RATIOS: list[tuple[str, str, Literal["at least", "at most"], float, Callable[[ModelKind, _Found], _Value | None]]] = [
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
    """Measure the p99 of 100 requests/s on 500 open sessions, each model call 300 ms, over the bare loop's."""
    over: dict[str, list[float]] = {TRACED.name: [], UNTRACED.name: []}
    details = [
        f"random arrivals, the same for all; {_SESSIONS} sessions, in the process's model {_THINKING_MS} ms a call"
    ]
    for number in range(plan.rounds):
        load = Load(due_s=_moments(plan.seconds, seed=number), thinking_ms=_THINKING_MS)
        with BARE.running(shared, "in-process") as bare:
            cost(bare, Load(seconds=plan.warm_up_s, connections=16))
            floor = cost(bare, load)
        for contestant in (TRACED, UNTRACED):
            with contestant.running(shared, "in-process") as gateway:
                sessions = [_session() for _ in range(_SESSIONS)]
                first = [body(session_id=each) for each in sessions]
                cost(gateway, Load(seconds=60, requests=_SESSIONS), in_turn(first))
                asked = [body(session_id=each, thinking_ms=_THINKING_MS) for each in sessions]
                ours = cost(gateway, load, in_turn(asked))
            over[contestant.name].append(ours.p99_ms - floor.p99_ms)
            line = f"{contestant.title}: p99 {ours.p99_ms:.0f} ms, bare loop {floor.p99_ms:.0f} ms"
            tell(line)
            details.append(line)
    untraced = statistics.median(over[UNTRACED.name])
    return Figure(
        f"p99 over the bare loop, {_ARRIVALS_PER_S} requests/s arriving, {_SESSIONS} open sessions",
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


def _moments(seconds: float, seed: int) -> list[float]:
    """Return random moments (a Poisson process) of 100 a second on average."""
    draw, moment, moments = random.Random(seed), 0.0, []
    while (moment := moment + draw.expovariate(_ARRIVALS_PER_S)) < seconds:
        moments.append(moment)
    return moments


def _session() -> str:
    return f"compare-{uuid4().hex}"
