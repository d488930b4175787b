"""Which of the client's tools the offline model calls: the one that shares most words with what the user asks."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeGuard

from agents import FunctionTool, Tool

from gateway.runs.offline.wording import topics, words


class _Match(NamedTuple):
    """Words that a text has in common with a tool's name, and with its description; more is better."""

    name: int
    description: int


def is_client_tool(tool: Tool) -> TypeGuard[FunctionTool]:
    """Return whether the client of a request brought the tool, and will run it."""
    return isinstance(tool, FunctionTool) and getattr(tool, "is_client_tool", False)


def choose_client_tool(
    text: str, tools: Sequence[Tool], tool_choice: Any, decided: Collection[str]
) -> FunctionTool | None:
    """Return the client's tool to call; ``None``: the agent's own decision stands.

    A tool whose name the text speaks of is called, unless the text speaks more of one that the agent decided to call.
    A tool that matches by its description alone is called only if the agent decided to call none.

    Args:
        text: what the user asks.
        tools: all tools of the request.
        tool_choice: the request's: with ``none`` there is no such tool, with ``required`` always, with a tool's name
            it is that one; anything else leaves it open.
        decided: names of the tools that the agent decided to call.
    """
    offered = [tool for tool in tools if is_client_tool(tool)]
    if tool_choice not in (None, "auto", "required") or not offered:
        return next((tool for tool in offered if tool.name == tool_choice), None)
    spoken_of = set(words(text))
    best = max(offered, key=lambda tool: _match(spoken_of, tool.name, tool.description))
    match = _match(spoken_of, best.name, best.description)
    rival = max((_match(spoken_of, name).name for name in decided), default=0)
    wins = match.name >= max(rival, 1) or (match.description and not decided)
    return best if wins or tool_choice == "required" else None


def _match(spoken_of: set[str], name: str, description: str = "") -> _Match:
    # A tool named by nothing but common words, such as `search`, has no others to be known by.
    named = topics(name) or set(words(name))
    return _Match(len(spoken_of & named), len(spoken_of & topics(description)))
