"""Whether an answer draws on what the tools returned."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import date

from mlflow.entities import Span, Trace

from ._arithmetic import follows
from ._states import state_of_number, states_in, states_said
from ._trace import FOR_MACHINES, assistant_text, failure_of, text_leaves, tool_rounds, user_texts
from ._values import Amount, Values, read_values
from ._words import STOPWORDS, name_parts, name_words, plain, stem, words

# Results that only say that it worked, or did not.
_ACKNOWLEDGEMENTS = frozenset(
    {"done", "error", "false", "no", "none", "not", "null", "ok", "result", "sent", "success"}
)
_ACKNOWLEDGEMENTS |= {"successful", "successfully", "true", "yes", "found"}
_UNDISTINCTIVE = STOPWORDS | _ACKNOWLEDGEMENTS
_RELATIVE_DAY = re.compile(
    r"\b(?:today|tonight|tomorrow|yesterday|(?:in|within) [\w-]+ (?:days?|weeks?))\b", re.IGNORECASE
)
_WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
# A longer text is prose: an answer may use a part of it, so none of its values has to show.
_PROSE_WORDS = 12
_NOTHING = frozenset(("none", "no", "0", "0.0", "nothing", "false"))


def evidence_of_use(trace: Trace) -> tuple[bool | None, str]:
    """Return whether the answer states something that the last working calls returned, and what; None: that is open."""
    answer = assistant_text(trace)
    rounds = [[call for call in calls if failure_of(call) is None] for calls in tool_rounds(trace)]
    rounds = [calls for calls in rounds if calls]
    if not answer or not rounds:
        return None, ""
    asked = user_texts(trace)
    sent = [text for calls in rounds for call in calls for _, text in text_leaves(call.inputs)]
    given, echoed = (_Evidence.of([("", text) for text in texts]) for texts in ([*asked, *sent], sent))
    for steps_back, calls in enumerate(reversed(rounds)):
        evidence = _Evidence.of([leaf for call in calls for leaf in text_leaves(call.outputs)])
        shown = _confirmed(evidence, echoed, answer) or _shown(evidence, given, answer)
        names = _names_of(calls)
        if shown:
            return True, f"The answer states what {names} returned: {shown}."
        # Only the last round has to show: those before it may have been steps on the way.
        if shown is False and steps_back == 0:
            return False, f"Nothing of what {names} returned shows in the answer."
    return None, ""


def _names_of(calls: Iterable[Span]) -> str:
    return ", ".join(dict.fromkeys(call.name for call in calls))


@dataclass
class _Evidence:
    """What a result states. `facts` has to show, at least one of it; `hints` and `words` prove use where they show."""

    facts: Values = field(default_factory=Values)
    hints: Values = field(default_factory=Values)
    names: set[str] = field(default_factory=set)
    states: set[str] = field(default_factory=set)
    """Short values in lower case, such as "in transit"."""
    words: set[str] = field(default_factory=set)
    texts: list[str] = field(default_factory=list)
    """Longer values, as they are."""
    denied: set[str] = field(default_factory=set)
    """Words of keys whose value is no or none."""
    implied: set[tuple[int, int]] = field(default_factory=set)
    """States that numbers stand for, such as a delay of none."""

    @classmethod
    def of(cls, leaves: list[tuple[str, str]]) -> "_Evidence":
        evidence = cls()
        for key, text in leaves:
            is_prose = len(text.split()) > _PROSE_WORDS
            is_hint = is_prose or FOR_MACHINES.search(key.lower())
            _extend(evidence.hints if is_hint else evidence.facts, read_values(text))
            evidence.names |= set() if is_prose else _names(text)
            if len(text.split()) <= 2 and not is_hint:
                evidence.states |= {plain(text).replace("_", " ").strip()}
            evidence.words |= words(text, _UNDISTINCTIVE)
            evidence.texts += [text] if is_prose else []
            evidence.denied |= set(name_parts(key)) - STOPWORDS if text.lower() in _NOTHING else set()
            evidence.implied |= state_of_number(key, text)
        return evidence


def _extend(values: Values, more: Values) -> None:
    values.codes |= more.codes
    values.dates |= more.dates
    values.times |= more.times
    values.amounts += more.amounts


def _names(text: str) -> set[str]:
    """Return the stems of the capitalised words of a short value; "Delivered" and "Pending" are states, not names."""
    found = re.findall(r"(?<![\w<])[^\W\d_a-z][a-z\u00df-\u024f]{2,}(?![\w:])", text)
    is_name = len(found) == len(re.findall(r"[^\W\d_]+", text))
    kept = found if is_name else [word for word in found if not text.lstrip().startswith(word)]
    return {stem(w.lower()) for w in kept if w.lower() not in _UNDISTINCTIVE and not w.endswith(("ed", "ing"))}


def _shown(evidence: _Evidence, given: _Evidence, answer: str) -> str | bool | None:
    """Return what of the evidence shows in the answer, False if nothing does, None if that cannot be told."""
    stated, answer_words = read_values(answer), words(answer, _UNDISTINCTIVE)
    known = [given.facts, given.hints]
    facts, hints = _new(evidence.facts, known), _new(evidence.hints, known)
    new_words = evidence.words - given.words
    names = evidence.names & new_words
    common = _common(facts, stated, answer) or _common(hints, stated, answer) or ", ".join(sorted(names & answer_words))
    if common:
        return common
    said = plain(answer)
    state = next(
        (each for each in sorted(evidence.states - given.states) if len(each) > 3 and _stands_in(each, said)), None
    )
    if state and words(state, _UNDISTINCTIVE):
        return state
    if told := _told_otherwise(evidence, answer):
        return told
    # Nought is more often said in words: nothing, free, none left.
    numbers = [amount for amount in facts.amounts if amount.value]
    # A number of its own, where the result has another one, is a contradiction that shared words do not mend.
    own = _new(stated, known).amounts
    if numbers and own:
        return _computed(own, numbers, known)
    matched = new_words & answer_words
    if len(matched) >= max(1, min(4, round(0.15 * len(new_words)))) and matched:
        return ", ".join(sorted(matched))
    has_facts = facts.codes or facts.dates or facts.times or numbers or names
    return False if has_facts or len(new_words) > _PROSE_WORDS // 2 else None


def _told_otherwise(evidence: _Evidence, answer: str) -> str | None:
    """Return what of the result the answer has in other words, or of a text word for word."""
    returned = {state for each in evidence.states for state in states_in(each)} | evidence.implied
    if returned & states_said(answer)[1]:
        return "its state, in other words"
    said = plain(answer)
    # "no refund" tells of a refund that is "none".
    held = (key for key in sorted(evidence.denied) if key in said)
    denied = next((key for key in held if re.search(rf"\b(?:no|not|non|n't) ?-?\w* ?{key}", said)), None)
    if denied:
        return f"no {denied}"
    runs = {run for text in evidence.texts for run in _runs(text)} & set(_runs(answer))
    return next((" ".join(run) for run in sorted(runs) if not STOPWORDS.issuperset(run)), None)


_RUN = 4
"""Words in a row that are hardly the same by chance."""


def _runs(text: str) -> Iterator[tuple[str, ...]]:
    found = re.findall(r"[a-z']+", plain(text))
    return (tuple(found[place : place + _RUN]) for place in range(len(found) - _RUN + 1))


def _stands_in(state: str, text: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(state)}(?!\w)", text) is not None


def _computed(own: list[Amount], numbers: list[Amount], known: list[Values]) -> str | bool:
    """Return the number of the answer that follows from those of the result, but not from the others alone."""
    others = [amount.value for values in known for amount in values.amounts]
    returned = [amount.value for amount in numbers]
    for amount in own:
        if follows(amount, [*returned, *others]) and not follows(amount, others):
            return f"{amount.value:g}, which follows from {', '.join(f'{value:g}' for value in returned[:3])}"
    return False


def _confirmed(evidence: "_Evidence", echoed: "_Evidence", answer: str) -> str | None:
    """Return a value that the user had named, the tool returned and the answer confirms."""
    known = [echoed.facts, echoed.hints]
    facts = _new(evidence.facts, known)
    numbers = Values(dates=facts.dates, times=facts.times, amounts=[amount for amount in facts.amounts if amount.value])
    return _common(numbers, read_values(answer), "")


def _new(values: Values, known: list[Values]) -> Values:
    """Return `values` without those that are in `known`."""
    amounts = {amount.value for other in known for amount in other.amounts}
    return Values(
        codes=values.codes.difference(*(other.codes for other in known)),
        dates=values.dates.difference(*(other.dates for other in known)),
        times=values.times.difference(*(other.times for other in known)),
        amounts=[amount for amount in values.amounts if amount.value not in amounts],
    )


def _common(wanted: Values, stated: Values, answer: str) -> str | None:
    """Return one value of `wanted` that the answer states, in whatever form."""
    if codes := wanted.codes & stated.codes:
        return min(codes)
    if times := wanted.times & stated.times:
        return min(times)
    for year, month, day in sorted(wanted.dates):
        if any((month, day) == other[1:] for other in stated.dates) or _names_the_day(answer, year, month, day):
            return f"{year}-{month:02}-{day:02}" if year else f"{month:02}-{day:02}"
    matches = (exact for exact in dict.fromkeys(wanted.amounts) if _is_stated(exact, stated.amounts))
    return next((f"{exact.value:g}" for exact in matches), None)


def _is_stated(exact: Amount, stated: list[Amount]) -> bool:
    return any(amount.agrees_with(exact) for amount in stated)


def _names_the_day(answer: str, year: int, month: int, day: int) -> bool:
    """Return whether the answer gives the date as a weekday or relative to today, which is taken on trust."""
    if _RELATIVE_DAY.search(answer):
        return True
    try:
        return bool(year) and _WEEKDAYS[date(year, month, day).weekday()] in answer.lower()
    except ValueError:
        return False


# What a price is asked for as, and how a duration is.
_PRICE = frozenset(stem(word) for word in ("price", "prices", "cost", "costs", "fare"))


def left_out(trace: Trace) -> str | None:
    """Return the key that the user asked for by name, of which a working call has values and the answer none."""
    answer = assistant_text(trace) or ""
    asked = {stem(word) for text in user_texts(trace) for word in re.findall(r"[a-z]{4,}", plain(text))}
    if not asked or "?" in answer:
        return None
    found: dict[str, Values] = {}
    for call in (call for calls in tool_rounds(trace) for call in calls if failure_of(call) is None):
        # What the tool is about is named with every question to it.
        subject = name_words(call.name).union(*(name_words(key) for key, _ in text_leaves(call.inputs)))
        for key, text in text_leaves(call.outputs):
            parts = name_words(key) - subject
            if any(_is_same_word(part, word) for part in parts for word in subject):
                continue
            is_price = bool(parts & _PRICE and asked & _PRICE)
            is_asked = is_price or any(_is_same_word(part, word) for part in parts for word in asked)
            if is_asked and len(text.split()) == 1:
                _extend(found.setdefault(key, Values()), read_values(text))
    stated = read_values(answer)
    for key, values in found.items():
        wanted = Values(dates=values.dates, times=values.times, amounts=[each for each in values.amounts if each.value])
        if (wanted.dates or wanted.times or wanted.amounts) and not _common(wanted, stated, answer):
            return key
    return None


def _is_same_word(one: str, other: str) -> bool:
    """Return whether two stems are of one word: arrives and arrival."""
    return one == other or (len(one) > 4 and len(other) > 4 and one[:5] == other[:5])
