"""Spares each run the SDK's identity of its agents, where nobody asks for it.

At the begin of a run the SDK sorts the agents of each name, twice, by a text that it makes of all they are: tools,
schemas, settings. That is a sixth of the work of a run, and for an agent that is alone with its name it compares
nothing. Here the text is made when it is compared. What the SDK computes stays the same.
"""

from collections.abc import Iterator
from functools import total_ordering
from typing import Any

from agents import _run_state_agent_identity as identities

_Key = tuple[int, str, int]


@total_ordering
class DeferredKey:
    """A key to sort by that is made when it is needed."""

    __slots__ = ("_arguments", "_key")

    def __init__(self, agent: Any, **arguments: Any):
        """Take the arguments of the SDK's own function."""
        self._arguments = (agent, arguments)
        self._key: _Key | None = None

    def made(self) -> _Key:
        """Return the key that the SDK's own function gives."""
        if self._key is None:
            agent, arguments = self._arguments
            self._key = _made_at_once(agent, **arguments)
        return self._key

    def __iter__(self) -> Iterator[Any]:
        """Unpack as the tuple that it stands for."""
        return iter(self.made())

    def __eq__(self, other: object) -> bool:
        """Compare as the tuple that it stands for."""
        return isinstance(other, DeferredKey) and self.made() == other.made()

    def __lt__(self, other: "DeferredKey") -> bool:
        """Compare as the tuple that it stands for."""
        return self.made() < other.made()

    __hash__ = None  # type: ignore[assignment]


_made_at_once: Any = getattr(identities, "_agent_identity_sort_key", None)


def defer_identities() -> bool:
    """Have the SDK make the keys when they are needed; ``False``: this version of it makes none of the kind."""
    if _made_at_once is None:
        return False
    identities._agent_identity_sort_key = DeferredKey  # type: ignore[assignment]  # noqa: SLF001 - there is no other way
    return True
