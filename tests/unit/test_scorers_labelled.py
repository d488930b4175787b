"""The error rates that the scorers state in their docstrings, held against the labelled conversations.

They are those of the split that no rule was written by. What is wrong there is counted and never shown: a test that
printed a conversation would give it away to whoever writes the next rule.
"""

import re
from typing import Any, NamedTuple

import pytest

from ..labelled import loading

# Label: file, scorer, the largest share of false alarms and the smallest share of faults found that we put up with.
OF_TURNS = {
    "tool_error": ("tool_calls", "no_tool_errors", 0.01, 0.95),
    "invalid_arguments": ("tool_calls", "valid_tool_arguments", 0.01, 0.95),
    "redundant_calls": ("tool_calls", "no_redundant_calls", 0.01, 0.9),
    "unused_result": ("results", "answer_uses_tool_result", 0.02, 0.5),
    "contradicted_result": ("results", "no_contradicted_result", 0.02, 0.4),
    "ungrounded_value": ("results", "no_ungrounded_values", 0.02, 0.6),
    "refusal": ("answers", "no_refusal", 0.01, 0.6),
    "empty_answer": ("answers", "no_empty_answer", 0.02, 0.25),
    "truncated_answer": ("answers", "no_truncated_answer", 0.01, 0.7),
}
OF_CONVERSATIONS = {
    "user_repeats": ("conversation", "no_repeated_question", 0.01, 0.6),
    "user_rephrases": ("conversation", "no_rephrased_question", 0.03, 0.3),
    "frustration": ("conversation", "no_frustration", 0.02, 0.5),
    "asked_twice": ("conversation", "no_information_asked_twice", 0.02, 0.6),
    "broken_promise": ("outcomes", "no_broken_promise", 0.02, 0.7),
    "unresolved_error": ("outcomes", "errors_resolved", 0.02, 0.9),
    "no_progress": ("outcomes", "makes_progress", 0.02, 0.4),
}
STATED = re.compile(
    r"Of labelled (?:turns|conversations) that no rule was written by, (\d+) with\s+the fault and (\d+) without: "
    r"(\d+) missed, (\d+) false alarms?\."
)


class Counts(NamedTuple):
    """How a scorer did on the split."""

    faulty: int
    sound: int
    missed: int
    false_alarms: int


@pytest.fixture(scope="session")
def subjects() -> dict[bool, list[tuple[Any, dict[str, Any]]]]:
    """What there is to score, with its labels: single traces (False) and sessions (True)."""
    turns: list[tuple[Any, dict[str, Any]]] = []
    sessions: list[tuple[Any, dict[str, Any]]] = []
    for domain in loading.DOMAINS:
        for conversation in loading.load(domain, "held_out"):
            traces = loading.traces(conversation)
            sessions.append((conversation.labels, {"session": traces}))
            turns += [(turn.labels, {"trace": trace}) for turn, trace in zip(conversation.turns, traces, strict=True)]
    return {False: turns, True: sessions}


def counts(scorer: Any, label: str, subjects: list[tuple[Any, dict[str, Any]]]) -> Counts:
    """Count what the scorer fails; what it does not judge, it does not fail."""
    verdicts = []
    for labels, subject in subjects:
        feedback = scorer(**subject)
        verdicts.append((getattr(labels, label), feedback is not None and feedback.value is False))
    return Counts(
        faulty=sum(is_faulty for is_faulty, _ in verdicts),
        sound=sum(not is_faulty for is_faulty, _ in verdicts),
        missed=sum(is_faulty and not fails for is_faulty, fails in verdicts),
        false_alarms=sum(fails and not is_faulty for is_faulty, fails in verdicts),
    )


@pytest.mark.parametrize("label", [*OF_TURNS, *OF_CONVERSATIONS])
def test_the_stated_error_rates_are_true(label, subjects, shipped_scorers):
    """Each docstring states what the scorer misses and raises in vain, and both stay within bounds."""
    stem, name, most_false, least_found = (OF_TURNS | OF_CONVERSATIONS)[label]
    scorer = getattr(shipped_scorers(stem), name)
    counted = counts(scorer, label, subjects[label in OF_CONVERSATIONS])
    docstring = scorer._original_func.__doc__  # MLflow keeps the function, and not its docstring
    stated = STATED.search(" ".join(docstring.split()))
    assert stated, f"{name} states no error rates; they are {counted}"
    faulty, sound, missed, false_alarms = (int(number) for number in stated.groups())
    assert counted == Counts(faulty, sound, missed, false_alarms)
    assert false_alarms <= most_false * sound
    assert faulty - missed >= least_found * faulty
