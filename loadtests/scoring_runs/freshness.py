"""From the end of a response to its scores in MLflow, while requests arrive at random."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comparison.load import Outcome

from .pages import Page, seconds
from .served import ALWAYS, JUDGE, Served, judge_server, judge_settings, served
from .traffic import ask_all, moments
from .watching import POLL_S, Waits, Watch

TARGET_S = 2.0
"""The 95th percentile is to be no more, at 20 requests/s."""
WARM_UP_S = 5.0
"""Of requests that are not counted."""


@dataclass(frozen=True)
class Traffic:
    """What is asked."""

    per_s: float
    seconds: float
    limit_s: float
    """How long scores are waited for after the load."""


@dataclass(frozen=True)
class Found:
    """What one load came to."""

    outcome: Outcome
    waits: dict[str, Waits]
    """By name of the score."""
    complete: int
    """Traces of which everything that our table has is in MLflow."""
    took_s: float
    """From the first request until the last score, or until the limit."""
    cpu_s: dict[str, float]
    """By role."""
    longest_look_s: float
    yields: int
    """How often the evaluator began to yield to others."""


def under_load(gateway: Served, traffic: Traffic, names: list[str], *, awaits_warm_up: bool = True) -> Found:
    """Warm a gateway up, put it under load, and wait for the scores of these names.

    Args:
        gateway: that is asked.
        traffic: what is asked.
        names: of the scores.
        awaits_warm_up: wait for the scores of the warm-up before the load begins.
    """
    with Watch(gateway.mlflow_database, names) as watch:
        asyncio.run(ask_all(gateway.url, moments(traffic.per_s, WARM_UP_S, seed=1), watch.ended))
        watch.await_all(traffic.limit_s if awaits_warm_up else 0)
    due_s = moments(traffic.per_s, traffic.seconds, seed=2)
    with Watch(gateway.mlflow_database, names) as watch:
        before, yields, began = gateway.cpu_s(), gateway.yields(), time.monotonic()
        outcome = asyncio.run(ask_all(gateway.url, due_s, watch.ended))
        watch.await_all(traffic.limit_s)
        took_s = time.monotonic() - began
        cpu_s = {role: used - before.get(role, 0.0) for role, used in gateway.cpu_s().items()}
    waits = {name: watch.waits(name) for name in names}
    complete = gateway.complete(watch.trace_ids)
    return Found(outcome, waits, complete, took_s, cpu_s, watch.longest_look_s, gateway.yields() - yields)


def freshness(
    traffic: Traffic,
    scorers: Sequence[str],
    cores: frozenset[int],
    *,
    judge_ms: float | None,
    environment: dict[str, str],
) -> Page:
    """Measure with scorers in plain code, then, unless ``judge_ms`` is ``None``, with a judge of that latency too."""
    page = Page("Freshness", "freshness")
    with served(scorers, environment, cores) as gateway:
        columns = {"plain code": (ALWAYS, under_load(gateway, traffic, [ALWAYS]))}
    if judge_ms is not None:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="judge-")))
            url = stack.enter_context(judge_server(folder, judge_ms, cores))
            gateway = stack.enter_context(served([*scorers, JUDGE], judge_settings(url) | environment, cores))
            found = under_load(gateway, traffic, [ALWAYS, JUDGE])
        columns["plain code beside a judge"] = (ALWAYS, found)
        columns[f"judge of {judge_ms:g} ms"] = (JUDGE, found)
    page.tables.append((("", *columns), _rows(columns)))
    page.notes += [
        f"Scorers in plain code: {', '.join(scorers)}; agent `support`, offline model, every trace kept.",
        f"Requests at random, {traffic.per_s:g}/s for {traffic.seconds:g} s, after {WARM_UP_S:g} s of warm-up.",
        f"From the last byte of the response at the client to when the score was seen in MLflow's table "
        f"`assessments`, looked at every {POLL_S * 1000:g} ms; the longest look took "
        f"{max(found.longest_look_s for _, found in columns.values()) * 1000:.0f} ms.",
        f"The target is p95 of at most {TARGET_S:g} s at 20 requests/s.",
    ]
    if environment:
        page.notes.append(f"Settings: {', '.join(f'{name}={value}' for name, value in sorted(environment.items()))}.")
    return page


def _rows(columns: dict[str, tuple[str, Found]]) -> list[Sequence[str]]:
    found = [each for _, each in columns.values()]
    waits = [each.waits[name] for name, each in columns.values()]
    rows: list[Sequence[str]] = [
        ("requests answered", *(f"{len(each.outcome.latencies_s)}" for each in found)),
        ("failed", *(f"{each.outcome.failures}" for each in found)),
        ("p50", *(seconds(each.percentile(0.5)) for each in waits)),
        ("p95", *(seconds(each.percentile(0.95)) for each in waits)),
        ("p99", *(seconds(each.percentile(0.99)) for each in waits)),
        ("worst", *(seconds(max(each.seconds, default=float("nan"))) for each in waits)),
        (f"within {TARGET_S:g} s", *(f"{each.within(TARGET_S):.1%}" for each in waits)),
        ("scored", *(f"{each.share:.1%}" for each in waits)),
        ("settled, all scores there", *(f"{each.complete / max(_traces(each), 1):.1%}" for each in found)),
        ("evaluator began to yield", *(f"{each.yields} times" for each in found)),
        ("latency p50 / p99, ms", *(_latencies(each.outcome) for each in found)),
    ]
    roles = [(f"{role}, ms CPU a request", *(_cpu(each, role) for each in found)) for role in found[0].cpu_s]
    return rows + roles


def _traces(found: Found) -> int:
    return next(iter(found.waits.values())).traces


def _latencies(outcome: Outcome) -> str:
    return f"{outcome.percentile_ms(0.5):.0f} / {outcome.percentile_ms(0.99):.0f}"


def _cpu(found: Found, role: str) -> str:
    used_s = found.cpu_s.get(role, 0.0)
    share = used_s / found.took_s
    return f"{used_s * 1000 / max(_traces(found), 1):.1f} ({share:.0%} of a core)"
