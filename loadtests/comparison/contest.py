"""All contestants under the same load, in turn, several rounds.

They are all started first and then measured in short turns, so that what is compared is seconds apart: how fast the
machine is changes within minutes. Who is not measured has nothing to do.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from .contestants import Contestant, ModelKind, Running
from .load import Load
from .processes import Shared

SETTLE_S = 0.5
"""After the load, until the processor time is read: the gateway hands its last traces over within 100 ms."""
_POLL_S = 1.0
_STILL_S = 15.0


@dataclass(frozen=True)
class Sample:
    """One contestant under load, once."""

    contestant: str
    model: ModelKind
    round: int
    requests: int
    """Good answers."""
    failures: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    """Processor time a request of the process that serves."""
    peak_rss_mb: float
    """Most memory that the process had at once since its start."""
    stored: int | None
    """Distinct trace ids among the answers' that MLflow has in the end; ``None``: it is not to store any."""
    drain_s: float | None
    """Seconds after the load until the last of them was there."""
    disturbed_share: float
    """Share of the time that the serving core spent on anything else: other work on the machine, or its host."""

    @property
    def stored_share(self) -> float | None:
        """Share of the requests whose trace was stored."""
        return None if self.stored is None else self.stored / max(self.requests, 1)


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float
    """Of each measurement."""
    warm_up_s: float
    """Load before it, which is not counted."""
    connections: int
    drain_limit_s: float
    """How long the traces are waited for."""
    arrivals_per_s: float = 100.0
    """Requests a second where they arrive at random."""

    def load(self, **changes: Any) -> Load:
        """Return the load of a measurement."""
        return replace(Load(seconds=self.seconds, connections=self.connections), **changes)


def contest(
    shared: Shared,
    contestants: Iterable[Contestant],
    models: Iterable[ModelKind],
    plan: Plan,
    tell: Callable[[str], None],
) -> list[Sample]:
    """Measure each contestant in each round; the order turns by one from round to round."""
    samples, entrants = [], list(contestants)
    for model in models:
        with ExitStack() as stack:
            running = {each.name: stack.enter_context(each.running(shared, model)) for each in entrants}
            for each in entrants:
                _warm_up(shared, each, running[each.name], plan)
            for number in range(plan.rounds):
                first = number % len(entrants)
                for each in [*entrants[first:], *entrants[:first]]:
                    sample = measure(shared, each, running[each.name], model, plan, number + 1)
                    tell(f"round {number + 1}, model {model}, {each.title}: {_brief(sample)}")
                    samples.append(sample)
    return samples


def _warm_up(shared: Shared, contestant: Contestant, running: Running, plan: Plan) -> None:
    outcome = running.load(plan.load(seconds=plan.warm_up_s))
    if contestant.stores_traces:
        drain(shared, outcome.trace_ids, time.monotonic(), plan.drain_limit_s)


def measure(
    shared: Shared, contestant: Contestant, running: Running, model: ModelKind, plan: Plan, number: int
) -> Sample:
    """Put a contestant that runs under load, and wait for its traces."""
    began, cpu_s, busy_s = time.monotonic(), running.child.cpu_s(), running.child.core_busy_s()
    outcome = running.load(plan.load())
    ended = time.monotonic()
    time.sleep(SETTLE_S)
    cpu_s = running.child.cpu_s() - cpu_s
    others_s = running.child.core_busy_s() - busy_s - cpu_s
    stored, drain_s = (None, None)
    if contestant.stores_traces:
        stored, drain_s = drain(shared, outcome.trace_ids, ended, plan.drain_limit_s)
    good = len(outcome.latencies_s)
    return Sample(
        contestant=contestant.name,
        model=model,
        round=number,
        requests=good,
        failures=outcome.failures,
        requests_per_s=good / outcome.took_s,
        p50_ms=outcome.percentile_ms(0.5),
        p99_ms=outcome.percentile_ms(0.99),
        cpu_ms=cpu_s * 1000 / max(good, 1),
        peak_rss_mb=running.child.peak_rss_mb(),
        stored=stored,
        drain_s=drain_s,
        disturbed_share=max(0.0, others_s) / (ended + SETTLE_S - began),
    )


def drain(shared: Shared, trace_ids: list[str], ended: float, limit_s: float) -> tuple[int, float]:
    """Wait until all traces are stored, or none came for a while, or the limit; return how many are, and since when.

    Args:
        shared: knows MLflow's tables.
        trace_ids: what the clients were told; the same id twice is one trace.
        ended: when the load ended, monotonic seconds.
        limit_s: seconds from then.
    """
    distinct = sorted(set(trace_ids))
    stored, changed = -1, ended
    while True:
        found = shared.stored(distinct)
        now = time.monotonic()
        if found != stored:
            stored, changed = found, now
        if stored == len(distinct) or now - changed > _STILL_S or now - ended > limit_s:
            return stored, changed - ended
        time.sleep(_POLL_S)


@dataclass(frozen=True)
class Summary:
    """The medians of one contestant's rounds."""

    contestant: str
    model: ModelKind
    rounds: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    peak_rss_mb: float
    requests: int
    """Of all rounds."""
    failures: int
    """Of all rounds."""
    stored_share: float | None
    """Of all rounds."""
    drain_s: float | None
    disturbed_share: float

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)


def summaries(samples: list[Sample]) -> dict[tuple[ModelKind, str], Summary]:
    """Return the medians by model and contestant."""
    groups: dict[tuple[ModelKind, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.model, sample.contestant), []).append(sample)
    return {key: _summary(group) for key, group in groups.items()}


def _summary(group: list[Sample]) -> Summary:
    requests = sum(each.requests for each in group)
    stored = [each.stored for each in group if each.stored is not None]
    drains = [each.drain_s for each in group if each.drain_s is not None]

    def median(name: str) -> float:
        return float(statistics.median(getattr(each, name) for each in group))

    return Summary(
        contestant=group[0].contestant,
        model=group[0].model,
        rounds=len(group),
        requests_per_s=median("requests_per_s"),
        p50_ms=median("p50_ms"),
        p99_ms=median("p99_ms"),
        cpu_ms=median("cpu_ms"),
        peak_rss_mb=median("peak_rss_mb"),
        requests=requests,
        failures=sum(each.failures for each in group),
        stored_share=sum(stored) / max(requests, 1) if stored else None,
        drain_s=statistics.median(drains) if drains else None,
        disturbed_share=median("disturbed_share"),
    )


def _brief(sample: Sample) -> str:
    traces = "" if sample.stored is None else f", {sample.stored} of {sample.requests} traces stored"
    failures = f", {sample.failures} FAILURES" if sample.failures else ""
    return f"{sample.requests_per_s:.0f} requests/s, {sample.cpu_ms:.2f} ms CPU a request{traces}{failures}"
