"""Whether an answer states what the tools returned, and nothing else. True is a pass; None: nothing to compare."""

import re
from collections.abc import Callable
from typing import Any

from mlflow.entities import Feedback, Trace
from mlflow.genai.scorers import scorer

from ._claims import acts, claimed_deeds, denies, fulfils
from ._evidence import evidence_of_use
from ._grounds import Fact, Unknown, facts_of, unknown_values
from ._states import exclude_each_other, states_in, states_said
from ._trace import FOR_MACHINES, assistant_text, failure_of, offered_tools, text_leaves, tool_calls, user_texts
from ._values import Amount, Values, read_values
from ._words import name_parts, name_words, plain, sentences, stem, words


@scorer
def answer_uses_tool_result(trace: Trace) -> Feedback | None:
    """Pass if the final answer states something that the last successful tool calls returned.

    Sees: numbers (36.0 as 36, $1,200.00, 42 %, rounded, or spelled out up to twelve), dates and times in the usual
    forms, codes, addresses, redaction placeholders, names, and for texts the share of their words in the answer. What
    the user or the arguments had already said proves nothing and is left out, but for a number that the user named and
    the tool confirms. Of a list or object, one value is enough, or one that follows from it by one sum.

    Cannot see: whether the answer is right as a whole, only that it drew on the result; values that take more than one
    sum or another time zone; a paraphrase of a word ("on its way" for "shipped"); words in another language
    than the result's. Where the result leaves nothing to look for (true, "ok", an internal id, a status word that does
    not show), it is not applicable rather than failed.

    Of labelled turns that no rule was written by, 15 with the fault and 369 without: 4 missed, 11 false alarms.
    """
    is_used, rationale = evidence_of_use(trace)
    return None if is_used is None else Feedback(value=is_used, rationale=rationale)


@scorer
def no_ungrounded_values(trace: Trace) -> Feedback | None:
    """Pass if each number, date, time, identifier and address in the answer comes from somewhere.

    It comes from the user, a tool's result or arguments, the instructions or an earlier turn (as the model's messages
    show them), or follows from those by plain arithmetic: a sum, difference, product, quotient, percentage, total or
    mean of a list, change of unit, rounding, days or hours later.

    Cannot see: an invented value that happens to follow from others, which gets likelier the more numbers there are;
    numbers that are spelled out; names; a value that is there but belongs to something else. Round figures ("about
    500") and examples of a form ("such as A-1001") are not held against the answer. Common knowledge that no tool gave
    ("a year has 365 days") is taken for made up.

    Of labelled turns that no rule was written by, 18 with the fault and 366 without: 6 missed, 8 false alarms.
    """
    answer = assistant_text(trace)
    if not answer:
        return None
    unknown, stated = unknown_values(trace, answer)
    if not stated:
        return None
    if unknown:
        listed = ", ".join(dict.fromkeys(f"{each.kind} {each.written}" for each in unknown))
        return Feedback(value=False, rationale=f"No tool, user or earlier turn gave: {listed}")
    return Feedback(value=True, rationale=f"Each of {stated} values in the answer comes from somewhere.")


@scorer
def no_contradicted_result(trace: Trace) -> Feedback | None:
    """Pass if the answer states nothing that a tool's result of this turn contradicts.

    Sees: a number, date, time or identifier that comes from nowhere where a result has another one that the answer
    leaves out; a state ("shipped") where the result has one that excludes it ("cancelled"), or a yes where it has a no;
    a deed said to be done whose tool failed.

    Cannot see: a value of one thing said of another, a contradiction in prose, states outside of a list of common ones.

    Of labelled turns that no rule was written by, 18 with the fault and 366 without: 15 missed, 4 false alarms.
    """
    answer = assistant_text(trace)
    calls = tool_calls(trace)
    if not answer or not calls:
        return None
    facts = facts_of(trace)
    problem = (
        _failed_deed(trace, answer)
        or _ignored_failure(trace, answer)
        or _other_state(facts, answer)
        or _other_truth(facts, answer)
        or _not_free_of(facts, answer)
        or _not_the_most(facts, answer)
        or _other_value(trace, facts, answer)
    )
    if problem:
        return Feedback(value=False, rationale=problem)
    return Feedback(value=True, rationale=f"The answer contradicts none of {len(facts)} values returned.")


