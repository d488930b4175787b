"""How one conversation went, over all its turns. True is a pass; None where a scorer has nothing to judge.

They go by wording, in English: no language model is asked. What they cannot see is said in each docstring.
"""

import re
from difflib import get_close_matches
from typing import Any

from mlflow.entities import Feedback, Trace
from mlflow.genai.scorers import scorer

from ._trace import (
    CODE,
    PLACEHOLDER,
    STOPWORDS,
    assistant_text,
    has_failed,
    in_order,
    read_values,
    tool_calls,
    user_texts,
    words,
)

# --- questions asked again ---

# What people put around a question, above all when they ask it again.
_AROUND_A_QUESTION = """
    actually again already anyone anybody ask asked asking check explain find get getting give go going hello hey hi
    know look moment need now ok okay once question really repeat right said say show sorry still sure tell told try
    want wanted well wondering yes no yet
"""
_IGNORED_IN_QUESTIONS = STOPWORDS | frozenset(_AROUND_A_QUESTION.split())
# The user wants more of the same on purpose.
_WANTS_ANOTHER = re.compile(r"\b(?:another|others?|(?<!once )more|next|different|else|second|new)\b", re.IGNORECASE)
# "My order number is A-1001": gives information, asks nothing.
_STATEMENT = re.compile(r"(?:my|our|it|it's|its|the|here|this|i am|i'm|yes|sure|no)\b", re.IGNORECASE)
# Direction is part of the question: from Paris to London is not from London to Paris, nor 5 km to miles 5 miles to km.
_SOURCE = re.compile(r"(?:\bfrom (?:the )?|\d )([^\W\d_]+)", re.IGNORECASE)
_SAME_QUESTION = 0.8  # share of common words above which two questions are one; the rest is filler or a typing error


@scorer
def no_repeated_question(session: list[Trace]) -> Feedback | None:
    """Pass if the user never had to ask (nearly) the same question or make the same request again.

    Two questions are the same if one has all the words of the other and little more, spelling errors and filler aside.
    A question with another number, date, code or other word is a different one, as is one for "another" or "more".
    Asking again because a run failed counts. Messages of a single meaningful word ("thanks", "help") do not.

    Cannot see: a repetition in quite different words, or one that leaves out the number named the first time.
    Takes for a repetition what the user repeats for fun ("roll the dice") or to see whether something has changed.
    """
    turns = [trace for trace in in_order(session) if user_texts(trace)]
    if len(turns) < 2:
        return None
    earlier: list[tuple[str, set[str], Any]] = []
    previous_answer = ""
    for turn in turns:
        # What the assistant asked for is an answer, not a question, and is another scorer's matter.
        answers = bool(_requested(previous_answer))
        asked = [text for text in user_texts(turn) if _asks(text) and ("?" in text or not answers)]
        previous_answer = assistant_text(turn) or ""
        questions = [(text, _question_words(text), _question_values(text)) for text in asked]
        for text, its_words, its_values in questions:
            for before, other_words, other_values in earlier:
                same = its_values == other_values and _similarity(its_words, other_words) > _SAME_QUESTION
                if same and not _WANTS_ANOTHER.search(text):
                    return Feedback(value=False, rationale=f"Asked again: {before.strip()!r}, then {text.strip()!r}")
        earlier += questions
    return Feedback(value=True, rationale=f"No question came twice in {len(turns)} turns.")


def _asks(text: str) -> bool:
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


def _similarity(one: set[str], other: set[str]) -> float:
    """Return the share of words in common, or 0 where each has one that the other lacks: they differ in the subject."""
    if not one or not other:
        return 0.0
    common = {word for word in one if word in other or _is_misspelt(word, other - one)}
    extra, missing = len(one) - len(common), len(other) - len(common)
    return 0.0 if extra and missing else len(common) / (len(common) + extra + missing)


def _is_misspelt(word: str, others: set[str]) -> bool:
    return len(word) > 4 and bool(get_close_matches(word, others, n=1, cutoff=0.85))


# --- information asked for twice ---

