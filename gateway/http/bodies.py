"""The bodies that requests for a run may have, as they are decoded.

Contracts: OpenAI's API reference ("Create a model response", "Create chat completion"), MLflow's ``ResponsesAgent``.
Fields that are known there and are not here are refused by name: a field that is passed over in silence would be
missed. `IGNORED` and `REFUSED` are the one list of what is not honoured; ``docs/http.md`` shows it, and a test holds
the two together.
"""

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from gateway.errors import InvalidRequest

_END = r"$(?!\n)"  # `$` alone is also before a line break at the end
# MLflow stores session ids of 250 characters at the most. No slash, since the id is part of an address.
Id = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=rf"^[^\x00-\x20\x7f/]+{_END}")]
UserId = Annotated[str, msgspec.Meta(min_length=1, max_length=200, pattern=rf"^[^\x00-\x1f\x7f]+{_END}")]
_Name = Annotated[str, msgspec.Meta(pattern=rf"^[a-zA-Z0-9_-]{{1,64}}{_END}")]
_Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
_Metadata = Annotated[
    dict[
        Annotated[str, msgspec.Meta(max_length=64)],
        Annotated[str, msgspec.Meta(max_length=512)],
    ],
    msgspec.Meta(max_length=16),
]
_Positive = Annotated[int, msgspec.Meta(ge=1)]
_Temperature = Annotated[float, msgspec.Meta(ge=0.0, le=2.0)]
_Share = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
_Logprobs = Annotated[int, msgspec.Meta(ge=0, le=20)]
_Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
_Verbosity = Literal["low", "medium", "high"]


class Conversation(msgspec.Struct, forbid_unknown_fields=True):
    """A conversation by its id; any id begins one."""

    id: Id


class ChatContext(msgspec.Struct, forbid_unknown_fields=True):
    """MLflow's ``context`` of a request."""

    conversation_id: Id | None = None
    """The same as ``session_id``."""
    user_id: UserId | None = None
    """The same as ``user``."""


class Approval(msgspec.Struct, forbid_unknown_fields=True):
    """A person's decision on a tool call that waits for approval."""

    approval_request_id: str
    approve: bool
    reason: str | None = None
    """Told to the model when the call was not approved."""


