"""``POST /invocations``: one run of an agent, in Responses or in chat form."""

import time
from typing import Annotated, Any

import msgspec
from litestar import Request, post
from litestar.datastructures import State
from litestar.exceptions import HTTPException
from litestar.openapi.datastructures import ResponseSpec

from gateway.errors import InvalidRequest
from gateway.http.errors import ErrorBody
from gateway.runs.runner import AgentRunner, RunRequest, RunResult
from gateway.tracing import messages

_ROLES = frozenset({"user", "assistant", "system", "developer"})
_CHAT_ROLES = _ROLES | {"tool"}
_ITEM_FIELDS = {
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}
# MLflow stores session ids of 250 characters at the most.
_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=r"^[^\x00-\x20\x7f]+$")]


class Invocation(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Body of a request. Give ``input`` or ``messages``: the answer has the matching shape."""

    input: str | list[dict[str, Any]] | None = None
    """A text, or Responses items."""
    messages: list[dict[str, Any]] | None = None
    """Chat messages. With a ``session_id`` send only the new ones."""
    agent: str | None = None
    """Name of the agent; without it, the default one answers."""
    session_id: _Id | None = None
    """Id of the conversation to go on with; without it, a new one begins and its id is in the answer."""
    user: _Id | None = None
    """Id of the person on whose behalf the request is made."""


_decode = msgspec.json.Decoder(Invocation).decode


@post(
    "/invocations",
    status_code=200,
    summary="Run an agent",
    description="Runs an agent on one turn of a conversation and answers when it is done.",
    responses={
        400: ResponseSpec(ErrorBody, description="The body has not the documented form; nothing was stored."),
        404: ResponseSpec(ErrorBody, description="There is no such agent."),
        409: ResponseSpec(ErrorBody, description="Another request holds the session."),
        415: ResponseSpec(ErrorBody, description="The body is not JSON."),
        422: ResponseSpec(ErrorBody, description="A guardrail, or the limit of model calls, stopped the run."),
        500: ResponseSpec(ErrorBody, description="The agent failed."),
        502: ResponseSpec(ErrorBody, description="The agent's language model failed."),
        503: ResponseSpec(ErrorBody, description="The database is away."),
        504: ResponseSpec(ErrorBody, description="The run took too long."),
    },
)
async def invoke(request: Request[Any, Any, State]) -> dict[str, Any]:
    """Run an agent on one turn and answer in the shape of the request."""
    if request.content_type[0] != "application/json":  # nor none: a page of anybody's can send that from a browser
        raise HTTPException(status_code=415, detail="Send the body as JSON, with content type application/json.")
    body = parse(await request.body())
    runner: AgentRunner = request.app.state.runner
    result = await runner.run(to_run_request(body))
    return responses_body(result) if body.messages is None else chat_body(result)


def parse(raw: bytes) -> Invocation:
    """Return the decoded body; raise `InvalidRequest` with what is wrong where."""
    try:
        return _decode(raw)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"The body is not valid: {error}.") from None
    except RecursionError:
        raise InvalidRequest("The body is not valid JSON: it is nested too deeply.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None


def to_run_request(body: Invocation) -> RunRequest:
    """Return what is to be run; raise `InvalidRequest` if there is nothing, or too much, to run."""
    if (body.input is None) == (body.messages is None):
        raise InvalidRequest('Give either "input" (a text or Responses items) or "messages" (chat messages).')
    if body.messages is not None:
        items = _chat_items(body.messages)
    elif isinstance(body.input, str):
        items = [{"role": "user", "content": body.input}] if body.input.strip() else []
    else:
        items = [_checked_item(item, f"input[{index}]") for index, item in enumerate(body.input or ())]
    if not items or not any(messages.text_of(item.get("content", item.get("output"))).strip() for item in items):
        raise InvalidRequest("There is nothing to answer: the input is empty. Send at least one message with text.")
    return RunRequest(items=items, agent=body.agent, session_id=body.session_id, user=body.user)


def _checked_item(item: dict[str, Any], where: str) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        _check_message(item, where, _ROLES)
    elif isinstance(kind, str) and kind in _ITEM_FIELDS:
        for field in _ITEM_FIELDS[kind]:
            value = item.get(field)
            if not isinstance(value, str) and not (field == "output" and _are_parts(value)):
                raise InvalidRequest(f"{where} is a {kind} and lacks a valid {field!r}.")
    else:
        known = ", ".join(("message", *_ITEM_FIELDS))
        raise InvalidRequest(f"{where} has type {_shown(kind)}; known types are {known}.")
    return item


def _check_message(message: dict[str, Any], where: str, roles: frozenset[str]) -> None:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in roles:
        raise InvalidRequest(f"{where} has role {_shown(role)}; it must be one of {', '.join(sorted(roles))}.")
    calls_tools = role == "assistant" and message.get("tool_calls")
    if content is None and calls_tools:
        return
    if not isinstance(content, str) and not _are_parts(content):
        raise InvalidRequest(f"{where} needs 'content': a text, or a list of content parts with a type each.")


def _are_parts(content: Any) -> bool:
    return isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("type"), str) and isinstance(part.get("text", ""), str)
        for part in content
    )


def _shown(value: Any) -> str:
    """Return what was sent, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 50 else f"{text[:50]}..."


def _chat_items(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for index, message in enumerate(chat):
        _check_message(message, f"messages[{index}]", _CHAT_ROLES)
    try:
        items = messages.to_items(chat)
    except (KeyError, TypeError) as error:
        raise InvalidRequest(
            f"messages: a tool message needs 'tool_call_id', a tool call 'id' and 'function' with 'name' and "
            f"'arguments', a text part 'text', an image part 'image_url'; missing or of the wrong type: {error}."
        ) from None
    for item in items:
        content = item.get("content")
        if isinstance(content, list) and not all(isinstance(part.get("image_url", ""), str) for part in content):
            raise InvalidRequest("messages: an 'image_url' is a text, or an object with the text 'url'.")
        # What chat calls `id` and `tool_call_id` is `call_id` here.
        _checked_item(item, "messages: one")
    return items


def _gateway_fields(result: RunResult) -> dict[str, Any]:
    return {
        "session_id": result.session_id,
        "trace_id": result.trace_id,
        "sampled": result.sampled,
        "agent": result.agent,
        "agent_version": result.agent_version,
        "offline": result.offline,
    }


def responses_body(result: RunResult) -> dict[str, Any]:
    """Return the answer as a Responses object, with the gateway's own fields beside it."""
    usage = result.usage
    return {
        "id": result.trace_id.replace("tr-", "resp_"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "completed",
        "model": result.model,
        "output": result.output,
        "usage": {
            "input_tokens": usage.input_tokens,
            "output_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
        },
        **_gateway_fields(result),
    }


def chat_body(result: RunResult) -> dict[str, Any]:
    """Return the answer as a chat completion, with the gateway's own fields beside it."""
    usage = result.usage
    return {
        "id": result.trace_id.replace("tr-", "chatcmpl-"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": result.model,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": result.answer}, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.total_tokens,
        },
        **_gateway_fields(result),
    }
