"""Whether a version is good enough: a pure decision on what was measured.

Each threshold is a check, and so is each comparison with a baseline; the gate passes if every check does. A check on
something that was not measured fails, unless nobody asked for it: then it is left out and noted.
"""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Literal, NamedTuple

from gateway.errors import ConfigurationError
from gateway.evaluation.offline.cases import OWN_METRICS, SCORE_THRESHOLD, Case

PASS_RATE_THRESHOLD = 0.8
"""Of five questions one may fail: a start, for a set that was collected where an agent failed."""
MARGIN = 0.05
"""Share of cases that may be lost against the baseline."""
SCORE_MARGIN = 0.25
"""Points of the average score that may be lost against the baseline: an eighth of the way from 3 to 5."""
CONFIDENCE = 0.95

_THRESHOLD = re.compile(r"\s*(?P<metric>[^<>=\s][^<>=]*?)\s*(?P<operator>>=|<=)\s*(?P<value>[^<>=]+?)\s*")
_AGGREGATES = ("mean", "pass_rate", "errors")


@dataclass(frozen=True)
class Threshold:
    """The least, or the most, that a metric may be."""

    metric: str
    operator: Literal[">=", "<="]
    value: float

    def __str__(self) -> str:
        """Return it as it is written on the command line."""
        return f"{self.metric} {self.operator} {self.value:g}"

    def holds(self, measured: float) -> bool:
        """Whether a value is good enough."""
        return measured >= self.value if self.operator == ">=" else measured <= self.value


@dataclass(frozen=True)
class Wanted:
    """What the gate asks for."""

    pass_rate: float = PASS_RATE_THRESHOLD
    score: float | None = None
    """Least average score; ``None``: `SCORE_THRESHOLD` where there is a score, and nothing where there is none."""
    others: Sequence[Threshold] = ()
    margin: float = MARGIN
    score_margin: float = SCORE_MARGIN
    is_strict: bool = False
    """A comparison that is not clear fails as well."""

    @property
    def score_threshold(self) -> float:
        """The least average score, and the least score of a case that passes."""
        return SCORE_THRESHOLD if self.score is None else self.score


class Check(NamedTuple):
    """One thing that was asked for."""

    name: str
    passed: bool
    found: str
    """What was measured, in words."""

    def __str__(self) -> str:
        """Return it as a line."""
        return f"{self.name}: {self.found}"


@dataclass(frozen=True)
class Decision:
    """What the gate says."""

    checks: list[Check]
    notes: list[str] = field(default_factory=list)
    """What was not checked, and why."""

    @property
    def passed(self) -> bool:
        """Whether all that was asked for is so."""
        return all(check.passed for check in self.checks)

    @property
    def reason(self) -> str:
        """What failed; where nothing did, what was checked."""
        return "; ".join(str(check) for check in self.checks if check.passed is self.passed)


class Interval(NamedTuple):
    """A mean with the bounds of its confidence interval; infinite bounds where there are too few values."""

    mean: float
    low: float
    high: float


def read_threshold(text: str, scorers: Mapping[str, Collection[str]]) -> Threshold:
    """Return the threshold that a text such as ``exact_match/mean>=0.9`` names.

    Args:
        text: metric, ``>=`` or ``<=``, number.
        scorers: names of those that will run, each with MLflow's names of what it aggregates.

    Raises:
        ConfigurationError: it has another form, or no such metric will be measured.
    """
    found = _THRESHOLD.fullmatch(text)
    try:
        value = float(found["value"]) if found else math.nan
    except ValueError:
        value = math.nan
    if found is None or not math.isfinite(value):
        raise ConfigurationError(f"--metric {text!r}: write it as NAME>=NUMBER or NAME<=NUMBER.")
    name = found["metric"]
    scorer, _, aggregate = name.rpartition("/")
    known = name in OWN_METRICS or (scorer in scorers and aggregate in {*_AGGREGATES, *scorers[scorer]})
    if not known:
        raise ConfigurationError(
            f"--metric {text!r}: there is no metric {name}. There are {', '.join(OWN_METRICS)}, and for each scorer "
            f"that runs ({', '.join(sorted(scorers)) or 'none'}) NAME/mean and NAME/pass_rate."
        )
    return Threshold(name, ">=" if found["operator"] == ">=" else "<=", value)


