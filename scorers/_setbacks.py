"""Which turns of a conversation brought the user nothing, by what they are and by what the user says next."""

import re
from functools import cached_property

from ._asking import asked_again
from ._help import is_alike
from ._questions import answered_alike, repeated, rephrased
from ._speech import advises, is_filler
from ._trace import failure_of, may_pass, tool_calls
from ._turns import Turn
from ._words import plain, sentences, words

_TROUBLE = re.compile(
    r"(?<!no )(?<!any )\b(?:failed|error|problem|trouble|issue|went wrong|not work|didn't work|unsuccessful"
    r"|could not|couldn't)\b"
)


class Setbacks:
    """The turns that brought the user nothing. Each is looked at when it is asked for: most never are."""

    def __init__(self, turns: list[Turn]) -> None:
        """Take the turns of one conversation, oldest first."""
        self._turns = turns
        self._reasons: dict[int, str | None] = {}

    def __contains__(self, place: object) -> bool:
        """Return whether the turn at that place is one."""
        return isinstance(place, int) and self.reason(place) is not None

    def reason(self, place: int) -> str | None:
        """Return why the turn at that place brought the user nothing, None if it did."""
        if place not in self._reasons:
            self._reasons[place] = self._reason(place)
        return self._reasons[place]

    @cached_property
    def _came_again(self) -> set[int]:
        """What the user had to ask again after, by identity."""
        befores = [before for before, _ in rephrased(self._turns)] + [before for *_, before in repeated(self._turns)]
        return {id(before) for before in befores}

    @cached_property
    def _asked_again(self) -> set[int]:
        return {place for place, _ in asked_again(self._turns)[0]}

    def _reason(self, place: int) -> str | None:
        turn, before = self._turns[place], self._turns[:place]
        if id(turn) in self._came_again:
            return "had to ask again"
        if place in self._asked_again:
            return "asked for what it had"
        if any(answered_alike(other, turn) for other in before if id(other) in self._came_again):
            return "the same as before"
        return _fault_of(turn, before)


def _fault_of(turn: Turn, before: list[Turn]) -> str | None:
    """Return why the turn by itself got the user no nearer to what they want, None if it did."""
    answer = turn.answer or ""
    if turn.failing:
        reasons = [reason for call in tool_calls(turn.trace) if (reason := failure_of(call)) is not None]
        is_reason = turn.failing == "an error" and any(explains(answer, each) for each in reasons)
        return None if is_reason else turn.failing
    if turn.working:
        return None
    if _TROUBLE.search(plain(answer)) and not advises(answer) and not turn.questions:
        return "an error"
    if "?" in turn.text and answer and all(is_filler(sentence) for sentence in sentences(answer)):
        return "nothing said" if turn.wants else None
    if any(is_alike(answer, other.answer) for other in before if other.answer):
        return "said before"
    return None


_OF_ERRORS = frozenset({"whil", "erro", "fail", "inpu", "inva", "vali", "numb", "valu", "requ", "tool", "prob", "curr"})


def explains(answer: str, reason: str) -> bool:
    """Return whether the answer gives the reason of a failure, one that lies in what was asked for."""
    if may_pass(reason):
        return False
    # "division" and "divide" have their beginning in common.
    common = {word[:4] for word in words(reason)} & {word[:4] for word in words(answer)}
    return len(common - _OF_ERRORS) > 1
