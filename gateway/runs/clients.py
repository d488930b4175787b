"""The client of the models behind OpenAI's API, without the walk over every request.

OpenAI's client walks each request along its type declarations before it sends it, to rename fields and to write out
dates and files. That costs more than half a millisecond of CPU an input item, so that a conversation of a hundred items
takes longer to send than to run. The SDK's requests are JSON already. So what is long in them, the conversation and the
tools, goes into the body as it is (``extra_body``, which the client merges unseen); the rest keeps its usual way.
"""

from functools import cached_property
from typing import Any

from openai import AsyncOpenAI
from openai.resources.chat import AsyncChat
from openai.resources.chat.completions import AsyncCompletions
from openai.resources.responses import AsyncResponses


class PlainClient(AsyncOpenAI):
    """`AsyncOpenAI` for requests that are JSON already."""

    @cached_property
    def responses(self) -> "_PlainResponses":
        """Return the Responses API."""
        return _PlainResponses(self)

    @cached_property
    def chat(self) -> "_PlainChat":
        """Return the Chat Completions API."""
        return _PlainChat(self)


class _PlainResponses(AsyncResponses):
    async def create(self, **fields: Any) -> Any:
        """Create a response; the arguments are those of the client's own method."""
        return await super().create(**_passed_by(fields, "input", "tools"))


class _PlainCompletions(AsyncCompletions):
    async def create(self, **fields: Any) -> Any:
        """Create a completion; the arguments are those of the client's own method."""
        return await super().create(**_passed_by(fields, "messages", "tools"))


class _PlainChat(AsyncChat):
    @cached_property
    def completions(self) -> _PlainCompletions:
        """Return the completions."""
        return _PlainCompletions(self._client)


def _passed_by(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """Return the arguments with the lists among ``names`` moved past the client's walk; what its caller added wins."""
    plain = {name: fields[name] for name in names if isinstance(fields.get(name), list)}
    if not plain:
        return fields
    # Empty in their old place: the client insists on some of them.
    emptied: dict[str, Any] = {name: [] for name in plain}
    return fields | emptied | {"extra_body": plain | (fields.get("extra_body") or {})}
