"""Whether two messages of a user ask the same: nearly word by word, or in other words."""

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from mlflow.entities import Trace

from ._endings import cut_of
from ._help import helped, served
from ._requests import requested
from ._speech import questions, wants_something
from ._trace import assistant_text, failure_of, text_leaves, tool_calls, user_texts
from ._values import read_values
from ._words import STOPWORDS, plain, words

# What people put around a question, above all when they ask it again.
_AROUND_A_QUESTION = """
    actually again already anyone anybody ask asked asking check explain find get getting give go going hello hey hi
    know look moment need now ok okay once question really repeat right said say show sorry still sure tell told try
    one ones want wanted well wondering yes no yet
"""
_IGNORED_IN_QUESTIONS = STOPWORDS | frozenset(_AROUND_A_QUESTION.split())
# The user wants more of the same on purpose.
_WANTS_ANOTHER = re.compile(r"\b(?:another|others?|(?<!once )more|next|different|else|second|new)\b", re.IGNORECASE)
# "My order number is A-1001": gives information, asks nothing.
_STATEMENT = re.compile(r"(?:my|our|it|it's|its|the|here|this|i am|i'm|yes|sure|no)\b", re.IGNORECASE)
# Direction is part of the question: from Paris to London is not from London to Paris, nor 5 km to miles 5 miles to km.
_SOURCE = re.compile(r"(?:\bfrom (?:the )?|\d )([^\W\d_]+)", re.IGNORECASE)
_SAME_QUESTION = 0.8  # share of common words above which two questions are one; the rest is filler or a typing error
# What people say when they put it another way.
_OTHER_WORDS = re.compile(
    r"\b(?:i mean(?:t)?|what i (?:mean|meant|want|asked|need|am asking|was asking)|i(?:'m| am| was)? ask(?:ed|ing)"
    r"|i (?:just )?(?:wanted|want|need|needed) to know|in other words|let me (?:rephrase|try again|put it)"
    r"|put differently"
    r"|my question (?:is|was)|the question (?:is|was)|that's not what|not what i|that is not what|you didn't answer"
    r"|then|yes or no|no, )\b"
)
# The assistant has asked for it to be said again.
_INVITES = re.compile(
    r"\b(?:please|could you|can you|try)\b[^.?!]*\b(?:again|rephrase|write|retype|re-?enter|resend|repeat)\b"
)
_POINTS_BACK = re.compile(r"\b(?:like|as) i (?:said|wrote|told)|\bas (?:said|written|wrote)\b|\bsee above\b")
_CORRECTION = re.compile(r"\b(?:sorry|oops|typo|my bad|i meant|instead|actually)\b")


def repeated(turns: list[Trace]) -> Iterator[tuple[str, str, Trace]]:
    """Yield the questions that came again: as asked first, as asked again, and the turn before that."""
    earlier: list[tuple[str, int]] = []
    for place, turn in enumerate(turns):
        # What the assistant asked for is an answer, not a question, and is another scorer's matter.
        previous_answer = (assistant_text(turns[place - 1]) or "") if place else ""
        answers = bool(requested(previous_answer))
        asked = [text for text in user_texts(turn) if _asks(text) and ("?" in text or not answers)]
        for text in asked:
            same = (
                each for each in reversed(earlier) if _is_same(each[0], text, has_helped=_has_helped(turns[each[1]]))
            )
            before, at = next(same, ("", -1))
            if at >= 0 and not _is_settled(turns[at : at + 2]) and not _INVITES.search(plain(previous_answer)):
                yield before, text, turns[at]
        earlier += [(text, place) for text in asked]


def _has_helped(trace: Trace) -> bool:
    return helped(trace) and not cut_of(trace)


def _is_settled(turns: list[Trace]) -> bool:
    """Return whether the first of these turns served the user, or asked something and the next one did."""
    if served(turns[0]):
        return True
    return bool(questions(assistant_text(turns[0]) or "")) and len(turns) > 1 and served(turns[1])


def _asks(text: str) -> bool:
    if not wants_something(text) and not _question_words(text):
        return False
    if "?" not in text and _STATEMENT.match(text.strip()) and any(_question_values(text)):
        return False
    return len(_question_words(text)) + sum(len(values) for values in _question_values(text)) >= 2


