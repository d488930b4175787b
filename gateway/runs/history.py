"""A conversation as the model is to see it: every tool call with its result, every result with its call."""

from collections.abc import Sequence
from typing import Any

from gateway.errors import InvalidRequest

NOT_ANSWERED = "This call was not carried out: it was not approved, or its result was never sent."
"""What the model reads as the result of a call that the conversation went past."""


def as_input(item: dict[str, Any]) -> dict[str, Any] | None:
    """Return an item as a model's API takes it; ``None`` if it has no place there.

    Ids are ours and mean nothing to the model's provider, which refuses those it does not know.
    """
    kind = item.get("type", "message")
    if kind in {"mcp_approval_request", "mcp_approval_response"}:
        return None
    if kind == "reasoning" and not item.get("encrypted_content"):
        return None
    return {field: value for field, value in item.items() if field not in {"id", "status"} and value is not None}


def open_calls(items: Sequence[Any]) -> set[str]:
    """Return the ids of the tool calls that have no result."""
    calls = {str(item.get("call_id")) for item in items if item.get("type") == "function_call"}
    return calls - {str(item.get("call_id")) for item in items if item.get("type") == "function_call_output"}


def join(history: Sequence[Any], items: Sequence[Any]) -> list[Any]:
    """Return history and new items as one conversation.

    Models refuse a call without a result, and a result without its call. So a call that nobody answered (an approval
    that was never given, a tool of the client that it did not run) gets a result that says so, and a result in the
    history whose call came so long before that it is cut off is left out.

    Raises:
        InvalidRequest: a new item is the result of a call that is not there.
    """
    conversation = [*history, *items]
    calls = {item.get("call_id") for item in conversation if item.get("type") == "function_call"}
    left_open = open_calls(conversation)
    for number, item in enumerate(items):
        if _answers_none(item, calls):
            raise InvalidRequest(
                f"There is no tool call {item.get('call_id')!r} that this output could answer. Send it with the "
                "session or previous_response_id of the call, or send the call along.",
                f"input[{number}].call_id",
            )
    whole: list[Any] = []
    for item in conversation:
        if _answers_none(item, calls):
            continue
        whole.append(item)
        if item.get("type") == "function_call" and item.get("call_id") in left_open:
            output = {"type": "function_call_output", "call_id": item.get("call_id"), "output": NOT_ANSWERED}
            whole.append(output)
    return whole


def _answers_none(item: Any, calls: set[Any]) -> bool:
    """Whether an item is the result of none of these calls."""
    return item.get("type") == "function_call_output" and item.get("call_id") not in calls
