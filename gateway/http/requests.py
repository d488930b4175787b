"""From a decoded body to the `RunRequest` that it asks for; what cannot be run is refused with the field to blame."""

from collections.abc import Mapping
from typing import Any

import agents as sdk
from openai.types.shared import Reasoning as ReasoningSetting

from gateway.errors import InvalidRequest
from gateway.http.bodies import (
    Approval,
    ChatBody,
    ChatFunctionChoice,
    ChatSchemaFormat,
    ChatTool,
    Conversation,
    FunctionChoice,
    FunctionTool,
    JsonObjectFormat,
    JsonSchemaFormat,
    ResponsesBody,
    RunBody,
    TextFormat,
    convert,
)
from gateway.runs.history import as_input
from gateway.runs.requests import (
    ApprovalAnswer,
    ClientSchema,
    ClientTool,
    RunOptions,
    RunRequest,
    client_tool,
)
from gateway.tracing import messages

SESSION_HEADERS = ("x-session-id", "x-amzn-bedrock-agentcore-runtime-session-id")
"""Headers that may carry the session's id."""

_ROLES = frozenset({"user", "assistant", "system", "developer"})
_CHAT_ROLES = _ROLES | {"tool"}
_ITEM_FIELDS = {
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
    "mcp_approval_request": (),
    "mcp_approval_response": ("approval_request_id",),
    "item_reference": ("id",),
}


class BodyRules:
    """What the settings say about bodies."""

    def __init__(self, max_items: int, *, show_tool_calls: bool = True):
        """Take the items that one request may have, and whether answers show the calls of the agent's own tools."""
        self._max_items = max_items
        self.show_tool_calls = show_tool_calls

    def check(self, items: list[Any], where: str) -> None:
        """Raise `InvalidRequest` if there are too many items."""
        if len(items) > self._max_items:
            raise InvalidRequest(
                f"{where} has {len(items)} entries; {self._max_items} are taken at once (GATEWAY_MAX_INPUT_ITEMS).",
                where,
            )


def from_responses(body: ResponsesBody, headers: Mapping[str, str], rules: BodyRules, key_id: str) -> RunRequest:
    """Return what a Responses body asks for; raise `InvalidRequest`."""
    if body.input is None and not body.approvals:
        raise InvalidRequest('The field "input" is missing: a text, or a list of Responses items.', "input")
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input or []
    rules.check(items, "input")
    for index, item in enumerate(items):
        _check_item(item, f"input[{index}]")
    answers = [item for item in items if item.get("type") == "mcp_approval_response"]
    approvals = [*(body.approvals or ()), *(_approval(item) for item in answers)]
    kept = [kept for item in items if (kept := _kept(item)) is not None]
    _check_something_to_do(kept, approvals, "input")
    if body.background and body.store is False:
        raise InvalidRequest('"background" needs "store": the result is fetched from the stored response.', "store")
    session_id = _session_id(body, headers, _conversation_id(body))
    if body.previous_response_id is not None and session_id is not None:
        if body.conversation is not None or body.session_id is not None:
            raise InvalidRequest(
                'Give either "previous_response_id" or a conversation: a response knows its own.',
                "previous_response_id",
            )
        session_id = None  # a proxy's header
    text = body.text.format if body.text else None
    return RunRequest(
        items=kept,
        agent=_agent(body),
        session_id=session_id,
        user=_user(body),
        key_id=key_id,
        previous_response_id=body.previous_response_id,
        approvals=tuple(_answer(each) for each in approvals),
        options=RunOptions(
            settings=_responses_settings(body),
            instructions=body.instructions,
            tools=_tools([(tool, tool.strict) for tool in body.tools or ()]),
            schema=_schema(text),
            context=_context(body, session_id),
        ),
        # Not storing the answer is one thing; a conversation that was named goes on all the same.
        remember=body.store is not False or body.conversation is not None or body.session_id is not None,
        stream=bool(body.stream),
        background=bool(body.background),
    )


