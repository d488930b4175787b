"""What an answer says of a result by the key or the thing it names: another day, currency, number, or none at all."""

import re
from collections.abc import Iterable
from typing import Any

from mlflow.entities import Trace

from ._grounds import Fact
from ._trace import parsed, text_leaves, tool_calls, user_texts
from ._values import Amount, read_stated, read_values
from ._words import name_words, plain, sentences, stem, words


def misstated(trace: Trace, facts: list[Fact], answer: str) -> str | None:
    """Return what the answer says of a key, a thing or a list that the results rule out, None if nothing."""
    return (
        _other_day(facts, answer)
        or _other_amount(trace, facts, answer)
        or _other_currency(trace, facts, answer)
        or _of_another_thing(facts, answer)
        or _more_than_there_are(trace, answer)
        or _none_though_some(trace, answer)
    )


# --- days and amounts under a key ---

_EVENT = re.compile(
    r"\b(?P<event>[a-z]+ed|sent|paid|left|bought)(?: (?:up|out|off|in|back|over))? on"
    r" (?:(?:\w+day,? )?(?:the )?)(?P<day>[\w ,.-]{4,20})"
)


def _other_day(facts: list[Fact], answer: str) -> str | None:
    """Return what is wrong if something is said to have happened on another day than the result has for it."""
    low = plain(answer)
    for match in _EVENT.finditer(low):
        said = {date for _, dates in read_stated(match["day"]).dates[:1] for date in dates}
        known = [(fact, read_values(str(fact.value)).dates) for fact in facts if stem(match["event"]) in _named(fact)]
        known = [(fact, dates) for fact, dates in known if dates]
        if said and known and not any(date[1:] == day[1:] for _, dates in known for date in dates for day in said):
            return f"The answer says {match[0]!r}; {known[-1][0].tool} returned {known[-1][0].name}."
    return None


def _named(fact: Fact) -> set[str]:
    return name_words(fact.key)


# What an amount is said to be, and the words of a key that has that amount.
_KINDS = (
    (
        re.compile(r"\b(?:refund\w*|reimburse\w*)\b|\b(?:get|receive|pay|paid|give|money)\b.*\bback\b"),
        frozenset({stem("refund"), stem("refunded")}),
    ),
    (re.compile(r"\b(?:fees?|charges?)\b"), frozenset({stem("fee"), stem("fees"), stem("charge")})),
    (re.compile(r"\bbalance\b"), frozenset({stem("balance")})),
    (re.compile(r"\bdelay\w*\b"), frozenset({stem("delay"), stem("delayed")})),
)


def _other_amount(trace: Trace, facts: list[Fact], answer: str) -> str | None:
    """Return what is wrong if a refund or fee is said to be another one of the amounts that a result has."""
    numbers = [fact for fact in facts if _is_number(fact.value)]
    low = plain(answer)
    if not numbers or not any(pattern.search(low) for pattern, _ in _KINDS):
        return None
    asked = {amount.value for amount in read_values("\n".join(user_texts(trace))).amounts}
    for pattern, keys in _KINDS:
        of_kind = [fact for fact in numbers if _named(fact) & keys]
        others = [fact for fact in numbers if fact not in of_kind]
        for sentence in sentences(low) if of_kind else ():
            stated = read_values(sentence).amounts
            if not pattern.search(sentence) or _states_one(stated, of_kind) or len(stated) != 1:
                continue
            wrong = next((fact for fact in others if fact.value not in asked and _states_one(stated, [fact])), None)
            if wrong and not any(other.search(sentence) for other, _ in _KINDS if other is not pattern):
                return f"The answer says {sentence!r}; {of_kind[-1].tool} returned {of_kind[-1].name}."
    return None


def _states_one(stated: Iterable[Amount], facts: Iterable[Fact]) -> bool:
    return any(amount.agrees_with(Amount(abs(float(fact.value)), 1e-9)) for amount in stated for fact in facts)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


_CURRENCIES = {
    "eur": r"\u20ac|\beuros?\b|\beur\b", "usd": r"\$|\bdollars?\b|\busd\b", "gbp": r"\u00a3|\bpounds?\b|\bgbp\b",
    "chf": r"\bfrancs?\b|\bchf\b", "jpy": r"\byen\b|\bjpy\b|\u00a5", "sek": r"\bsek\b|\bkronor\b",
    "inr": r"\brupees?\b|\binr\b",
}  # fmt: skip
_WRITTEN_CURRENCIES = {code: re.compile(pattern, re.IGNORECASE) for code, pattern in _CURRENCIES.items()}


def _other_currency(trace: Trace, facts: list[Fact], answer: str) -> str | None:
    """Return what is wrong if a result's amount is stated in a currency that neither user nor tools spoke of."""
    if not any(pattern.search(answer) for pattern in _WRITTEN_CURRENCIES.values()):
        return None
    given = [*user_texts(trace), *(text for call in tool_calls(trace) for _, text in text_leaves(call.inputs))]
    given += [str(fact.value) for fact in facts] + [" ".join(re.split(r"[_\W]+", fact.key)) for fact in facts]
    known = {code for code, pattern in _WRITTEN_CURRENCIES.items() if pattern.search("\n".join(given))}
    returned = {code for code in known if any(_has_currency(fact, code) for fact in facts)}
    if not returned:
        return None
    numbers = [fact for fact in facts if _is_number(fact.value) and fact.value]
    for sentence in sentences(answer):
        said = {code for code, pattern in _WRITTEN_CURRENCIES.items() if pattern.search(sentence)}
        if said and not said & returned and _states_one(read_values(sentence).amounts, numbers):
            return f"The answer says {sentence!r}; the amounts returned are in {', '.join(sorted(returned))}."
    return None