def _failed_deed(trace: Trace, answer: str) -> str | None:
    calls = tool_calls(trace)
    for deed in claimed_deeds(answer, set(offered_tools(trace)) | {call.name for call in calls}):
        named = [call for call in calls if fulfils(call.name, deed.verb, by_name=True)]
        undone = [call for call in named if failure_of(call) is not None or denies(call.outputs, deed.verb)]
        if named and len(undone) == len(named):
            returned = words("\n".join(text for call in named for _, text in text_leaves(call.outputs)))
            if deed.is_passive and deed.verb in returned:
                continue  # it says what the tool says: "was already refunded"
            return f"The answer says {deed.text!r}, but {undone[-1].name} did not do it."
    return None


def _other_state(facts: list[Fact], answer: str) -> str | None:
    returned = [
        (fact.tool, fact.key, fact.value, states_in(fact.value))
        for fact in facts
        if isinstance(fact.value, str) and len(fact.value.split()) <= 4
    ]
    every = {state for *_, states in returned for state in states}
    held, named = states_said(answer)
    for tool, key, value, states in returned:
        for state in states:
            if state in named:
                continue
            other = next((each for each in held if exclude_each_other(each, state) and each not in every), None)
            if other:
                return f"{tool} returned {key} {value!r}, the answer says otherwise."
    return None


_NEGATED = re.compile(r"\b(?:not|no|never|none|without|unable|cannot|unfortunately|sorry)\b|n't\b")
_OPEN = re.compile(r"\?$|\b(?:if|unless|once|whether|when)\b")
_VAGUE_KEYS = frozenset({"ok", "success", "successful", "done", "found", "result", "exists", "valid", "value", "error"})


def _other_truth(facts: list[Fact], answer: str) -> str | None:
    """Return what is wrong if a key that is false is said to hold, in a sentence with the key's own words."""
    flags = [(fact.tool, fact.key, fact.value) for fact in facts if isinstance(fact.value, bool)]
    for tool, key, value in flags:
        wanted = words(" ".join(name_parts(key)))
        if value or not wanted or key.lower() in _VAGUE_KEYS or (tool, key, True) in flags:
            continue
        for sentence in sentences(plain(answer)):
            if wanted <= words(sentence) and not _NEGATED.search(sentence) and not _OPEN.search(sentence):
                return f"{tool} returned {key} false, the answer says: {sentence!r}"
    return None


def _other_value(trace: Trace, facts: list[Fact], answer: str) -> str | None:
    unknown, _ = unknown_values(trace, answer) if facts else ([], 0)
    if not unknown:
        return None
    stated, asked = read_values(answer), read_values("\n".join(user_texts(trace)))
    short = [fact for fact in facts if not isinstance(fact.value, bool) and len(str(fact.value).split()) <= 4]
    last = [fact for fact in short if fact.place == facts[-1].place]
    for each in unknown:
        sentence = next((line for line in sentences(answer) if each.written in line), answer)
        # Where the sentence names one of several things, what it says is about that one.
        named = {fact.thing for fact in short if fact.key and _names_it(fact.value, sentence)}
        about = [fact for fact in short if fact.thing in named] if len(named) == 1 else []
        context = words(sentence)
        for fitting in (
            [
                fact
                for fact in short
                if _left_out(each, fact, stated, asked) and _is_near(each.written, str(fact.value))
            ],
            [fact for fact in about if _left_out(each, fact, stated, asked)],
            [fact for fact in short if name_words(fact.key) & context and _left_out(each, fact, stated, asked)],
            [fact for fact in last if len(last) == 1 and _left_out(each, fact, stated, asked)],
        ):
            if fitting:
                fact = fitting[0]
                return f"The answer states the {each.kind} {each.written}; {fact.tool} returned {fact.name}."
    return None


def _is_near(written: str, returned: str) -> bool:
    """Return whether two values look like one of which some digits were changed or swapped."""
    one, other = (re.sub(r"\.0+$|\D", "", text) for text in (written, returned))
    if min(len(one), len(other)) < 3 or len(one) != len(other):
        return False
    same = sum(first == second for first, second in zip(one, other, strict=True))
    return sorted(one) == sorted(other) or (one[0] == other[0] and same >= len(one) - 1)


def _names_it(value: Any, sentence: str) -> bool:
    return isinstance(value, str) and len(value) > 2 and value.lower() in sentence.lower()


