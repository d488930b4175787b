"""A conversation, turn by turn, with what more than one rule asks of a turn."""

import re
from functools import cached_property

from mlflow.entities import Span, Trace

from ._endings import cut_of
from ._help import failing_of, served, working_calls
from ._requests import requested
from ._speech import questions, wants_something
from ._trace import assistant_text, in_order, offered_tools, user_texts
from ._values import Values, read_values
from ._words import plain

# People who type leave apostrophes out: "doesnt", "cant", "thats", "youre".
_NOT = re.compile(r"\b(do|does|did|is|are|was|were|ca|wo|could|would|should|has|have|had)nt\b")
_SHORTENED = {"im": "i'm", "ive": "i've", "youre": "you're", "youve": "you've", "u": "you", "r": "are"}
_SHORTENED |= {"thats": "that's", "whats": "what's", "theres": "there's", "theyre": "they're", "its": "it's"}
_SHORT = re.compile(rf"\b(?:{'|'.join(_SHORTENED)})\b(?!')")


def spoken(text: str) -> str:
    """Return what a user wrote in lower case, with the apostrophes that they left out."""
    return _SHORT.sub(lambda match: _SHORTENED[match[0]], _NOT.sub(r"\1n't", plain(text)))


class Turn:
    """One turn of a conversation; each thing about it is worked out once, when it is first asked for."""

    def __init__(self, trace: Trace) -> None:
        """Read the turn from its trace."""
        self.trace = trace

    @cached_property
    def texts(self) -> list[str]:
        """The user's messages, as they were written."""
        return user_texts(self.trace)

    @cached_property
    def text(self) -> str:
        """The user's messages in one."""
        return "\n".join(self.texts)

    @cached_property
    def spoken(self) -> str:
        """The same in lower case, with all apostrophes."""
        return spoken(self.text)

    @cached_property
    def wants(self) -> bool:
        """Whether the user asks for something."""
        return wants_something(self.text)

    @cached_property
    def answer(self) -> str | None:
        """What the assistant answered; None if the run failed."""
        return assistant_text(self.trace)

    @cached_property
    def stated(self) -> Values:
        """The values in the answer."""
        return read_values(self.answer or "")

    @cached_property
    def questions(self) -> list[str]:
        """What the assistant asks the user."""
        return questions(self.answer or "")

    @cached_property
    def requested(self) -> set[str]:
        """The kinds of information that the assistant asks for."""
        return requested(self.answer or "")

    @cached_property
    def working(self) -> list[Span]:
        """The tool calls that worked."""
        return working_calls(self.trace)

    @cached_property
    def tools(self) -> set[str]:
        """The names of the tools on offer."""
        return set(offered_tools(self.trace))

    @cached_property
    def failing(self) -> str | None:
        """Why the turn brought the user nothing, None if it did."""
        return failing_of(self.trace)

    @cached_property
    def is_cut(self) -> bool:
        """Whether the answer breaks off."""
        return cut_of(self.trace) is not None

    @cached_property
    def has_served(self) -> bool:
        """Whether tools did what was asked and the answer tells of it, to its end."""
        return served(self.trace) and not self.is_cut


def turns_of(session: list[Trace]) -> list[Turn]:
    """Return the turns of a session, oldest first."""
    return [Turn(trace) for trace in in_order(session)]


def with_user(session: list[Trace]) -> list[Turn]:
    """Return the turns in which the user said something, oldest first."""
    return [turn for turn in turns_of(session) if turn.texts]
