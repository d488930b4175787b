"""What came of each row: answered or not, what each scorer said, and so passed, failed, or in error.

The three states add up to the rows, and only a case that was judged can pass: one that no scorer had a verdict on is
in error, like one that the agent or a scorer failed on. So a gate cannot be passed by not being looked at.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, Literal

from gateway.evaluation.offline.rows import ReplayKind

CaseState = Literal["passed", "failed", "error"]

SCORE_THRESHOLD = 3.5
"""On a scale from 1 to 5: better than the middle."""
QUALITY = "quality"
"""Scorer whose values make up the average score, where it ran."""

OWN_METRICS = (
    "total_cases",
    "passed_cases",
    "failed_cases",
    "error_cases",
    "pass_rate",
    "average_score",
    "latency_mean_s",
    "latency_p95_s",
    "total_tokens",
    "judge_calls",
    "judge_input_tokens",
    "judge_output_tokens",
    "judge_cost_usd",
)


@dataclass(frozen=True)
class Verdict:
    """What one scorer said of one case."""

    name: str
    value: Any
    """``None`` if the scorer failed."""
    passed: bool | None
    """``None``: no verdict."""
    rationale: str | None = None
    error: str | None = None
    """Why the scorer failed."""

    @property
    def number(self) -> float | None:
        """The value as a number, also where a judge gave it as a text; ``None`` for verdicts and other texts."""
        return as_number(self.value)


@dataclass(frozen=True)
class Case:
    """One row with its answer and what was said of it."""

    number: int
    """From 1, in the order of the dataset."""
    key: str
    """The same for the same question, in every run."""
    place: str
    replay: ReplayKind
    inputs: Any
    outputs: Any
    """``None``: there was no answer."""
    expectations: dict[str, Any]
    state: CaseState
    reasons: list[str]
    """Why it did not pass; empty if it did."""
    score: float | None
    """What it adds to the average score; ``None``: nothing."""
    verdicts: list[Verdict] = field(default_factory=list)
    trace_id: str | None = None
    duration_s: float | None = None
    tokens: int | None = None


def as_number(value: Any) -> float | None:
    """Return a number, or the number that a text is; ``None`` for booleans and anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def score_of(verdicts: Sequence[Verdict], scored_by: Sequence[str]) -> float | None:
    """Return the mean of the numbers that these scorers gave; ``None`` if they gave none."""
    numbers = [each.number for each in verdicts if each.name in scored_by and each.number is not None]
    return fmean(numbers) if numbers else None


def score_decides(scored_by: Sequence[str], verdicts: Sequence[Verdict], *, is_asked_for: bool) -> bool:
    """Whether a case's score decides on it: that of `quality` does, and any for which a threshold was asked.

    Numbers of other scorers may be on any scale; they decide only where nothing else does.
    """
    return is_asked_for or QUALITY in scored_by or all(each.passed is None for each in verdicts)


def state_of(
    error: str | None, verdicts: Sequence[Verdict], score: float | None, threshold: float
) -> tuple[CaseState, list[str]]:
    """Return a case's state, and why it did not pass: what failed it first, then what could not be said.

    Args:
        error: why there is no answer; ``None``: there is one.
        verdicts: what was said of it.
        score: its score; ``None``: it has none.
        threshold: the least score that passes.
    """
    if error is not None:
        return "error", [error]
    failed = [f"{each.name}: {each.rationale or each.value}" for each in verdicts if each.passed is False]
    if score is not None and score < threshold:
        failed.append(f"score {score:g} is below {threshold:g}")
    broken = [f"{each.name} gave no verdict: {each.error}" for each in verdicts if each.error is not None]
    if failed or broken:
        return ("failed" if failed else "error"), failed + broken
    if score is None and all(each.passed is None for each in verdicts):
        return "error", ["no scorer had a verdict on it"]
    return "passed", []


def scorers_of_score(names: Iterable[str], cases: Iterable[Sequence[Verdict]]) -> list[str]:
    """Return the scorers whose numbers make up the average score: ``quality``, else all that gave a number."""
    if QUALITY in set(names):
        return [QUALITY]
    return sorted({each.name for verdicts in cases for each in verdicts if each.number is not None})


def metrics_of(cases: Sequence[Case]) -> dict[str, float]:
    """Return the run's own metrics, and for each scorer its mean and its share of passes.

    What is not known is left out. Shares and means are of the cases that have them; the pass rate is of all.
    """
    states = [case.state for case in cases]
    found: dict[str, float] = {
        "total_cases": len(cases),
        "passed_cases": states.count("passed"),
        "failed_cases": states.count("failed"),
        "error_cases": states.count("error"),
        "pass_rate": states.count("passed") / len(cases),
    }
    if scores := [case.score for case in cases if case.score is not None]:
        found["average_score"] = fmean(scores)
    if times := sorted(case.duration_s for case in cases if case.duration_s is not None and case.replay == "live"):
        found["latency_mean_s"] = fmean(times)
        found["latency_p95_s"] = times[math.ceil(0.95 * len(times)) - 1]
    if tokens := [case.tokens for case in cases if case.tokens is not None]:
        found["total_tokens"] = sum(tokens)
    for name in sorted({each.name for case in cases for each in case.verdicts}):
        given = [each for case in cases for each in case.verdicts if each.name == name]
        if judged := [each.passed for each in given if each.passed is not None]:
            found[f"{name}/pass_rate"] = judged.count(True) / len(judged)
        if numbers := [each.number for each in given if each.number is not None]:
            found[f"{name}/mean"] = fmean(numbers)
        if broken := sum(each.error is not None for each in given):
            found[f"{name}/errors"] = broken
    return found