def _left_out(unknown: Unknown, fact: Fact, stated: Values, asked: Values) -> bool:
    """Return whether a result's value is of the unknown one's kind and neither the answer nor the user states it."""
    found = read_values(str(fact.value))
    if unknown.kind == "number":
        is_number = isinstance(fact.value, int | float) or re.fullmatch(r"\D{0,4}\d[\d.,]*\D{0,5}", str(fact.value))
        return (
            bool(is_number)
            and not found.codes
            and not FOR_MACHINES.search(fact.key.lower())
            and not any(
                said.agrees_with(exact) or given.value == exact.value
                for exact in found.amounts
                for said in stated.amounts
                for given in asked.amounts or [Amount(-1.0, 1.0)]
            )
        )
    if unknown.kind == "date":
        return bool(found.dates) and not {each[1:] for each in found.dates} & {each[1:] for each in stated.dates}
    if unknown.kind == "time":
        return bool(found.times) and not found.times & (stated.times | asked.times)
    return bool(found.codes) and not found.codes & (stated.codes | asked.codes)


# --- the best of several ---

_MOST = (
    (
        re.compile(r"\b(?:cheapest|least expensive|lowest (?:price|fare|rate|cost))\b"),
        "price fare cost rate amount total",
        min,
    ),
    (re.compile(r"\b(?:most expensive|dearest|priciest)\b"), "price fare cost rate amount total", max),
    (re.compile(r"\b(?:fastest|quickest|shortest)\b"), "minutes duration hours length seconds time", min),
)
_MORE = (
    (re.compile(r"\b(?:bigger|larger|higher|greater|dearer|more expensive|longer|taller|heavier)\b"), max),
    (re.compile(r"\b(?:cheaper|smaller|lower|less|shorter|lighter)\b"), min),
)


def _not_the_most(facts: list[Fact], answer: str) -> str | None:
    """Return what is wrong if something is called the cheapest, or bigger, that by the results is not."""
    low = plain(answer)
    numbers = [(fact, float(fact.value)) for fact in facts if _is_number(fact.value)]
    for pattern, keys, best in _MOST:
        wanted = {stem(word) for word in keys.split()}
        column = [(fact, number) for fact, number in numbers if name_words(fact.key) & wanted]
        same = {number for fact, number in column if (fact.tool, fact.key) == (column[-1][0].tool, column[-1][0].key)}
        wrong = _wrong_one(pattern, low, same, best)
        if wrong is not None:
            return f"The answer calls {wrong:g} the one; {column[-1][0].tool} returned {best(same):g}."
    bare = [(fact, number) for fact, number in numbers if not fact.key]
    for pattern, best in _MORE:
        same = {number for fact, number in bare if fact.tool == bare[-1][0].tool}
        if len(same) == 2 and (wrong := _wrong_one(pattern, low, same, best)) is not None:
            return f"The answer has it the wrong way around: {wrong:g}, of {min(same):g} and {max(same):g}."
    return None


def _wrong_one(
    pattern: re.Pattern[str], text: str, numbers: set[float], best: Callable[[set[float]], float]
) -> float | None:
    """Return the one number that a sentence with these words states, if another one is the best."""
    for sentence in (line for line in sentences(text) if pattern.search(line)):
        stated = read_values(sentence).amounts
        said = {number for number in numbers if any(each.agrees_with(Amount(number, 1e-9)) for each in stated)}
        if len(numbers) > 1 and len(said) == 1 and said != {best(numbers)}:
            return said.pop()
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


_FREE_OF = re.compile(
    r"\b(?:no|without (?:a|any)|zero) (?:\w+ )?(?P<key>fees?|charges?|cost|delay|changes?|penalty|deposit|tax)\b"
)


def _not_free_of(facts: list[Fact], answer: str) -> str | None:
    """Return what is wrong if the answer says "no fee" and a result has one."""
    for match in _FREE_OF.finditer(plain(answer)):
        for fact in facts:
            if _is_number(fact.value) and fact.value and stem(match["key"]) in name_words(fact.key):
                return f"The answer says {match[0]!r}; {fact.tool} returned {fact.name}."
    return None


# --- what failed ---

_ADMITS = re.compile(
    r"\b(?:not|no|never|cannot|unable|sorry|unfortunately|afraid|error|problem|fail\w*|wrong|issue|trouble"
    r"|unavailable|down"
    r"|sold out|instead|again|will|try|check|only|without|already|zero)\b|n't\b|\?|'ll\b"
)


def _ignored_failure(trace: Trace, answer: str) -> str | None:
    """Return what is wrong if every call failed, one of them to do something, and the answer knows nothing of it."""
    calls = tool_calls(trace)
    failed = [call for call in calls if failure_of(call) is not None]
    acting = [call.name for call in failed if acts(call.name)]
    if acting and len(failed) == len(calls) and len(answer.split()) > 2 and not _ADMITS.search(plain(answer)):
        return f"{acting[0]} failed, and the answer sounds as if it had not."
    return None