def decide(
    wanted: Wanted, metrics: Mapping[str, float], cases: Sequence[Case], baseline: Sequence[Case] | None
) -> Decision:
    """Return what the gate says of a run.

    Args:
        wanted: what is asked for.
        metrics: what was measured, by name.
        cases: the run's cases.
        baseline: the cases of the run that it is compared with; ``None``: with none.
    """
    notes = []
    thresholds = [Threshold("pass_rate", ">=", wanted.pass_rate)]
    if wanted.score is not None or "average_score" in metrics:
        thresholds.append(Threshold("average_score", ">=", wanted.score_threshold))
    else:
        notes.append("average_score is not checked: no scorer gave a number (a judge model would: GATEWAY_JUDGE_MODEL)")
    checks = [_check(each, metrics) for each in [*thresholds, *wanted.others]]
    if baseline is not None:
        compared = [
            _compare("pass_rate", wanted.margin, _passes(cases), _passes(baseline), wanted),
            _compare("average_score", wanted.score_margin, _scores(cases), _scores(baseline), wanted),
        ]
        checks += [each for each in compared if isinstance(each, Check)]
        notes += [each for each in compared if isinstance(each, str)]
    return Decision(checks, notes)


def interval(values: Sequence[float]) -> Interval:
    """Return the mean with Student's t interval at `CONFIDENCE`; for one value it is unbounded.

    Formula: mean ± t(n - 1) · s / √n (Student, "The probable error of a mean", 1908).
    """
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    from scipy.stats import t  # type: ignore[import-untyped] # noqa: PLC0415 - MLflow brings it; it takes a second

    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - reach, mean + reach)


def _check(threshold: Threshold, metrics: Mapping[str, float]) -> Check:
    measured = metrics.get(threshold.metric)
    if measured is None:
        return Check(str(threshold), False, "it was not measured: no scorer gave a value")
    return Check(str(threshold), threshold.holds(measured), f"{measured:.4g}")


def _passes(cases: Sequence[Case]) -> dict[tuple[str, int], float]:
    return _numbered({case.number: (case.key, float(case.state == "passed")) for case in cases})


def _scores(cases: Sequence[Case]) -> dict[tuple[str, int], float]:
    return _numbered({case.number: (case.key, case.score) for case in cases if case.score is not None})


def _numbered(values: Mapping[int, tuple[str, float]]) -> dict[tuple[str, int], float]:
    """Return the values by question, equal questions told apart by their order."""
    seen: Counter[str] = Counter()
    found: dict[tuple[str, int], float] = {}
    for _, (key, value) in sorted(values.items()):
        found[key, seen[key]] = value
        seen[key] += 1
    return found


def _compare(
    metric: str,
    margin: float,
    now: Mapping[tuple[str, int], float],
    then: Mapping[tuple[str, int], float],
    wanted: Wanted,
) -> Check | str:
    """Return the check that a metric is no worse than then by more than the margin; a note where it cannot be made.

    The same questions are compared pairwise, which takes out how hard each of them is. It is worse beyond the margin
    if the whole interval of the mean difference lies below it; where only a part does, there are too few cases to say.
    """
    common = sorted(now.keys() & then.keys())
    if not common:
        return f"{metric} is not compared with the baseline: there are no questions that both runs have a value for"
    lost = interval([now[key] - then[key] for key in common])
    name = f"{metric} no worse than the baseline by more than {margin:g}"
    bounds = (
        f"95 % interval {lost.low:+.3g} to {lost.high:+.3g}" if math.isfinite(lost.low) else "one case, no interval"
    )
    found = f"{lost.mean:+.3g} over {len(common)} cases ({bounds})"
    if lost.high < -margin:
        return Check(name, False, found)
    if lost.low >= -margin:
        return Check(name, True, found)
    return Check(name, not wanted.is_strict, f"{found}: not clear, too few cases")
