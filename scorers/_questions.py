"""Whether two messages of a user ask the same: nearly word by word, or in other words."""

import json
import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import cached_property
from typing import Any

from ._speech import wants_something
from ._trace import failure_of, text_leaves, tool_calls
from ._turns import Turn, spoken
from ._values import Values, read_values
from ._words import STOPWORDS, words

# What people put around a question, above all when they ask it again.
_AROUND_A_QUESTION = """
    actually again already anyone anybody ask asked asking check explain find get getting give go going hello hey hi
    know look moment need now ok okay once question really repeat right said say show sorry still sure tell told try
    one ones want wanted well whats wondering yes no yet mean bro dude mate
"""
_IGNORED_IN_QUESTIONS = STOPWORDS | frozenset(_AROUND_A_QUESTION.split())
# The user wants more of the same on purpose.
_WANTS_ANOTHER = re.compile(r"\b(?:another|others?|(?<!once )more|next|different|else|second|new)\b", re.IGNORECASE)
# "My order number is A-1001": gives information, asks nothing.
_STATEMENT = re.compile(r"(?:my|our|it|it's|its|the|here|this|i am|i'm|yes|sure|no)\b", re.IGNORECASE)
# Direction is part of the question: from Paris to London is not from London to Paris, nor 5 km to miles 5 miles to km.
_SOURCE = re.compile(r"(?:\bfrom (?:the )?|\d )([^\W\d_]+)", re.IGNORECASE)
_SAME_QUESTION = 0.8  # share of common words above which two questions are one; the rest is filler or a typing error
_COPIED = 4  # words from which on a message that stands whole in a later one was copied
# The assistant has asked for it to be said again.
_INVITES = re.compile(
    r"\b(?:please|could you|can you|try)\b[^.?!]*\b(?:again|rephrase|write|retype|re-?enter|resend|repeat)\b"
)
_POINTS_BACK = re.compile(r"\b(?:like|as) i (?:said|wrote|told)|\bas (?:said|written|wrote)\b|\bsee above\b")
_CORRECTION = re.compile(r"\b(?:sorry|oops|typo|my bad|i meant|instead|actually)\b")
# To try once more is to ask in no other words, and "ok: ..." goes on from what was said.
_GOES_ON = re.compile(
    r"^(?:ok|okay|fine|alright|great|cool|thanks|perfect)\b"
    r"|\b(?:try|check|look|do it|run it) (?:it )?(?:again|once more|anyway)\b|\bretry\b|\banother (?:try|go)\b"
)
# The user says that the answer was none: of itself enough, whatever the answer looks like.
_NO_ANSWER = re.compile(
    r"\b(?:that|this|it)(?:'s| is| was|'s) (?:really |quite |still )?not (?:really |quite |exactly |at all )?"
    r"(?:what i|my question|an answer|the question|the answer)"
    r"|\bnot (?:quite |really )?what i (?:ask|want|mean|need)\w*"
    r"|\b(?:doesn't|didn't|does not|did not|haven't|not) (?:really |even )?answer(?:ed|ing)? (?:my|the|me|what)\b"
    r"|\bi (?:was asking|asked|had asked|am asking|'m asking)\b(?! (?:for|the) (?:it|them)\b)|\bi'm asking\b"
    r"|\bmy question (?:is|was)\b|\bin other words\b|\blet me (?:rephrase|put it)\b|\bput differently\b"
)
# What people say when they put it another way, or will have a plain answer.
_OTHER_WORDS = re.compile(
    r"\bi mean\b|\bwhat i (?:mean|meant|want|asked|need)\b|\bi (?:just )?(?:wanted|want|need|needed) to know\b"
    r"|\byes or no\b|\bor not\b|\bthen\b|^no[,.! ]+(?!thank)|^so\b"
)
_PLAIN_ANSWER = re.compile(r"\b(?:yes or no|or not)\b[ ?.!]*$|^(?:no[,. ]+)?i mean\b")


