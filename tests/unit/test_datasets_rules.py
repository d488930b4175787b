"""Which verdicts put a trace into a dataset, and which rules the settings take."""

import pytest
from pydantic import TypeAdapter, ValidationError

from gateway.dataset_rules import DatasetRule, DatasetRules
from gateway.evaluation.datasets.rules import Verdict, limits_of, reasons, verdict_of


def rule(**fields: object) -> DatasetRule:
    """Return a rule, written as in TOML."""
    return DatasetRule.model_validate(fields)


def score(name: str, passed: bool | None = None, value: object = None) -> Verdict:
    """Return what a scorer said."""
    return Verdict(name, name, value, passed)


def test_by_default_what_any_scorer_fails_is_taken() -> None:
    """A rule without a word takes a trace for each score that failed, and for none that passed or failed to be."""
    said = [score("a", passed=True), score("b", passed=False), score("c", passed=None)]
    assert reasons(rule(), "math", said) == [said[1]]
    assert reasons(rule(scorers=["a", "c"]), "math", said) == []


def test_a_golden_rule_wants_every_scorer_that_it_names() -> None:
    """One that failed, gave no verdict or has not been heard keeps a trace out of a golden set."""
    golden = rule(when="passed", scorers=["a", "b"])
    good = [score("a", passed=True), score("b", passed=True)]
    assert reasons(golden, "math", [*good, score("c", passed=False)]) == good
    for other in ([], [score("b", passed=False)], [score("b")], [*good[1:], score("a", passed=False)]):
        assert reasons(golden, "math", [good[0], *other]) == []


@pytest.mark.parametrize(("value", "is_below"), [(2, True), (3, False), ("2", True), (2.9, True), (True, False)])
def test_numbers_are_compared_with_the_bound(value: object, is_below: bool) -> None:
    """Numbers, also those that a rubric gives as a text, are below the bound or not; nothing else is."""
    assert bool(reasons(rule(when="below", value=3, scorers=["quality"]), "math", [score("quality", None, value)])) is (
        is_below
    )


def test_above_wants_all_of_them_above() -> None:
    """A trace is above a bound when each named scorer's value is."""
    high = rule(when="above", value=3.5, scorers=["a", "b"])
    assert reasons(high, "math", [score("a", None, 4), score("b", None, 3)]) == []
    assert len(reasons(high, "math", [score("a", None, 4), score("b", None, "4")])) == 2


def test_a_rule_for_some_agents_takes_nothing_of_others() -> None:
    """Agents that a rule does not name are none of its matter."""
    assert reasons(rule(agents=["support"]), "math", [score("a", passed=False)]) == []


def test_corrections_are_no_verdicts() -> None:
    """An expectation is what `corrected` and `any` wait for, and neither fails nor passes anything."""
    said = [Verdict("expected_response", "", "42", None, is_correction=True), Verdict("thumbs", "", False, False)]
    assert reasons(rule(**{"from": "feedback", "when": "corrected"}), "math", said) == said[:1]
    assert reasons(rule(**{"from": "feedback"}), "math", said) == said[1:]
    assert reasons(rule(**{"from": "feedback", "when": "any"}), "math", said) == said
    assert reasons(rule(**{"from": "feedback", "names": ["other"]}), "math", said) == []


@pytest.mark.parametrize(("value", "verdict"), [("Thumbs up", True), ("NO", False), (False, False), ("maybe", None),
                                                (1, None)])  # fmt: skip
def test_what_people_say_is_understood(value: object, verdict: bool | None) -> None:
    """Yes and no are taken in the words that forms use; numbers and other words are no verdict."""
    assert verdict_of(value) is verdict


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"when": "passed"}, "wants scorers"),
        ({"when": "below"}, "want a value"),
        ({"value": 3}, "want a value"),
        ({"when": "corrected"}, "does not go with"),
        ({"from": "tags"}, "wants tags"),
        ({"from": "feedback", "scorers": ["a"]}, 'from = "scores" only'),
        ({"names": ["a"]}, 'from = "feedback" only'),
        ({"dataset": "it's"}, "letters, digits"),
        ({"max_per_day": True}, "a number is wanted"),
        ({"tags": {"a": "it's"}}, "quotes"),
        ({"colour": "red"}, "Extra inputs"),
    ],
)  # fmt: skip
def test_a_rule_that_cannot_work_says_why(fields: dict[str, object], said: str) -> None:
    """Each contradiction in a rule is refused with a message that names the key."""
    with pytest.raises(ValidationError, match=said):
        rule(**fields)


def test_false_switches_a_limit_off() -> None:
    """TOML has no null: `false` stands for no cap, and for no suppression."""
    free = rule(max_per_day=False, similar_at_least=False)
    assert (free.max_per_day, free.similar_at_least) == (None, None)


def test_the_short_form_takes_the_limits_of_the_rule_named_like_its_dataset() -> None:
    """What `[scorers.x] dataset` collects counts against the cap of `[datasets.<that name>]`, else the default's."""
    rules = {"regressions": rule(max_per_day=5), "other": rule(dataset="elsewhere", max_per_day=7)}
    assert limits_of(rules, "scorers.x", "regressions").max_per_day == 5
    assert limits_of(rules, "other", "elsewhere").max_per_day == 7
    assert limits_of(rules, "scorers.x", "other").max_per_day == 200


def test_rules_are_named_like_a_dataset_unless_they_name_one() -> None:
    """A rule's name that no dataset can have is refused, but for a rule that says which dataset it feeds."""
    rules = TypeAdapter(DatasetRules)
    assert rules.validate_python({"it's": {"dataset": "golden"}})["it's"].dataset == "golden"
    with pytest.raises(ValidationError, match="letters, digits"):
        rules.validate_python({"it's": {}})
