"""What the scorers read out of a trace: its messages, its tool calls and their results, the tools on offer."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from typing import Any

from mlflow.entities import Span, SpanStatusCode, SpanType, Trace

# --- messages ---

# Where agents that do not speak in messages put the question and the answer.
_QUESTION_KEYS = ("input", "question", "query", "message", "prompt", "text")
_ANSWER_KEYS = ("output", "response", "answer", "content", "text", "result")


def content_text(content: Any) -> str:
    """Return the text of a message's content: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(part["text"] for part in parts if isinstance(part, dict) and isinstance(part.get("text"), str))


def _messages(value: Any) -> list[dict[str, Any]]:
    return [message for message in value if isinstance(message, dict)] if isinstance(value, list) else []


def _texts(messages: list[dict[str, Any]], role: str) -> list[str]:
    texts = [content_text(message.get("content")) for message in messages if message.get("role") == role]
    return [text for text in texts if text.strip()]


def _plain_text(value: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((value[key] for key in keys if isinstance(value.get(key), str)), None)


def answer_text(outputs: Any) -> str | None:
    """Return the assistant's last message in `outputs`, or None where there is none.

    Knows plain text, `{"messages": [...]}`, the Responses form `{"output": [...]}`, chat completions' `choices` and a
    text under a usual key such as `answer`.
    """
    if isinstance(outputs, str):
        return outputs
    if not isinstance(outputs, dict):
        return None
    choices = [choice.get("message") for choice in _messages(outputs.get("choices"))]
    texts = _texts(_messages(outputs.get("messages") or outputs.get("output") or choices), "assistant")
    return texts[-1] if texts else _plain_text(outputs, _ANSWER_KEYS)


def root_of(trace: Trace) -> Span | None:
    """Return the span of the run itself; None if the trace has no spans."""
    return next((span for span in trace.data.spans if span.parent_id is None), None)


def assistant_text(trace: Trace) -> str | None:
    """Return what the agent answered in this turn; None when it gave no answer, as when the run failed."""
    root = root_of(trace)
    return answer_text(root.outputs) if root else None


def user_texts(trace: Trace) -> list[str]:
    """Return what the user wrote in this turn: of a whole history, what follows the last answer."""
    root = root_of(trace)
    inputs = root.inputs if root else None
    if isinstance(inputs, str):
        return [inputs]
    if not isinstance(inputs, dict):
        return []
    messages = _messages(inputs.get("messages") or inputs.get("input"))
    answered = max((place for place, each in enumerate(messages) if each.get("role") == "assistant"), default=-1)
    texts = _texts(messages[answered + 1 :], "user")
    text = None if messages else _plain_text(inputs, _QUESTION_KEYS)
    return [text] if text else texts


def _longest_messages(trace: Trace) -> list[dict[str, Any]]:
    inputs = [span.inputs for span in _model_calls(trace)]
    return max((_messages(each.get("messages")) for each in inputs if isinstance(each, dict)), key=len, default=[])


def instructions(trace: Trace) -> list[str]:
    """Return what the model was told by its instructions, as far as its calls show them."""
    found = [each for each in _longest_messages(trace) if each.get("role") in ("system", "developer")]
    return [text for text in (content_text(message.get("content")) for message in found) if text]


def earlier_messages(trace: Trace, *roles: str) -> list[str]:
    """Return the texts of the turns before this one, oldest first, of these roles: user, assistant, tool; or of all."""
    messages = _longest_messages(trace)
    asked = user_texts(trace)
    # This turn begins with what the user said last: everything up to there is from before.
    places = [place for place, each in enumerate(messages) if each.get("role") == "user"]
    before = messages[: places[-len(asked)]] if asked and len(places) >= len(asked) else []
    wanted = roles or ("user", "assistant", "tool")
    return [content_text(each.get("content")) for each in before if each.get("role") in wanted and each.get("content")]


def in_order(session: list[Trace]) -> list[Trace]:
    """Return the turns of a session, oldest first."""
    return sorted(session, key=lambda trace: trace.info.timestamp_ms)


# --- spans ---


def spans_of(trace: Trace, *span_types: str) -> list[Span]:
    """Return the spans of these types in the order in which they started."""
    spans = [span for span in trace.data.spans if span.span_type in span_types]
    return sorted(spans, key=lambda span: span.start_time_ns)


def _model_calls(trace: Trace) -> list[Span]:
    return spans_of(trace, SpanType.CHAT_MODEL)


def tool_calls(trace: Trace) -> list[Span]:
    """Return the tool calls in the order in which they started."""
    return spans_of(trace, SpanType.TOOL)


def tool_rounds(trace: Trace) -> list[list[Span]]:
    """Return the tool calls grouped by the model call that asked for them."""
    spans = spans_of(trace, SpanType.TOOL, SpanType.CHAT_MODEL)
    return [list(group) for kind, group in groupby(spans, key=lambda span: span.span_type) if kind == SpanType.TOOL]


def functions_of(span: Span) -> list[dict[str, Any]]:
    """Return the tools that a model call was offered, each as name, description and parameters."""
    tools = span.get_attribute("mlflow.chat.tools")
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
    return [each for each in functions if isinstance(each, dict) and isinstance(each.get("name"), str)]


def offered_tools(trace: Trace) -> dict[str, dict[str, Any]]:
    """Return the tools that the turn's model calls were offered, by name."""
    return {each["name"]: each for span in _model_calls(trace) for each in functions_of(span)}


# --- results ---

# What stands under such a key is for machines; a good answer may well leave it out.
FOR_MACHINES = re.compile(
    r"(?:^|_)(?:id|ids|uuid|guid|token|hash|etag|cursor|url|uri|link|version|timestamp|(?:created|updated)(?:_at)?)$"
)

_ERROR_TEXT = re.compile(
    r"\s*(?:[\w.]*(?:Error|Exception|ERROR)|error|failed|failure)\s*:|\s*an error occurred|\s*traceback \(most recent",
    re.IGNORECASE,
)


def has_failed(span: Span) -> bool:
    """Return whether the span ended with an error."""
    return bool(span.status.status_code == SpanStatusCode.ERROR)


def failure_of(call: Span) -> str | None:
    """Return why a tool call failed, None if it worked.

    A failure is a span that ended with an error, or a result whose form says so: `{"error": ...}`, `isError`, a text
    that begins with "Error:". A result that is about errors is none.
    """
    if has_failed(call):
        attributes = [event.attributes or {} for event in call.events if event.name == "exception"]
        messages = [each.get("exception.message") for each in attributes]
        return str(next((message for message in messages if message), call.status.description or "no message"))
    return _reported_error(parsed(call.outputs))


_PASSING = re.compile(
    r"time(?:d)?[ -]?out|connect|reset|network|unreachable|unavailable|not (?:available|reachable|respond)"
    r"|does not answer"
    r"|overload|busy|rate.?limit|too many requests|temporar|try again|later|\b(?:429|50[0234])\b|upstream|gateway",
    re.IGNORECASE,
)


def may_pass(reason: str) -> bool:
    """Return whether a failure is of a kind that can be gone at the next attempt: a timeout, a server that is busy."""
    return bool(_PASSING.search(reason))


def _reported_error(result: Any) -> str | None:
    if isinstance(result, str):
        return result.strip() if _ERROR_TEXT.match(result) else None
    if not isinstance(result, dict):
        return None
    error = result.get("error") or result.get("errors") or result.get("exception")
    flagged = any(result.get(key) is True for key in ("isError", "is_error"))
    if not (isinstance(error, str | dict | list) or error is True or flagged or result.get("status") == "error"):
        return None
    return str(error if isinstance(error, str | dict) else result.get("message") or result.get("content") or "error")


def parsed(value: Any) -> Any:
    """Return what a text holds that is JSON, anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in {"{", "["}:
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value within a result or an argument as (the key it stands under, the text, number or boolean)."""
    value = parsed(value)
    if isinstance(value, dict):
        items = {"page_content": value["page_content"]} if "page_content" in value else value
        for name, inner in items.items():
            yield from leaves(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, key)
    elif value is not None:
        yield key, value


def text_leaves(value: Any) -> Iterator[tuple[str, str]]:
    """Yield each value within a result but booleans as (the key it stands under, its text)."""
    return ((key, str(inner)) for key, inner in leaves(value) if not isinstance(inner, bool))