class Question:
    """One message of a user, by the words and values that it asks with."""

    def __init__(self, text: str) -> None:
        """Take the message as it was written."""
        self.text = text

    @cached_property
    def words(self) -> set[str]:
        """The stems of the words that carry meaning, with the direction: "from paris"."""
        sources = {
            f"from {word}" for source in _SOURCE.findall(self.text) for word in words(source, _IGNORED_IN_QUESTIONS)
        }
        return words(_SOURCE.sub(" ", self.text), _IGNORED_IN_QUESTIONS) | sources

    @cached_property
    def values(self) -> tuple[frozenset[Any], ...]:
        """The codes, dates, times and numbers."""
        # 1,200 is read as a thousand here, so that it equals 1200.
        values = read_values(re.sub(r"(?<=\d),(?=\d{3}\b)", "", self.text))
        amounts = frozenset(amount.value for amount in values.amounts)
        return frozenset(values.codes), frozenset(values.dates), frozenset(values.times), amounts

    @cached_property
    def asks(self) -> bool:
        """Whether it asks something, and says enough to be known again."""
        if not self.words and not any(self.values):
            return False
        if "?" not in self.text and _STATEMENT.match(self.text.strip()) and any(self.values):
            return False
        if not wants_something(self.text) and not self.words:
            return False
        return len(self.words) + sum(len(values) for values in self.values) >= 2

    @cached_property
    def spelling(self) -> str:
        """The message without capitals and punctuation."""
        return " ".join(re.findall(r"\w+", spoken(self.text)))

    def has_new_values(self, before: "Question") -> bool:
        """Whether it names a value that the one before did not."""
        return any(new - old for old, new in zip(before.values, self.values, strict=True))

    def is_copy_of(self, before: "Question") -> bool:
        """Whether the one before stands in it word by word."""
        return len(before.spelling.split()) >= _COPIED and f" {before.spelling} " in f" {self.spelling} "

    def is_same_as(self, before: "Question", *, has_helped: bool = True) -> bool:
        """Whether it is the one before again; if the answer did not help, words may have been added."""
        one, other = before.words, self.words
        wanted = {match[0].lower() for match in _WANTS_ANOTHER.finditer(self.text)}
        if wanted - {match[0].lower() for match in _WANTS_ANOTHER.finditer(before.text)}:
            return False
        if before.values == self.values and (not one | other or _similarity(one, other) > _SAME_QUESTION):
            return True
        if has_helped or self.has_new_values(before) or not other:
            return False
        common = {word for word in other if word in one or _is_misspelt(word, one - other)}
        is_much = len(common) + 2 * sum(len(each) for each in self.values) > 3
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


def repeated(turns: list[Turn]) -> Iterator[tuple[str, str, Turn]]:
    """Yield the questions that came again: as asked first, as asked again, and the turn before that."""
    earlier: list[tuple[Question, int]] = []
    replies: set[int] = set()
    for place, turn in enumerate(turns):
        # What the assistant asked for is an answer, not a question, and is another scorer's matter.
        previous = turns[place - 1] if place else None
        asked = [question for question in map(Question, turn.texts) if question.asks]
        if previous and any("?" not in question.text and _is_reply(question, previous) for question in asked):
            replies.add(place)
        for question in asked:
            same = [(each, at) for each, at in earlier if _comes_again(each, question, turns[at])]
            if not same or (previous and _INVITES.search(spoken(previous.answer or ""))):
                continue
            before, at = same[-1]
            is_copy = at not in replies and (question.is_copy_of(before) or question.spelling == before.spelling)
            if place in replies and not is_copy:
                continue
            if len({at for _, at in same}) > 1 and _has_no_news(turns[same[0][1]], turn):
                yield from ((each.text, question.text, turns[which]) for each, which in reversed(same))
            elif not _is_settled(turns, at, is_reply=is_copy and place == at + 1) or _told_other(turns[at], turn):
                yield before.text, question.text, turns[at]
        earlier += [(question, place) for question in asked]


def _is_reply(question: Question, previous: Turn) -> bool:
    return bool(previous.requested) or (bool(previous.questions) and len(question.words) < 2)


def _comes_again(before: Question, question: Question, turn: Turn) -> bool:
    if question.is_copy_of(before) and not question.has_new_values(before):
        return True
    if question.is_same_as(before):
        return True
    return question.is_same_as(before, has_helped=False) and (turn.failing is not None or turn.is_cut)


def _is_settled(turns: list[Turn], at: int, *, is_reply: bool) -> bool:
    """Return whether the turn served the user, or asked something and the next one did."""
    if turns[at].has_served:
        return True
    # Who answers a question with a copy of the first message had said it all in there.
    return not is_reply and bool(turns[at].questions) and at + 1 < len(turns) and turns[at + 1].has_served


def _outcomes(turn: Turn) -> dict[str, str]:
    """Return the calls of the turn that worked, each with its result."""
    return {json.dumps([c.name, c.inputs], sort_keys=True, default=str): str(c.outputs) for c in turn.working}


