"""Which rule takes a trace into which dataset: decisions without any I/O."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from gateway.dataset_rules import DatasetRule

_GOOD = frozenset({"yes", "true", "pass", "none", "resolved", "good", "correct", "positive", "thumbs_up", "up", "like"})
_BAD = frozenset({"no", "false", "fail", "unresolved", "bad", "incorrect", "wrong", "negative", "thumbs_down", "down",
                  "dislike"})  # fmt: skip
"""What people, and the forms that ask them, say for yes and no; MLflow's own categories among them."""


Rules = Mapping[str, DatasetRule]
"""Rules by name."""

DEFAULTS = DatasetRule()
"""Cap and similarity of what no rule of the settings says more of."""


class Verdict(NamedTuple):
    """A score, or what a person said, as rules see it."""

    name: str
    """Name of the assessment."""
    by: str
    """The scorer, or the person."""
    value: Any
    passed: bool | None
    is_correction: bool = False
    """It is an expectation."""


def dataset_of(name: str, rule: DatasetRule) -> str:
    """Return the MLflow dataset that a rule feeds."""
    return rule.dataset or name


def limits_of(rules: Rules, rule: str | None, dataset: str) -> DatasetRule:
    """Return the rule whose cap and similarity count for a row.

    Args:
        rules: of the settings.
        rule: name of the rule that put it there; ``scorers.<name>`` for the short form ``[scorers.<name>] dataset``,
            which takes the limits of the rule that is named like the dataset, if there is one.
        dataset: where it goes.
    """
    found = rules.get(rule or "")
    if found is None and (named := rules.get(dataset)) is not None and dataset_of(dataset, named) == dataset:
        return DEFAULTS.model_copy(
            update={"max_per_day": named.max_per_day, "similar_at_least": named.similar_at_least}
        )
    return found or DEFAULTS


def reasons(rule: DatasetRule, agent: str, verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return the verdicts for which the rule takes a trace; none if it does not.

    Args:
        rule: one whose source the verdicts are of.
        agent: who answered.
        verdicts: of the trace; for rules that want all, every one that is known of it.
    """
    if rule.agents is not None and agent not in rule.agents:
        return []
    wanted = rule.scorers if rule.source == "scores" else rule.names
    named = [each for each in verdicts if wanted is None or each.name in wanted or each.by in wanted]
    if rule.condition == "any":
        return named
    if rule.condition == "corrected":
        return [each for each in named if each.is_correction]
    said = [each for each in named if not each.is_correction]
    met = [each for each in said if _meets(rule, each)]
    if not rule.wants_all:
        return met
    heard = {each.by for each in said} | {each.name for each in said}
    return met if len(met) == len(said) and heard >= set(rule.scorers or ()) else []


def _meets(rule: DatasetRule, verdict: Verdict) -> bool:
    if rule.value is None:
        return verdict.passed is (rule.condition == "passed")
    number = _number(verdict.value)
    if number is None:
        return False
    return number < rule.value if rule.condition == "below" else number > rule.value


def _number(value: Any) -> float | None:
    """Return a value as a number; rubric judges give theirs as a text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def verdict_of(value: Any) -> bool | None:
    """Return whether a person's feedback is good; ``None`` for numbers, and words that nobody agreed upon."""
    if isinstance(value, bool):
        return value
    word = value.strip().casefold().replace(" ", "_").replace("-", "_") if isinstance(value, str) else ""
    return True if word in _GOOD else False if word in _BAD else None