def _has_currency(fact: Fact, code: str) -> bool:
    is_named = code in re.split(r"[^a-z]+", fact.key.lower())
    return is_named or (isinstance(fact.value, str) and fact.value.lower() == code)


# --- one thing's value said of another ---


_COMPARES = re.compile(r"\b(?:than|instead|unlike|not|rather|versus|vs|between|from|to|difference)\b")


def _of_another_thing(facts: list[Fact], answer: str) -> str | None:
    """Return what is wrong if a clause names one of several things and gives the number that another one has."""
    if len({fact.thing for fact in facts}) < 2:
        return None
    named = [
        fact
        for fact in facts
        if isinstance(fact.value, str) and len(fact.value) > 2 and _is_name(fact.value) and fact.value in answer
    ]
    if not named:
        return None
    for clause in re.split(r"[;\n(]|, |\. | and | but ", answer):
        things = {fact.thing for fact in named if re.search(rf"(?<!\w){re.escape(fact.value)}(?!\w)", clause)}
        stated = [amount for _, amounts in read_stated(clause).numbers for amount in amounts]
        if len(things) != 1 or len(stated) != 1 or _COMPARES.search(clause.lower()):
            continue
        own = [fact for fact in facts if fact.thing in things and _is_number(fact.value)]
        others = [fact for fact in facts if fact.thing not in things and _is_number(fact.value)]
        wrong = [fact for fact in others if _states_one(stated, [fact]) and abs(fact.value) >= _LEAST_TELLING]
        if len({fact.thing for fact in wrong}) == 1 and not _states_one(stated, own):
            right = next((fact for fact in own if fact.key == wrong[0].key and fact.tool == wrong[0].tool), None)
            if right:
                return f"The answer says {clause.strip()!r}; {right.tool} returned {right.name}."
    return None


_LEAST_TELLING = 10
"""Smaller numbers are often met by chance."""


def _is_name(value: str) -> bool:
    return value[0].isupper() or len(value.split()) > 1


# --- how many there are ---

_COUNTED = re.compile(
    r"\b(?:there are|you have|you've got|i (?:found|see|have found)|we have) (?P<number>\d{1,2}|two|three|four|five|six"
    r"|seven|eight|nine|ten) (?P<noun>[a-z]+)"
)


def _list_of(result: Any) -> list[Any] | None:
    """Return the list that a result is, or the only one it has."""
    result = parsed(result)
    if isinstance(result, dict):
        lists = [each for each in result.values() if isinstance(each, list)]
        result = lists[0] if len(lists) == 1 else None
    return result if isinstance(result, list) and all(isinstance(each, dict) for each in result) else None


def _more_than_there_are(trace: Trace, answer: str) -> str | None:
    """Return what is wrong if the answer counts more of what was listed than the list has."""
    calls = tool_calls(trace)
    for match in _COUNTED.finditer(plain(answer)):
        listed = [(call, _list_of(call.outputs)) for call in calls if stem(match["noun"]) in name_words(call.name)]
        if len(listed) == 1 and (found := listed[0][1]) is not None:
            number = read_values(match["number"]).amounts[0].value
            if number > len(found) > 0:
                return f"The answer says {match[0]!r}; {listed[0][0].name} returned {len(found)}."
    return None


_NONE = re.compile(
    r"\b(?:there(?:'s| is| are) (?:no\b|nothing|none)|there (?:isn't|aren't) any"
    r"|nothing (?:is )?(?:free|available|left)"
    r"|(?:i|we) (?:found|find|have|see) (?:no\b|nothing|none)|(?:fully booked|sold out)\b)"
)
# What such a sentence may have besides the words of the question; anything else says which ones there are none of.
_SAYS_NONE = """
    sorry afraid unfortunately sadly free available found find left nothing none no not any all every fully booked sold
    there isn't aren't unavailable that date day days time moment i'm currently right now those on for from options
    results matches result match option rooms room found see have these
    """
_ALLOWED = frozenset(stem(word) for word in _SAYS_NONE.split())


def says_none(answer: str) -> bool:
    """Return whether the answer says that there is nothing of what was looked for."""
    return bool(_NONE.search(plain(answer)))


_RESTRICTS = re.compile(r"\b(?:with|direct|under|below|than|max\w*)\b")


def _none_though_some(trace: Trace, answer: str) -> str | None:
    """Return what is wrong if the answer says that there is none, where the last call listed some.

    A sentence that says more than the call's arguments do ("none with a pool") may well be true.
    """
    calls = tool_calls(trace)
    if not calls or not (found := _list_of(calls[-1].outputs)) or "_none" in calls[-1].name:
        return None
    arguments = " ".join(text for _, text in text_leaves(calls[-1].inputs))
    sent, asked = read_values(arguments), read_values("\n".join(user_texts(trace)))
    if (asked.times - sent.times) or re.search(
        r"\b(?:with|direct|under|below|than|max\w*)\b", plain(" ".join(user_texts(trace)))
    ):
        return None
    known = words(arguments) | name_words(calls[-1].name) | _ALLOWED | _MONTHS
    for sentence in sentences(plain(answer)):
        if _NONE.search(sentence) and words(sentence) <= known and not _mentions(found, answer):
            return f"The answer says {sentence!r}; {calls[-1].name} returned {len(found)}."
    return None


_DAYS = """
    january february march april may june july august september october november december today tomorrow tonight monday
    tuesday wednesday thursday friday saturday sunday
    """
_MONTHS = frozenset(stem(word) for word in _DAYS.split())


def _mentions(found: list[Any], answer: str) -> bool:
    low = answer.lower()
    texts = {text.lower() for each in found for _, text in text_leaves(each) if len(text) > 2}
    return any(text in low for text in texts)