class FunctionTool(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """A function that the client runs itself when the model calls it."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments; none: it takes none."""
    strict: bool | None = None


class ChatFunction(msgspec.Struct, forbid_unknown_fields=True):
    """The function of a `ChatTool`."""

    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ChatTool(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """A function that the client runs itself, as Chat Completions has it."""

    function: ChatFunction


class TextFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Plain text, the default."""


class JsonObjectFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """Any JSON object."""


class JsonSchemaFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON that keeps to a schema."""

    name: _Name
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class ChatJsonSchema(msgspec.Struct, forbid_unknown_fields=True):
    """The schema of a `ChatSchemaFormat`."""

    name: _Name
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ChatSchemaFormat(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON that keeps to a schema, as Chat Completions has it."""

    json_schema: ChatJsonSchema


class TextConfig(msgspec.Struct, forbid_unknown_fields=True):
    """The form of the answer's text."""

    format: TextFormat | JsonObjectFormat | JsonSchemaFormat | None = None
    verbosity: _Verbosity | None = None


class Reasoning(msgspec.Struct, forbid_unknown_fields=True):
    """How much a reasoning model is to think."""

    effort: _Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class FunctionChoice(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """Make the model call this function."""

    name: _Name


class ChatFunctionName(msgspec.Struct, forbid_unknown_fields=True):
    """The function of a `ChatFunctionChoice`."""

    name: _Name


class ChatFunctionChoice(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="function"):
    """Make the model call this function, as Chat Completions has it."""

    function: ChatFunctionName


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """Details of a stream."""

    include_usage: bool | None = None
    """Chat Completions: a last chunk has the usage."""
    include_obfuscation: bool | None = None
    """Has no effect: events are not padded."""


class RunBody(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What the bodies have in common."""

    model: str | None = None
    """Name of the agent; without it, the default one answers."""
    agent: str | None = None
    """The same as ``model``."""
    session_id: Id | None = None
    """Id of the conversation to go on with; without it, a new one begins and its id is in the answer."""
    user: UserId | None = None
    """Id of the person on whose behalf the request is made."""
    context: ChatContext | None = None
    custom_inputs: dict[str, Any] | None = None
    """Given to the agent's tools in the run's context."""
    approvals: Annotated[list[Approval], msgspec.Meta(max_length=100)] | None = None
    """Decisions on tool calls that wait for approval: all of one run, and nothing else in the request."""
    show_tool_calls: bool | None = None
    """Whether a response has the calls of the agent's own tools; without it, as the gateway is set."""
    stream: bool | None = None
    """Answer with events as they come."""
    stream_options: StreamOptions | None = None
    store: bool | None = None
    """``false``: neither the turn nor the answer is kept."""
    metadata: _Metadata | None = None
    """Up to 16 texts of up to 512 characters; they are in the answer again, and in the run's context."""
    temperature: _Temperature | None = None
    top_p: _Share | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    top_logprobs: _Logprobs | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None


class ResponsesBody(RunBody, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Body of ``POST /v1/responses``, and of ``POST /invocations`` with ``input``."""

    input: str | list[dict[str, Any]] | None = None
    """A text, or Responses items."""
    instructions: str | None = None
    """Shown to the model in front of the conversation, for this answer alone."""
    previous_response_id: str | None = None
    """Stored response to go on from."""
    conversation: Id | Conversation | None = None
    """The same as ``session_id``."""
    background: bool | None = None
    """Answer at once, with an id by which the result can be fetched."""
    max_output_tokens: _Positive | None = None
    tools: Annotated[list[FunctionTool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    include: list[str] | None = None


class ChatBody(RunBody, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """Body of ``POST /v1/chat/completions``, and of ``POST /invocations`` with ``messages``."""

    messages: list[dict[str, Any]] | None = None
    """Chat messages. With a ``session_id`` the new ones do; a whole transcript is taken as it is."""
    max_tokens: _Positive | None = None
    max_completion_tokens: _Positive | None = None
    tools: Annotated[list[ChatTool], msgspec.Meta(max_length=128)] | None = None
    tool_choice: Literal["auto", "none", "required"] | ChatFunctionChoice | None = None
    response_format: TextFormat | JsonObjectFormat | ChatSchemaFormat | None = None
    reasoning_effort: _Effort | None = None
    verbosity: _Verbosity | None = None
    seed: int | None = None
    n: Literal[1] | None = None
    modalities: list[Literal["text"]] | None = None
    logprobs: Literal[False] | None = None


IGNORED = {
    "service_tier": "there is one",
    "prompt_cache_key": "caching is the model provider's",
    "prompt_cache_retention": "as above",
    "prompt_cache_options": "as above",
    "safety_identifier": "it is in the answer again",
    "include": "nothing more can be included",
    "stream_options.include_obfuscation": "events are not padded",
    "seed": "not every model has one",
}
"""Fields that are taken and have no effect, and why."""

REFUSED = {
    "max_tool_calls": "bound the run by GATEWAY_MAX_TURNS",
    "prompt": "prompts are part of the agent",
    "context_management": "the history is bounded by GATEWAY_HISTORY_TURNS",
    "moderation": "use a guardrail of the agent",
    "image": "agents answer in text",
    "background_options": "only plain background runs are known",
    "access_programs": "it belongs to OpenAI's own service",
    "functions": "use tools",
    "function_call": "use tool_choice",
    "logit_bias": "it depends on the model's tokens",
    "stop": "an agent's answer is not cut at a text",
    "audio": "agents answer in text",
    "prediction": "an agent's answer is made of several model calls",
    "web_search_options": "give the agent a search tool",
}
"""Fields of OpenAI's API that are refused, and what to do instead. What is null or empty asks for nothing."""

_T = TypeVar("_T")
_PLACE = re.compile(r" - at `\$\.?(?P<place>[^`]*)`")
_UNKNOWN = re.compile(r"unknown field `(?P<field>[^`]*)`")


def decode(raw: bytes) -> dict[str, Any]:
    """Return the JSON object of a body; raise `InvalidRequest` if it is none."""
    try:
        body = msgspec.json.decode(raw)
    except RecursionError:
        raise InvalidRequest("The body is not valid JSON: it is nested too deeply.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.") from None
    if not isinstance(body, dict):
        raise InvalidRequest("The body must be a JSON object.")
    return body


def convert(body: dict[str, Any], kind: type[_T]) -> _T:
    """Return the body as a struct; raise `InvalidRequest` that names what is wrong where."""
    asked = {name: value for name, value in body.items() if name not in REFUSED or value not in (None, [], {})}
    try:
        return msgspec.convert(asked, kind)
    except RecursionError:
        raise InvalidRequest("The body is not valid JSON: it is nested too deeply.") from None
    except msgspec.ValidationError as error:
        message = str(error)
        place = _PLACE.search(message)
        param = place["place"] if place else None
        if unknown := _UNKNOWN.search(message):
            param = f"{param}.{unknown['field']}" if param else unknown["field"]
            if unknown["field"] in REFUSED and not place:
                raise InvalidRequest(
                    f"The field {param!r} cannot be honoured here: {REFUSED[unknown['field']]}.", param
                ) from None
        raise InvalidRequest(f"The body is not valid: {message}.", param) from None
