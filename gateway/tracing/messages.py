"""Between the two ways of writing a conversation: Responses items (the SDK's) and chat messages (MLflow's and others').

Contracts: OpenAI's API reference, "Responses" and "Chat Completions".
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def from_items(items: Any, instructions: str | None = None) -> list[dict[str, Any]]:
    """Return chat messages for a text or Responses items; ``instructions`` become the system message."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": instructions}] if instructions else []
    if isinstance(items, str):
        return [*messages, {"role": "user", "content": items}]
    for raw in items:  # dicts, or objects of the SDK
        item: Mapping[str, Any] = raw if isinstance(raw, dict) else raw.model_dump(exclude_none=True)
        match item.get("type", "message"):
            case "message":
                messages.append({"role": item.get("role", "assistant"), "content": text_of(item.get("content"))})
            case "function_call":
                _add_call(messages, item)
            case "function_call_output":
                messages.append(
                    {"role": "tool", "tool_call_id": item.get("call_id"), "content": text_of(item.get("output"))}
                )
            case "reasoning":
                pass  # summaries of a model's thoughts are no part of the conversation
            case other:
                messages.append({"role": "assistant", "content": json.dumps({"type": other, **item}, default=str)})
    return messages


def answer(output: Sequence[Any]) -> dict[str, Any]:
    """Return the one assistant message that a model's output items make up."""
    parts = from_items(output)
    calls = [call for part in parts for call in part.get("tool_calls", ())]
    text = "\n".join(part["content"] for part in parts if part.get("content"))
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    return message | {"tool_calls": calls} if calls else message


def to_items(messages: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return Responses items for chat messages."""
    items: list[dict[str, Any]] = []
    for message in messages:
        role, content = message["role"], message.get("content")
        if role == "tool":
            output = {"call_id": message["tool_call_id"], "output": text_of(content)}
            items.append({"type": "function_call_output", **output})
            continue
        if content:
            items.append({"role": role, "content": content if isinstance(content, str) else _parts(content, role)})
        for call in message.get("tool_calls") or ():
            function = call["function"]
            items.append(
                {
                    "type": "function_call",
                    "call_id": call["id"],
                    "name": function["name"],
                    "arguments": function["arguments"],
                }
            )
    return items


def text_of(content: Any) -> str:
    """Return the text of a message's content: a string, or a list of parts of which the text parts count."""
    if content is None or isinstance(content, str):
        return content or ""
    if isinstance(content, list):
        texts = [_part_text(part) for part in content]
        return "\n".join(text for text in texts if text)
    return json.dumps(content, default=str)


def _part_text(part: Any) -> str:
    if not isinstance(part, Mapping):
        return str(part)
    if "text" in part or "refusal" in part:
        return str(part.get("text") or part.get("refusal") or "")
    return f"[{part.get('type', 'part')}]"


def _add_call(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Add a tool call; calls made in one go belong to one assistant message."""
    function = {"name": item.get("name"), "arguments": item.get("arguments")}
    call = {"id": item.get("call_id"), "type": "function", "function": function}
    if messages and messages[-1]["role"] == "assistant":
        messages[-1].setdefault("tool_calls", []).append(call)
    else:
        messages.append({"role": "assistant", "content": None, "tool_calls": [call]})


def _parts(content: list[Mapping[str, Any]], role: str) -> list[dict[str, Any]]:
    """Return chat content parts as Responses parts."""
    kind = "output_text" if role == "assistant" else "input_text"
    parts: list[dict[str, Any]] = []
    for part in content:
        if part.get("type") == "text":
            parts.append({"type": kind, "text": part["text"]})
        elif part.get("type") == "image_url":
            image = part["image_url"]
            url = image["url"] if isinstance(image, Mapping) else image
            parts.append({"type": "input_image", "image_url": url, "detail": "auto"})
        else:
            parts.append(dict(part))
    return parts
