"""From the outbox to MLflow: traces a second of one evaluator on one core. Measured by `intake`, shown as a page."""

import statistics
from collections.abc import Callable, Sequence

import intake

from .pages import Page

TARGET = 50.0
"""Traces a second a core."""


def throughput(traces: int, rounds: int, *, rest: bool) -> Page:
    """Have one evaluator empty an outbox of so many traces, so many times, and return the medians."""
    page = Page("Throughput", "throughput")
    results = intake.take_in(traces, rounds, rest=rest)
    figures: list[tuple[str, Callable[[intake.Round], float]]] = [
        ("traces/s", lambda each: each.traces / each.wall_s),
        ("traces/s of its processor time", lambda each: each.traces / each.whole_s),
        ("evaluator, ms CPU a trace", lambda each: each.whole_s / each.traces * intake.MS),
        ("  decode", lambda each: each.decode_s / each.traces * intake.MS),
        ("  score", lambda each: each.score_s / each.traces * intake.MS),
        ("  store", lambda each: each.store_s / each.traces * intake.MS),
        ("Postgres and MLflow server, ms CPU a trace", lambda each: each.servers_s / each.traces * intake.MS),
    ]
    rows: list[Sequence[str]] = [
        (label, *(_of_rounds([figure(each) for each in taken]) for taken in results.values()))
        for label, figure in figures
    ]
    page.tables.append((("one evaluator on one core: median (least to most)", *results), rows))
    page.notes += [
        f"{traces} traces of six spans wait in the outbox at the start of each of {rounds} rounds, after one that only "
        f"warms up; each gets six scores: {', '.join(intake.SIX)}.",
        "The evaluator's intake works in this process, pinned to one core; Postgres and the MLflow server have the "
        "others.",
        f"The target is {TARGET:g} traces/s a core.",
    ]
    return page


def _of_rounds(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"