# The pieces of information an assistant asks for. In this order: what one matches is not read again by the next, so the
# address in "e-mail address" is no postal address. A group tells two of a kind apart: return date and start date.
_NUMBERED = "order|tracking|invoice|account|customer|member(?:ship)?|booking|reservation|confirmation|policy|serial"
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("email", re.compile(r"\be-?mails?(?: address)?\b")),
    ("phone", re.compile(r"\b(?:(?:tele)?phone|mobile|cell)(?: number)?\b")),
    ("card", re.compile(r"\b(?:credit |debit )?card(?: number| details)?\b")),
    ("number", re.compile(rf"\b({_NUMBERED})[ -]?(?:number|no\b|id\b|code|reference|#)")),
    ("postal code", re.compile(r"\b(?:zip|post(?:al)?)[ -]?code\b")),
    ("birthday", re.compile(r"\b(?:date of birth|birth ?da(?:y|te))\b")),
    ("date", re.compile(r"\b(?:([a-z-]+) )?dates?\b")),
    ("address", re.compile(r"\b(?:(billing|delivery|shipping|home|work) )?address\b")),
    ("name", re.compile(r"\b(?:(first|last) )?name\b")),
    ("time", re.compile(r"\b(?:(arrival|departure|start|end) )?time\b")),
    ("quantity", re.compile(r"\bhow many ([a-z]+)")),
    ("detail", re.compile(r"\b(city|country|location|size|colou?r|budget|quantity|amount|model|reason|destination)\b")),
)
_QUALIFIES_NOTHING = frozenset(
    {"what", "which", "the", "your", "a", "exact", "preferred", "specific", "correct", "full"}
)

_TELL = r"(?:provide|share|tell|give|send|confirm|specify|enter|type|repeat|let me know|remind)"
_REQUEST = re.compile(
    rf"\b(?:could|can|would|will) you (?:please |also |kindly |just )*{_TELL}\b"
    rf"|\b(?:please|kindly) (?:also |kindly |just )*{_TELL}\b"
    r"|\b(?:may|can|could) i (?:please |also )?(?:have|get|ask for|know)\b"
    r"|\b(?:tell|give|send) me\b|\blet me know\b|\bdo you have (?:your|the|an?)\b|\byou (?:can )?(?:provide|share)\b"
    r"|\bneed (?:to know |to have )?(?:your|the)\b|^(?:and |also,? )?your\b"
)
_WH_REQUEST = re.compile(r"\b(?:what|which|how many)\b")
# From here on a sentence says what the information is for, and may name other pieces of it.
_PURPOSE = re.compile(r"\b(?:so|in order|to|for|because|since|if|used|associated|linked|on|where)\b")
# Someone else's, or a further one: not what was given before.
_FURTHER = re.compile(
    r"\b(?:another|other|second|new|old|previous|different|next|alternative|recipient|friend|guest|passenger)\b"
)
# What was given did not work, so that asking again is right.
_REJECTS = re.compile(
    r"couldn't find|could not find|can't find|cannot find|unable to find|not found|doesn't (?:exist|match|seem|look)"
    r"|does not (?:exist|match)|invalid|incorrect|not valid|isn't valid|isn't right|no (?:order|account|booking|record)"
    r"|double[- ]check|typo"
)
_REFUSES = re.compile(r"\b(?:don't|do not|not sure|no idea|why|later|can't|cannot|rather not|won't|no)\b")
_CHANGES_SUBJECT = re.compile(r"\b(?:another|other|second|different|new)\b")
_GIVES_NAME = re.compile(r"\bmy name(?:'s| is)\b|<(?:NAME|PERSON):")
_ORDER_CODE = re.compile(
    r"(?<![\w-])#?[A-Z]{1,4}-?\d{3,}\b|\border(?:number|no\.?|id|is|#|:|\s)*#?\d{4,}", re.IGNORECASE
)
_NOT_AN_ORDER = re.compile(
    rf"\b(?:sku|product|item|model|flight|version|error|{_NUMBERED.removeprefix('order|')})\b", re.IGNORECASE
)