def from_chat(body: ChatBody, headers: Mapping[str, str], rules: BodyRules, key_id: str) -> RunRequest:
    """Return what a chat body asks for; raise `InvalidRequest`."""
    if body.messages is None:
        raise InvalidRequest('The field "messages" is missing: a list of chat messages.', "messages")
    rules.check(body.messages, "messages")
    earlier, new = _split(body.messages)
    items = _chat_items(new, len(earlier))
    approvals = body.approvals or []
    _check_something_to_do(items, approvals, "messages")
    session_id = _session_id(body, headers, None)
    functions = [(tool.function, tool.function.strict) for tool in body.tools or ()]
    return RunRequest(
        items=items,
        agent=_agent(body),
        session_id=session_id,
        user=_user(body),
        key_id=key_id,
        transcript=_chat_items(earlier, 0) if earlier else None,
        approvals=tuple(_answer(each) for each in approvals),
        options=RunOptions(
            settings=_chat_settings(body),
            tools=_tools(functions),
            schema=_schema(body.response_format),
            context=_context(body, session_id),
        ),
        remember=body.store is not False or session_id is not None,
        stream=bool(body.stream),
    )


def _split(chat: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Part a whole transcript, as most chat clients send it, from the new turn at its end.

    A client that has the assistant's messages has the history: they are what the model sees, and only what follows
    the last of them is new.
    """
    last = max((index for index, each in enumerate(chat) if each.get("role") == "assistant"), default=-1)
    return (chat[: last + 1], chat[last + 1 :]) if last + 1 < len(chat) else ([], chat)


def _check_something_to_do(items: list[Any], approvals: list[Approval], where: str) -> None:
    if approvals and items:
        raise InvalidRequest("Answer approvals by themselves, and send new messages in the next request.", where)
    if approvals:
        return
    said = (messages.text_of(item.get("content", item.get("output"))) for item in items)
    answers = any(item.get("type") == "function_call_output" for item in items)
    if not answers and not any(text.strip() for text in said):
        raise InvalidRequest(
            "There is nothing to answer: the input is empty. Send at least one message with text.", where
        )


def _check_item(item: dict[str, Any], where: str) -> None:
    kind = item.get("type", "message")
    if kind == "message":
        _check_message(item, where, _ROLES)
    elif isinstance(kind, str) and kind in _ITEM_FIELDS:
        for field in _ITEM_FIELDS[kind]:
            value = item.get(field)
            if not isinstance(value, str) and not (field == "output" and _are_parts(value)):
                raise InvalidRequest(f"{where} is a {kind} and lacks a valid {field!r}.", f"{where}.{field}")
    else:
        known = ", ".join(("message", *_ITEM_FIELDS))
        raise InvalidRequest(f"{where} has type {_shown(kind)}; known types are {known}.", f"{where}.type")


def _check_message(message: dict[str, Any], where: str, roles: frozenset[str]) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in roles:
        raise InvalidRequest(
            f"{where} has role {_shown(role)}; it must be one of {', '.join(sorted(roles))}.", f"{where}.role"
        )
    calls_tools = role == "assistant" and message.get("tool_calls")
    if content is None and calls_tools:
        return
    if not isinstance(content, str) and not _are_parts(content):
        raise InvalidRequest(
            f"{where} needs 'content': a text, or a list of content parts with a type each.", f"{where}.content"
        )


def _are_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str) and isinstance(part.get("text", ""), str)
        for part in content
    )


def _shown(value: Any) -> str:
    """Return what was sent, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 50 else f"{text[:50]}..."


def _kept(item: dict[str, Any]) -> dict[str, Any] | None:
    """Return what is to be run of an item; ``None`` if nothing."""
    return item if item.get("type") == "item_reference" else as_input(item)


def _approval(item: dict[str, Any]) -> Approval:
    fields = {name: item.get(name) for name in ("approval_request_id", "approve", "reason")}
    return convert(fields, Approval)


def _answer(approval: Approval) -> ApprovalAnswer:
    return ApprovalAnswer(approval.approval_request_id, approval.approve, approval.reason)


def _chat_items(chat: list[dict[str, Any]], first: int) -> list[dict[str, Any]]:
    """Return chat messages as items; ``first`` is the place of the first one in the request."""
    for index, message in enumerate(chat, first):
        _check_message(message, f"messages[{index}]", _CHAT_ROLES)
    try:
        items = messages.to_items(chat)
    except (KeyError, TypeError) as error:
        raise InvalidRequest(
            f"messages: a tool message needs 'tool_call_id', a tool call 'id' and 'function' with 'name' and "
            f"'arguments', a text part 'text', an image part 'image_url'; missing or of the wrong type: {error}.",
            "messages",
        ) from None
    for item in items:
        content = item.get("content")
        if isinstance(content, list) and not all(isinstance(part.get("image_url", ""), str) for part in content):
            raise InvalidRequest("messages: an 'image_url' is a text, or an object with the text 'url'.", "messages")
        # What chat calls `id` and `tool_call_id` is `call_id` here.
        _check_item(item, "messages: one")
    return items


def _agent(body: RunBody) -> str | None:
    if body.agent is not None and body.model is not None and body.agent != body.model:
        raise InvalidRequest('"agent" and "model" both name the agent, and differ. Give one of them.', "agent")
    return body.agent if body.agent is not None else body.model


def _user(body: RunBody) -> str | None:
    return body.user or (body.context.user_id if body.context else None)


def _conversation_id(body: ResponsesBody) -> str | None:
    return body.conversation.id if isinstance(body.conversation, Conversation) else body.conversation


def _session_id(body: RunBody, headers: Mapping[str, str], conversation: str | None) -> str | None:
    """Return the session's id from wherever it was given; the same id may be given more than once."""
    given = {
        "session_id": body.session_id,
        "conversation": conversation,
        "context.conversation_id": body.context.conversation_id if body.context else None,
        **{name: _utf8(headers.get(name)) for name in SESSION_HEADERS},
    }
    found = {name: value for name, value in given.items() if value is not None}
    if len(set(found.values())) > 1:
        raise InvalidRequest(
            f"The request names several sessions, by {' and '.join(found)}. Give one.", next(iter(found))
        )
    for name, value in found.items():
        convert({"session_id": value, "model": name}, RunBody)  # a header's value has not been looked at yet
        return value
    return None


def _utf8(value: str | None) -> str | None:
    """Return a header's value as it was meant; the framework reads its bytes as Latin-1."""
    try:
        return value and value.encode("latin-1").decode()
    except UnicodeError:
        return value


def _context(body: RunBody, session_id: str | None) -> dict[str, Any]:
    return {
        "session_id": session_id,
        "user": _user(body),
        "metadata": body.metadata or {},
        "custom_inputs": body.custom_inputs or {},
    }


def _tools(tools: list[tuple[Any, bool | None]]) -> tuple[ClientTool, ...]:
    made = tuple(
        client_tool(tool.name, tool.description or "", tool.parameters, strict=bool(strict)) for tool, strict in tools
    )
    if len({tool.name for tool in made}) < len(made):
        raise InvalidRequest("Two tools have the same name.", "tools")
    return made


def _schema(
    wanted: TextFormat | JsonObjectFormat | JsonSchemaFormat | ChatSchemaFormat | None,
) -> ClientSchema | None:
    match wanted:
        case JsonSchemaFormat():
            return ClientSchema(wanted.name, wanted.schema, strict=bool(wanted.strict))
        case ChatSchemaFormat(json_schema=inner):
            return ClientSchema(inner.name, inner.schema, strict=bool(inner.strict))
        case JsonObjectFormat():
            return ClientSchema("json_object", None, strict=False)
        case _:
            return None


def _responses_settings(body: ResponsesBody) -> sdk.ModelSettings:
    thinking = body.reasoning
    reasoning = None
    if thinking is not None:
        summary = thinking.summary or thinking.generate_summary
        reasoning = ReasoningSetting.model_validate({"effort": thinking.effort, "summary": summary})
    return sdk.ModelSettings(
        **_common_settings(body),
        max_tokens=body.max_output_tokens,
        tool_choice=body.tool_choice.name if isinstance(body.tool_choice, FunctionChoice) else body.tool_choice,
        truncation=body.truncation,
        verbosity=body.text.verbosity if body.text else None,
        reasoning=reasoning,
    )


def _chat_settings(body: ChatBody) -> sdk.ModelSettings:
    effort = body.reasoning_effort
    choice = body.tool_choice
    return sdk.ModelSettings(
        **_common_settings(body),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        tool_choice=choice.function.name if isinstance(choice, ChatFunctionChoice) else choice,
        verbosity=body.verbosity,
        reasoning=ReasoningSetting.model_validate({"effort": effort}) if effort else None,
    )


def _common_settings(body: RunBody) -> dict[str, Any]:
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty", "top_logprobs", "parallel_tool_calls")
    return {name: getattr(body, name) for name in names}


__all__ = ["BodyRules", "ChatTool", "FunctionTool", "from_chat", "from_responses"]
