"""Whether an answer says what a tool's result rules out."""

import re
from collections.abc import Callable
from typing import Any

from mlflow.entities import Trace

from ._claims import acts, claimed_deeds, denies, fulfils
from ._grounds import Fact, Unknown, unknown_values
from ._keyed import misstated, says_none
from ._states import exclude_each_other, state_of_number, states_in, states_said
from ._trace import FOR_MACHINES, failure_of, may_pass, offered_tools, text_leaves, tool_calls, user_texts
from ._values import Amount, Values, read_values
from ._words import STOPWORDS, name_parts, name_words, plain, sentences, stem, words


def contradiction_in(trace: Trace, facts: list[Fact], answer: str) -> str | None:
    """Return what of the answer the results rule out, None if nothing; `facts` are those of the results."""
    if not tool_calls(trace):
        return _not_free_of(facts, answer) or _other_value(trace, facts, answer)
    return (
        _failed_deed(trace, answer)
        or _ignored_failure(trace, answer)
        or _other_state(facts, answer)
        or _other_truth(facts, answer)
        or _not_free_of(facts, answer)
        or _not_the_most(facts, answer)
        or misstated(trace, facts, answer)
        or _other_value(trace, facts, answer)
    )


# --- deeds and states ---


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
    returned += [
        (fact.tool, fact.key, fact.value, state_of_number(fact.key, str(fact.value)))
        for fact in facts
        if _is_number(fact.value)
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
    """Return what is wrong if a key that is false is said to hold, in its own words, or one that is true is denied."""
    flags = [(fact.tool, fact.key, fact.value) for fact in facts if isinstance(fact.value, bool)]
    for tool, key, value in flags:
        # By whole words: "the refund" says nothing of "refunded".
        wanted = {part for part in name_parts(key) if part not in STOPWORDS}
        if not wanted or key.lower() in _VAGUE_KEYS or (tool, key, not value) in flags:
            continue
        for sentence in sentences(plain(answer)):
            if not wanted <= set(re.findall(r"[a-z]+", sentence)) or _OPEN.search(sentence):
                continue
            name = re.escape(" ".join(name_parts(key)))
            denied = value and re.search(rf"(?:\bnot|\bnever|n't)(?: yet)?(?: been)? {name}\b", sentence)
            if denied if value else not _NEGATED.search(sentence):
                return f"{tool} returned {key} {str(value).lower()}, the answer says: {sentence!r}"
    return None


def _other_value(trace: Trace, facts: list[Fact], answer: str) -> str | None:
    calls = tool_calls(trace)
    # Without a call in this turn, what the assistant itself said before is no proof.
    unknown, number = unknown_values(trace, answer, with_own=bool(calls)) if facts else ([], 0)
    new = set(unknown if calls or not unknown else unknown_values(trace, answer)[0])
    stated = read_values(answer)
    # Who comes back to an answer may name the value that it should have had.
    asked = read_values("\n".join(user_texts(trace))) if calls else Values()
    short = [fact for fact in facts if not isinstance(fact.value, bool) and len(str(fact.value).split()) <= 4]
    last = [fact for fact in short if fact.place == facts[-1].place]
    for each in unknown:
        sentence = next((line for line in sentences(answer) if each.written in line), answer)
        # Where the sentence names one of several things, what it says is about that one.
        named = {fact.thing for fact in short if fact.key and _names_it(fact.value, sentence)}
        for fact in (fact for fact in short if _left_out(each, fact, stated, asked)):
            is_only = last == [fact] and (calls or (number == 1 and each not in new))
            is_about = calls and (
                (named == {fact.thing} and _is_alike(each, fact, sentence)) or name_words(fact.key) & words(sentence)
            )
            is_it = is_only and (not fact.key or _is_alike(each, fact, sentence))
            if is_about or is_it or _is_near(each.written, str(fact.value)):
                return f"The answer states the {each.kind} {each.written}; {fact.tool} returned {fact.name}."
        if each.kind == "number" and (rule := _other_rule(each, sentence, facts)):
            return rule
    return None


_UNITS = re.compile(r"\b(?P<number>\d+)[ -](?:(?:business|working|calendar) )?(?P<unit>day|week|month|hour|year)s?\b")


def _other_rule(unknown: Unknown, sentence: str, facts: list[Fact]) -> str | None:
    """Return what is wrong if a rule that was looked up has another number of days or weeks for the same."""
    said = next((match["unit"] for match in _UNITS.finditer(sentence) if match["number"] == unknown.written), None)
    for fact in facts if said else ():
        for rule in sentences(str(fact.value)):
            units = {match["unit"] for match in _UNITS.finditer(rule)}
            if said in units and len((words(rule) & words(sentence)) - {stem(f"{said}s")}) >= _SAME_RULE:
                return f"The answer states {unknown.written} {said}s; {fact.tool} returned {rule!r}."
    return None


_SAME_RULE = 2
"""Words in common, from which on two sentences are about one rule."""


_CURRENCY = r"(?:[$\u20ac\u00a3\u00a5]|eur|euros?|usd|dollars?|gbp|pounds?|chf|francs?|sek|jpy|yen)"
_MONEY_KEYS = frozenset(
    stem(word)
    for word in ("price", "amount", "total", "fare", "cost", "fee", "charge", "refund", "paid", "balance", "eur", "usd")
)


def _is_alike(unknown: Unknown, fact: Fact, sentence: str) -> bool:
    """Return whether a value of the answer and one of a result can be of one thing: money and money, say."""
    if unknown.kind != "number":
        return True
    written = re.escape(unknown.written)
    is_money = re.search(rf"{_CURRENCY} ?{written}|{written} ?{_CURRENCY}(?!\w)", sentence, re.IGNORECASE)
    return bool(is_money) and bool(name_words(fact.key) & _MONEY_KEYS)


def _is_near(written: str, returned: str) -> bool:
    """Return whether two values look like one of which some digits were changed or swapped."""
    one, other = (_digits(text) for text in (written, returned))
    if min(len(one), len(other)) < 3 or len(one) != len(other):
        return False
    same = sum(first == second for first, second in zip(one, other, strict=True))
    return sorted(one) == sorted(other) or (same >= len(one) - 1 and (one[0] == other[0] or len(one) > 3))


def _digits(text: str) -> str:
    """Return the digits that tell: 49.90 and 49.9 have the same."""
    bare = text.replace(",", "")
    return re.sub(r"\D", "", bare.rstrip("0") if "." in bare else bare)


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
    alike = {code for code in found.codes if _shape(code) == _shape(unknown.written)}
    return bool(alike) and not found.codes & (stated.codes | asked.codes)


def _shape(code: str) -> str:
    """Return what kind of identifier it is: an address by its mark, anything else by its first letters."""
    mark = next((mark for mark in "@/<" if mark in code), "")
    return mark or re.sub(r"\d.*", "", code)


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
_AGAINST = re.compile(
    r"\b(?P<more>more|bigger|larger|higher|greater|most)\b.*?(?P<first>\d[\d.,]*)[^\d.;]{0,6}"
    r" (?:against|versus|vs\.?|compared (?:to|with)) [^\d.;]{0,6}(?P<second>\d[\d.,]*)"
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
    if (match := _AGAINST.search(low)) and not _NEGATED.search(low):
        first, second = (read_values(match[name]).amounts for name in ("first", "second"))
        if first and second and first[0].value < second[0].value:
            return f"The answer has it the wrong way around: {match[0]!r}."
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


_TELLS_OF_FAILURE = re.compile(
    r"\b(?:error|problem|fail\w*|wrong|issue|trouble|down|again|later|answer\w*|respon\w+|reach\w*|check|look|load"
    r"|connect\w*|system|service|technical|can't|cannot|couldn't|could not|unable)\b"
)


# A failure that itself says that there is none left.
_HAS_NONE = re.compile(r"\b(?:sold|full|fully|none|no|seats?|stock|rooms?)\b")


def _ignored_failure(trace: Trace, answer: str) -> str | None:
    """Return what is wrong if every call failed, one of them to do something, and the answer knows nothing of it."""
    calls = tool_calls(trace)
    failed = [call for call in calls if failure_of(call) is not None]
    acting = [call.name for call in failed if acts(call.name)]
    if failed and len(failed) == len(calls):
        if acting and len(answer.split()) > 2 and not _ADMITS.search(plain(answer)):
            return f"{acting[0]} failed, and the answer sounds as if it had not."
        reason = failure_of(failed[-1]) or ""
        if (
            may_pass(reason)
            and not _HAS_NONE.search(plain(reason))
            and says_none(answer)
            and not _TELLS_OF_FAILURE.search(plain(answer))
        ):
            return f"{failed[-1].name} failed, and the answer says that there is nothing."
    return None