@scorer
def no_information_asked_twice(session: list[Trace]) -> Feedback | None:
    """Pass if the assistant never asked for a piece of information that the user had already given.

    Knows order and other reference numbers, e-mail, phone, card, names, addresses, dates, times, quantities and a few
    more by their English names. Given is what answered an earlier request, and an e-mail, phone, card or order number
    or name that the user gave unasked. Asking again is right when the assistant says that what it got did not work,
    asks for a further or another person's one, or the user has turned to another order or had not answered.

    Cannot see: requests in other words ("who am I talking to?"), or whether an answer fits a request that asked for
    several things at once, unless its form tells (a number, a date).
    """
    given: set[str] = set()
    requested: set[str] = set()
    has_asked = False
    for trace in in_order(session):
        for text in user_texts(trace):
            if _CHANGES_SUBJECT.search(text.lower()):
                given.clear()
            given |= _volunteered(text) | {kind for kind in requested if _answers(text, kind, len(requested))}
        answer = assistant_text(trace)
        if answer is None:
            continue
        requested = _requested(answer)
        has_asked = has_asked or bool(requested)
        if again := sorted(requested & given):
            return Feedback(value=False, rationale=f"Asked again, though given before: {', '.join(again)}")
    return Feedback(value=True, rationale="Nothing was asked for twice.") if has_asked else None


def _requested(answer: str) -> set[str]:
    """Return the kinds of information that the assistant asks for."""
    text = answer.lower().replace("\u2019", "'")
    if _REJECTS.search(text):
        return set()
    kinds: set[str] = set()
    for sentence in re.findall(r"[^.!?\n]+[.!?]?", text):
        request = _REQUEST.search(sentence.strip()) or (_WH_REQUEST.search(sentence) if "?" in sentence else None)
        # With a value in it, it is a question whether that value is right.
        if request and not _FURTHER.search(sentence) and not CODE.search(sentence) and not PLACEHOLDER.search(sentence):
            kinds |= _kinds_in(sentence.strip() if request.re is _REQUEST else sentence, request)
    return kinds


def _kinds_in(sentence: str, request: re.Match[str]) -> set[str]:
    purpose = _PURPOSE.search(sentence, request.end())
    asked = sentence[request.start() : purpose.start() if purpose else None]
    kinds = set()
    for kind, pattern in _KINDS:
        for match in pattern.finditer(asked):
            qualifier = match[1] if pattern.groups else None
            kinds.add(f"{qualifier} {kind}" if qualifier and qualifier not in _QUALIFIES_NOTHING else kind)
        asked = pattern.sub(" ", asked)
    return kinds


def _volunteered(text: str) -> set[str]:
    """Return the kinds of information whose form gives them away, wherever the user mentions them."""
    kinds = {kind for kind in ("email", "phone", "card") if re.search(rf"<{kind}[A-Z_]*:", text, re.IGNORECASE)}
    if "@" in text:
        kinds.add("email")
    if _GIVES_NAME.search(text):
        kinds.add("name")
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
    return requested_at_once == 1 and not _evades(text)


def _evades(text: str) -> bool:
    return "?" in text or bool(_REFUSES.search(text.lower().replace("\u2019", "'")))


# --- errors ---


@scorer
def errors_resolved(session: list[Trace]) -> Feedback | None:
    """Pass if every tool that failed in the conversation worked in a later call; None where no tool failed.

    Goes by the tool's name and its last call: whether the later call was for the same purpose is not looked at.
    """
    failed: set[str] = set()
    open_errors: set[str] = set()
    for trace in in_order(session):
        for call in tool_calls(trace):
            if has_failed(call):
                failed.add(call.name)
                open_errors.add(call.name)
            else:
                open_errors.discard(call.name)
    if not failed:
        return None
    if open_errors:
        return Feedback(value=False, rationale=f"Failed and never worked again: {', '.join(sorted(open_errors))}")
    return Feedback(value=True, rationale=f"Worked again after a failure: {', '.join(sorted(failed))}")
