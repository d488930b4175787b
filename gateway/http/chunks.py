"""A run's item-level events as Chat Completions chunks.

Contract: OpenAI's API reference, "Chat Completions", streaming.
"""

from typing import Any


class ChatChunks:
    """Turns the events of one run into the chunks of one chat completion.

    A chat completion is one message: its content is the text of all the run's messages, its tool calls are those that
    the client is to answer. What the agent does with its own tools, and what it thinks, has no place in it.

    Args:
        frame: what every chunk begins with: ``id``, ``object``, ``created`` and ``model``.
        client_tools: names of the tools that are the client's.
    """

    def __init__(self, frame: dict[str, Any], client_tools: frozenset[str]):
        self._frame = frame
        self._client_tools = client_tools
        self._writing: dict[str, str] = {}
        """Which item was last written, by the field of the message."""
        self._calls: dict[str, int] = {}
        """Numbers of the client's calls, by their items' ids."""

    def start(self) -> dict[str, Any]:
        """Return the first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def feed(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the chunks that follow from one event of `gateway.runs.items`: one or none."""
        match event:
            case {"type": "response.output_text.delta"}:
                return [self._text("content", event)]
            case {"type": "response.refusal.delta"}:
                return [self._text("refusal", event)]
            case {"type": "response.output_item.added", "item": {"type": "function_call"} as call}:
                return [self._call(call)] if call["name"] in self._client_tools else []
            case {"type": "response.function_call_arguments.delta", "item_id": item_id} if item_id in self._calls:
                return [self._tool_call(item_id, {"function": {"arguments": event["delta"]}})]
            case _:
                return []

    def finish(self, usage: dict[str, Any] | None) -> list[dict[str, Any]]:
        """Return the last chunks.

        Args:
            usage: token counts in chat form, for a chunk of their own at the very end; ``None``: not asked for.
        """
        last = self._chunk({}, "tool_calls" if self._calls else "stop")
        return [last] if usage is None else [last, self._frame | {"choices": [], "usage": usage}]

    def _text(self, field: str, event: dict[str, Any]) -> dict[str, Any]:
        item_id = event["item_id"]
        gap = "" if self._writing.get(field, item_id) == item_id else "\n\n"
        self._writing[field] = item_id
        return self._chunk({field: gap + event["delta"]})

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        self._calls[call["id"]] = len(self._calls)
        function = {"name": call["name"], "arguments": ""}
        return self._tool_call(call["id"], {"id": call["call_id"], "type": "function", "function": function})

    def _tool_call(self, item_id: str, fields: dict[str, Any]) -> dict[str, Any]:
        return self._chunk({"tool_calls": [{"index": self._calls[item_id], **fields}]})

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._frame | {"choices": [choice]}
