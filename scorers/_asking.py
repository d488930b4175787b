"""Whether the assistant asks for what it was given or had asked for before."""

import re

from mlflow.entities import Trace

from ._help import working_calls
from ._requests import FURTHER, NUMBERED, REJECTS, requested
from ._speech import questions
from ._trace import assistant_text, user_texts
from ._values import read_values
from ._words import STOPWORDS, words

_ALIKE = 0.5  # share of words in common, from which on two questions of the assistant are one

_REFUSES = re.compile(r"\b(?:don't|do not|not sure|no idea|why|later|can't|cannot|rather not|won't|no)\b")
_CHANGES_SUBJECT = re.compile(r"\b(?:another|other|second|different|new)\b")
_GIVES_NAME = re.compile(
    r"\b[Mm]y name(?:'s| is)\b|<(?:NAME|PERSON):|\b(?:[Ff]or|[Nn]ame|I'm|I am|by me) \(?[^\W\d_a-z]\w+ [^\W\d_a-z]\w+"
    r"|(?:^|[,;:(] ?)[^\W\d_a-z][^\W\d_A-Z]+ (?:de |van |von |di )?[^\W\d_a-z][^\W\d_A-Z]+,? (?:\(?\d|age|aged)"
)
_GIVES_AGE = re.compile(
    r"\b(?:aged?|i'm|i am|is) \d{1,3}\b|\b\d{1,3} ?(?:years?(?: old)?|yrs?|y/?o|y)\b"
    r"|[^\W\d_a-z][^\W\d_A-Z]+ [^\W\d_a-z][^\W\d_A-Z]+,? \(?\d{1,2}\b(?![:./%\w-]| ?(?:[ap]m|eur|usd|nights?"
    r"|days?|people|adults?))"
)
_GIVES_CLASS = re.compile(
    r"\b(?:first|1st|second|2nd|business|economy|standard|premium|coach)[ -]class\b", re.IGNORECASE
)
_GIVES_DAY = re.compile(
    r"\b(?:today|tonight|tomorrow|tmrw|(?:next|this|on) (?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?"
    r"|sun)(?:day)?)\b",
    re.IGNORECASE,
)
_ORDER_CODE = re.compile(
    r"(?<![\w-])#?[A-Z]{1,4}-?\d{3,}\b|\border(?:number|no\.?|id|is|#|:|\s)*#?\d{4,}", re.IGNORECASE
)
_NOT_AN_ORDER = re.compile(
    rf"\b(?:sku|product|item|model|flight|version|error|{NUMBERED.removeprefix('order|')})\b", re.IGNORECASE
)


def asked_again(turns: list[Trace]) -> tuple[list[tuple[int, str]], bool]:
    """Return the turns in which the assistant asks again, with what, and whether it asks for anything at all."""
    given: set[str] = set()
    asked_for: set[str] = set()
    before: list[str] = []
    ever: list[str] = []
    again: list[tuple[int, str]] = []
    for place, trace in enumerate(turns):
        texts = user_texts(trace)
        for text in texts:
            if _CHANGES_SUBJECT.search(text.lower()):
                given.clear()
                before.clear()
            given |= _volunteered(text) | {kind for kind in asked_for if _answers(text, kind, len(asked_for))}
        answer = assistant_text(trace)
        if answer is None:
            continue
        asked_for, asked = requested(answer), questions(answer)
        if repeated := sorted(asked_for & given):
            again.append((place, f"{', '.join(repeated)}, given before"))
        elif any(not _evades(text) for text in texts):
            pairs = ((each, _same_as(each, ever if _AGAIN.search(each) else before)) for each in asked)
            again += [(place, f"{same!r}, then {each!r}") for each, same in pairs if same][:1]
        ever += asked
        # A question is open only until something has come of it.
        before = [*before, *asked] if not working_calls(trace) else asked
    return again, bool(ever)


_AGAIN = re.compile(r"\bagain\b|\bremind me\b")
_AROUND = "please tell give share provide know like want need okay ok sure right really confirm again get go help"
_IN_QUESTIONS = STOPWORDS | frozenset(_AROUND.split())


def _same_as(question: str, before: list[str]) -> str | None:
    """Return the question before that asks the same, by its words, codes and numbers aside."""
    if REJECTS.search(question) or FURTHER.search(question):
        return None
    wanted = words(question, _IN_QUESTIONS) | read_values(question).codes
    for each in before:
        other = words(each, _IN_QUESTIONS) | read_values(each).codes
        if wanted and other and len(wanted & other) / len(wanted | other) >= _ALIKE and len(wanted & other) > 1:
            return each
    return None


def _volunteered(text: str) -> set[str]:
    """Return the kinds of information whose form gives them away, wherever the user mentions them."""
    kinds = {kind for kind in ("email", "phone", "card") if re.search(rf"<{kind}[A-Z_]*:", text, re.IGNORECASE)}
    if "@" in text:
        kinds.add("email")
    if _GIVES_NAME.search(text):
        kinds.add("name")
    if _GIVES_AGE.search(text):
        kinds.add("age")
    if _GIVES_CLASS.search(text):
        kinds.add("class")
    if re.search(r"\d ?(?:%|per ?cent\b)", text):
        kinds.add("share")
    if _GIVES_DAY.search(text) or read_values(text).dates:
        kinds.add("date")
    if _ORDER_CODE.search(text) and not _NOT_AN_ORDER.search(text):
        kinds.add("order number")
    return kinds


def _answers(text: str, kind: str, requested_at_once: int) -> bool:
    """Return whether the user's message can be what was asked for."""
    values = read_values(text)
    last_word = kind.rpartition(" ")[2]
    if kind in {"email", "phone", "card"}:
        return kind in _volunteered(text) or (
            kind != "email" and any(amount.value > 999_999 for amount in values.amounts)
        )
    if last_word == "number":
        return bool(values.codes) or any(amount.value > 99 for amount in values.amounts)
    if last_word in {"quantity", "time"}:
        return bool(values.amounts or values.times)
    if last_word in {"date", "birthday"}:
        return bool(values.dates) or (requested_at_once == 1 and not _evades(text))
    if kind == "age":
        return any(0 < amount.value < 120 for amount in values.amounts)
    if kind == "share":
        return bool(values.amounts)
    return requested_at_once == 1 and not _evades(text)


def _evades(text: str) -> bool:
    return "?" in text or bool(_REFUSES.search(text.lower().replace("\u2019", "'")))