def _has_no_news(before: Turn, after: Turn) -> bool:
    """Return whether the later turn found nothing that the earlier had not: who asks a third time does not poll."""
    return _outcomes(after).items() <= _outcomes(before).items()


def _told_other(before: Turn, after: Turn) -> bool:
    """Return whether both turns found the same and the later tells other numbers of it: the first ones would not do."""
    found = _outcomes(before)
    if not found or found != _outcomes(after):
        return False
    told, other = ({amount.value for amount in turn.stated.amounts} for turn in (before, after))
    return bool(told and other) and not told & other


def rephrased(turns: list[Turn]) -> Iterator[tuple[Turn, Turn]]:
    """Yield the turns whose question came back in other words, each with the turn in which it did."""
    asked = [Question(turn.text) for turn in turns]
    for place, after in enumerate(turns):
        said = after.spoken
        if not (after.wants or _NO_ANSWER.search(said)) or _CORRECTION.search(said) or _POINTS_BACK.search(said):
            continue
        if _GOES_ON.search(said):
            continue
        for at in range(max(0, place - 3), place):
            before, first, second = turns[at], asked[at], asked[place]
            if not before.wants or second.is_same_as(first, has_helped=False) or second.is_copy_of(first):
                continue
            if _asks_alike(turns, at, first, second, said, is_next=at == place - 1) or _answered_alike(
                before, after, first, second
            ):
                yield before, after


def _asks_alike(turns: list[Turn], at: int, first: Question, second: Question, said: str, *, is_next: bool) -> bool:
    """Return whether the second question asks for the same as the first, which brought nothing."""
    before = turns[at]
    if is_next and not before.questions and _NO_ANSWER.search(said) and not before.is_cut:
        return bool(second.words)
    shared = len(first.words & second.words) + _shared_values(first, second)
    if not shared and not _PLAIN_ANSWER.search(said):
        return False
    if second.has_new_values(first) or _WANTS_ANOTHER.search(second.text) or before.is_cut:
        return False
    if is_next and shared and not before.questions and (_insists(first, second, before) or _PLAIN_ANSWER.search(said)):
        return True  # by the user alone, whatever the answer looks like
    if before.failing is None:
        return False
    if is_next and _PLAIN_ANSWER.search(said):
        return True
    if len(first.words & second.words) and (before.failing == "declined" or (is_next and _OTHER_WORDS.search(said))):
        return True
    return shared > 1


_PART = 3  # words to which one comes down who asks again for a part of the question


def _insists(first: Question, second: Question, before: Turn) -> bool:
    """Return whether the second asks for no more than a part of the first, of which the answer did not speak."""
    is_part = (
        bool(second.words)
        and second.words <= first.words
        and len(second.words) <= _PART
        and not second.spelling.startswith("and ")
    )
    return is_part and not second.words & words(before.answer or "")


def _shared_values(first: Question, second: Question) -> int:
    return sum(len(old & new) for old, new in zip(first.values, second.values, strict=True))


def _answered_alike(before: Turn, after: Turn, first: Question, second: Question) -> bool:
    """Return whether both turns got the same out of the same calls, though the second asked with words of its own."""
    if _bare(second) <= _bare(first):
        return False
    if before.working or after.working:
        return answered_alike(before, after)
    shared = len(first.words & second.words) + _shared_values(first, second)
    return shared > 0 and answered_alike(before, after)


def _bare(question: Question) -> set[str]:
    return {word.removeprefix("from ") for word in question.words}


def answered_alike(before: Turn, after: Turn) -> bool:
    """Return whether both turns made the same calls and told the same of the results, or failed alike."""
    calls, others = _calls(before), _calls(after)
    if not calls or calls.keys() != others.keys():
        return False
    if all(failed for failed in (*calls.values(), *others.values())):
        return True
    if _told_other(before, after):
        return False
    told, told_again = (_told(turn) for turn in (before, after))
    return bool(told) and told == told_again


def _calls(turn: Turn) -> dict[str, bool]:
    """Return the calls of the turn, each with whether it failed."""
    return {
        json.dumps([call.name, call.inputs], sort_keys=True, default=str): failure_of(call) is not None
        for call in tool_calls(turn.trace)
    }


def _told(turn: Turn) -> set[Any]:
    """Return the numbers and dates of the results that the answer states."""
    stated: Values = turn.stated
    returned = read_values("\n".join(text for call in tool_calls(turn.trace) for _, text in text_leaves(call.outputs)))
    amounts = {exact.value for exact in returned.amounts if any(said.agrees_with(exact) for said in stated.amounts)}
    return amounts | (returned.dates & stated.dates)
