"""Whether the assistant asks for what it was given or had asked for before."""

import re

from ._requests import FURTHER, NUMBERED, REJECTS
from ._turns import Turn
from ._values import read_values
from ._words import STOPWORDS, stem, words

_ALIKE = 0.5  # share of words in common, from which on two questions of the assistant are one

_REFUSES = re.compile(r"\b(?:don't|do not|not sure|no idea|why|later|can't|cannot|rather not|won't|no)\b")
_CHANGES_SUBJECT = re.compile(r"\b(?:another|other|second|different|new)\b")
_GIVES_NAME = re.compile(
    r"\b[Mm]y name(?:'s| is)\b|<(?:NAME|PERSON):|\b(?:[Ff]or|[Nn]ame|I'm|I am|by me) \(?[^\W\d_a-z]\w+ [^\W\d_a-z]\w+"
    r"|(?:^|[,;:(] ?)[^\W\d_a-z][^\W\d_A-Z]+ (?:de |van |von |di )?[^\W\d_a-z][^\W\d_A-Z]+,? (?:\(?\d|age|aged)"
)
_GIVES_AGE = re.compile(
    r"\b(?:aged?|i'm|i am|is) \d{1,3}\b(?![.,:]\d)|\b\d{1,3} ?(?:years?(?: old)?|yrs?|y/?o|y)\b"
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


def asked_again(turns: list[Turn]) -> tuple[list[tuple[int, str]], bool]:
    """Return the turns in which the assistant asks again, with what, and whether it asks for anything at all."""
    given: set[str] = set()
    asked_for: set[str] = set()
    before: list[str] = []
    ever: list[str] = []
    again: list[tuple[int, str]] = []
    for place, turn in enumerate(turns):
        for text in turn.texts:
            if _CHANGES_SUBJECT.search(text.lower()):
                given.clear()
                before.clear()
            given |= _volunteered(text) | {kind for kind in asked_for if _answers(text, kind, len(asked_for))}
        if turn.answer is None:
            continue
        asked_for, asked = turn.requested, turn.questions
        if repeated := sorted(asked_for & given):
            again.append((place, f"{', '.join(repeated)}, given before"))
        elif known := next((each for each in asked if _is_told(each, turns[: place + 1])), None):
            again.append((place, f"{known!r}, which the user had said"))
        elif asked and place + 1 < len(turns) and (why := _was_known(turns, place)):
            again.append((place, f"{asked[0]!r}, {why}"))
        elif any(not _evades(text) for text in turn.texts):
            pairs = ((each, _same_as(each, ever if _AGAIN.search(each) else before)) for each in asked)
            again += [(place, f"{same!r}, then {each!r}") for each, same in pairs if same][:1]
        ever += asked
        # A question is open only until something has come of it.
        before = [*before, *asked] if not turn.working else asked
    return again, bool(ever)


_AGAIN = re.compile(r"\bagain\b|\bremind me\b|\bonce more\b")
_HARKS_BACK = re.compile(r"\bdid you say\b|\bwhat (?:was|were) (?:that|it|those|your [\w ]+) again\b")
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


# --- what the user had said before the question ---

_HOW_MANY = re.compile(r"\bhow (?:many|much) ([a-z]{3,})\b")
_WHAT_IS = re.compile(r"\b(?:what|which)(?:'s| is| was)? (?:the |your )?(?!one|of)((?:[a-z]+ )?[a-z]{4,})\b")
_SAYS_NOTHING = frozenset({"number", "value", "thing", "kind", "sort", "part", "order", "else", "figur", "day", "time"})
# A choice that the assistant offers, and what it has found: the user can only answer with something that was named.
_OFFERS = re.compile(
    r"\bor\b|\bwhich (?:one|of)\b|\bdid you mean\b|\bdo you mean\b|\bis (?:that|it|this)\b|\bcorrect\b"
)


def _is_told(question: str, turns: list[Turn]) -> bool:
    """Return whether the user has named a number together with the very word that the question asks for.

    "How many nights?" after "2 nights", "what's the interest rate?" after "a rate of 4.5 %".
    """
    if _HARKS_BACK.search(question):
        return True
    if _OFFERS.search(question) or FURTHER.search(question) or REJECTS.search(question):
        return False
    match = _HOW_MANY.search(question) or _WHAT_IS.search(question)
    if not match:
        return False
    asked = {stem(word) for word in match[1].split()} - _SAYS_NOTHING - {stem(word) for word in STOPWORDS}
    is_counted = match.re is _HOW_MANY
    # What is the user's own stays: a budget, an age. A number of nights may have been for another hotel.
    asked_of = turns if f"your {match[1]}" in question else _since_served(turns)
    return any(_names(noun, turn.text, is_counted=is_counted) for noun in asked for turn in asked_of)


def _since_served(turns: list[Turn]) -> list[Turn]:
    """Return the turns from the last but this one that tools have answered: what was said earlier may be done with."""
    start = next((place for place in range(len(turns) - 2, -1, -1) if turns[place].working), -1)
    return turns[start + 1 :]


def _names(noun: str, text: str, *, is_counted: bool) -> bool:
    tokens = re.findall(r"\d[\d.,]*|[^\W\d_]+|%", text.lower())
    places = [place for place, token in enumerate(tokens) if stem(token) == noun]
    for place in places:
        near = tokens[max(0, place - 2) : place] if is_counted else tokens[place + 1 : place + 3]
        if any(token[0].isdigit() for token in near):
            return True
    return False


# The user says that it is all there already. Only after a question: else it can be anything.
_SAID_SO = re.compile(
    r"\b(?:as|like) (?:i (?:said|wrote|told|mentioned)|above|said|written|stated|mentioned)\b"
    r"|\bsee above\b|\bscroll up\b"
    r"|\bi (?:just |already |did |have |'ve )*(?:said|wrote|told|gave|did|sent|write|say|mentioned|given|written)\b"
    r"|\bi've (?:just |already )?(?:said|written|told|given|sent|mentioned)\b"
    r"|\balready (?:said|told|gave|sent|did|wrote)\b"
    r"|\b(?:in|is|are|was) (?:all )?(?:in )?(?:my|the|your)(?: \w+)? (?:question|message|mail|e-?mail|text|request"
    r"|riddle|post|sentence|title)\b|\bright (?:there|here|above)\b"
    r"|\byou (?:just )?(?:asked|have) (?:me )?(?:that|it|this)\b"
)


def _was_known(turns: list[Turn], place: int) -> str | None:
    """Return how the user's reply shows that the question was needless, None if it does not."""
    turn, reply = turns[place], turns[place + 1]
    if any(_OFFERS.search(each) or REJECTS.search(each) or FURTHER.search(each) for each in turn.questions):
        return None
    if REJECTS.search((turn.answer or "").lower()) or not turn.questions:
        return None
    if _SAID_SO.search(reply.spoken):
        return "and the user says that it was said"
    return "and the user can only say it again" if _is_old(reply.text, turns[: place + 1]) else None


def _is_old(reply: str, turns: list[Turn]) -> bool:
    """Return whether the reply consists of what the user had said before, and is no choice from the answer."""
    said = "\n".join(turn.text for turn in turns)
    values, known = read_values(reply), read_values(said)
    offered = turns[-1].stated
    numbers = {amount.value for amount in values.amounts}
    chosen = values.codes & offered.codes or numbers & {amount.value for amount in offered.amounts}
    spoken_words = words(reply, _IN_REPLIES)
    if chosen or "?" in reply or len(spoken_words) > _MOST_WORDS or not values.dates <= known.dates:
        return False
    old_numbers = {amount.value for amount in known.amounts}
    if values.codes or numbers:
        # A small number comes up by chance.
        is_telling = bool(values.codes) or len(numbers) > 1 or any(number > 12 for number in numbers)
        if is_telling and values.codes <= known.codes and numbers <= old_numbers and values.times <= known.times:
            return len(spoken_words - words(said)) <= (0 if not values.codes and len(numbers) == 1 else 1)
        return False
    return bool(spoken_words) and _tells(reply, spoken_words) and spoken_words <= words(said)


_MOST_WORDS = 12
_AROUND_A_REPLY = "yes yeah please sorry hello hi ok okay well sure right there here just"
_IN_REPLIES = STOPWORDS | frozenset(_AROUND_A_REPLY.split())


def _tells(reply: str, spoken_words: set[str]) -> bool:
    """Return whether words alone are telling: two of them, or a name."""
    if re.match(r"(?:yes|no|yeah|yep|nope|ok|okay|sure|please)\b", reply.strip().lower()):
        return False
    return len(spoken_words) > 1 or bool(re.search(r"[^\W\d_a-z][^\W\d_A-Z]{3,}", reply))


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