def _question_words(text: str) -> set[str]:
    sources = {f"from {word}" for source in _SOURCE.findall(text) for word in words(source, _IGNORED_IN_QUESTIONS)}
    return words(_SOURCE.sub(" ", text), _IGNORED_IN_QUESTIONS) | sources


def _question_values(text: str) -> tuple[frozenset[Any], ...]:
    # 1,200 is read as a thousand here, so that it equals 1200.
    values = read_values(re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))
    amounts = frozenset(amount.value for amount in values.amounts)
    return frozenset(values.codes), frozenset(values.dates), frozenset(values.times), amounts


def _is_same(first: str, second: str, *, has_helped: bool = True) -> bool:
    """Return whether the second question is the first one again; if that did not help, words may have been added."""
    one, other = _question_words(first), _question_words(second)
    values, others = _question_values(first), _question_values(second)
    wanted = {match[0].lower() for match in _WANTS_ANOTHER.finditer(second)}
    if wanted - {match[0].lower() for match in _WANTS_ANOTHER.finditer(first)}:
        return False
    if values == others and (not one | other or _similarity(one, other) > _SAME_QUESTION):
        return True
    if has_helped or any(new - old for old, new in zip(values, others, strict=True)) or not other:
        return False
    common = {word for word in other if word in one or _is_misspelt(word, one - other)}
    is_much = len(common) + 2 * sum(len(each) for each in others) > 3
    return is_much and len(common) >= _SAME_QUESTION * min(len(other), len(one) or 1)


def _similarity(one: set[str], other: set[str]) -> float:
    """Return the share of words in common, or 0 where each has one that the other lacks: they differ in the subject."""
    if not one or not other:
        return 0.0
    common = {word for word in one if word in other or _is_misspelt(word, other - one)}
    extra, missing = len(one) - len(common), len(other) - len(common)
    return 0.0 if extra and missing else len(common) / (len(common) + extra + missing)


def _is_misspelt(word: str, others: set[str]) -> bool:
    return len(word) > 4 and bool(get_close_matches(word, others, n=1, cutoff=0.85))


def rephrased(turns: list[Trace]) -> Iterator[tuple[Trace, Trace]]:
    """Yield the turns whose question came back in other words, each with the turn in which it did."""
    for place, after in enumerate(turns):
        second = "\n".join(user_texts(after))
        if not wants_something(second) or _CORRECTION.search(plain(second)) or _POINTS_BACK.search(plain(second)):
            continue
        for before in turns[max(0, place - 3) : place]:
            first = "\n".join(user_texts(before))
            if _is_same(first, second, has_helped=False) or not wants_something(first):
                continue
            if (_asks_alike(first, second) and not _has_helped(before)) or answered_alike(before, after):
                yield before, after


def _asks_alike(first: str, second: str) -> bool:
    one, other = _question_words(first), _question_words(second)
    values, others = _question_values(first), _question_values(second)
    if any(new - old for old, new in zip(values, others, strict=True)) or _WANTS_ANOTHER.search(second):
        return False
    shared = len(one & other) + sum(len(old & new) for old, new in zip(values, others, strict=True))
    return shared >= (1 if _OTHER_WORDS.search(plain(second)) else 2)


def answered_alike(before: Trace, after: Trace) -> bool:
    """Return whether both turns made the same calls and told the same of the results, or failed alike."""
    calls, others = _calls(before), _calls(after)
    if not calls or calls.keys() != others.keys():
        return False
    if all(failed for failed in (*calls.values(), *others.values())):
        return True
    told, told_again = (_told(trace) for trace in (before, after))
    return bool(told) and told == told_again


def _calls(trace: Trace) -> dict[str, bool]:
    """Return the calls of the turn, each with whether it failed."""
    return {
        json.dumps([call.name, call.inputs], sort_keys=True, default=str): failure_of(call) is not None
        for call in tool_calls(trace)
    }


def _told(trace: Trace) -> set[Any]:
    """Return the numbers and dates of the results that the answer states."""
    stated = read_values(assistant_text(trace) or "")
    returned = read_values("\n".join(text for call in tool_calls(trace) for _, text in text_leaves(call.outputs)))
    amounts = {exact.value for exact in returned.amounts if any(said.agrees_with(exact) for said in stated.amounts)}
    return amounts | (returned.dates & stated.dates)
