"""What is answered where the handlers return plain dicts: for the OpenAPI document alone.

`gateway.http.answers` writes the answers of runs; a test holds real ones against these structs, so that neither can
change unnoticed. Items are passed on from language models, which may add to them.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from gateway.http.accepted import (
    ApprovalRequestItem,
    ChatToolCall,
    FunctionCall,
    FunctionCallOutput,
    Message,
    ReasoningItem,
    any_of,
    shaped,
)
from gateway.http.bodies import (
    Conversation,
    FunctionChoice,
    FunctionTool,
    JsonObjectFormat,
    JsonSchemaFormat,
    TextFormat,
)

_KNOWN_ITEMS = ["message", "function_call", "function_call_output", "reasoning", "mcp_approval_request"]


class OtherItem(msgspec.Struct):
    """An item of a tool that the model's provider runs itself, such as a web search: as the model gave it."""

    type: Annotated[str, shaped({"not": {"enum": _KNOWN_ITEMS}})]


_ITEMS = (Message, FunctionCall, FunctionCallOutput, ReasoningItem)
_OUTPUT_ITEMS = (*_ITEMS, ApprovalRequestItem, OtherItem)


class WaitingApproval(msgspec.Struct, forbid_unknown_fields=True):
    """A tool call that waits for a person's decision."""

    id: str
    """Answer with it in ``approvals``."""
    tool: str
    arguments: str
    """JSON."""


class Answer(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The gateway's own fields, which every answer of a run has."""

    session_id: str
    """Send it again to go on with the conversation."""
    trace_id: str
    """The run's trace in MLflow, and its row in the ledger."""
    sampled: bool
    """Whether sampling keeps the conversation; a tail rule may keep it all the same."""
    agent: str
    agent_version: str
    """First 12 digits of the SHA-256 of the agent's folder."""
    offline: bool
    """The agent's offline model answered, not a language model."""
    approval_requests: list[WaitingApproval] | UnsetType = UNSET
    """Only if the run waits for decisions on tool calls: answer all of them in one request."""


class ResponseError(msgspec.Struct, forbid_unknown_fields=True):
    """Why a response failed."""

    code: str
    message: str
    request_id: str | UnsetType = UNSET


class CachedTokens(msgspec.Struct, forbid_unknown_fields=True):
    """Details of the tokens that the model read."""

    cached_tokens: int
    cache_write_tokens: int


class ReasoningTokens(msgspec.Struct, forbid_unknown_fields=True):
    """Details of the tokens that the model wrote."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, forbid_unknown_fields=True):
    """Tokens of all model calls of the run."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ReasoningEcho(msgspec.Struct, forbid_unknown_fields=True):
    """``reasoning`` of the request."""

    effort: str | None
    summary: str | None


class TextEcho(msgspec.Struct, forbid_unknown_fields=True):
    """``text`` of the request."""

    format: TextFormat | JsonObjectFormat | JsonSchemaFormat
    verbosity: Literal["low", "medium", "high"]


class ResponseObject(Answer, forbid_unknown_fields=True, kw_only=True):
    """OpenAI's Responses object. What repeats the request has the API's defaults where the request said nothing."""

    id: str
    object: Literal["response"]
    created_at: int
    """Seconds since the epoch."""
    completed_at: int | None
    status: Literal["in_progress", "completed", "failed", "cancelled"]
    error: ResponseError | None
    incomplete_details: None
    model: str
    """The agent; in answers of ``/invocations`` the language model."""
    output: Annotated[list[Any], shaped({"items": any_of(*_OUTPUT_ITEMS)})]
    """Messages, tool calls and their outputs, in order; the answer is the last message."""
    usage: ResponseUsage | None
    background: bool
    conversation: Conversation | None
    frequency_penalty: float
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    """With the header ``x-mlflow-return-trace-id: true`` it has the ``trace_id`` too."""
    parallel_tool_calls: bool
    presence_penalty: float
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningEcho
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: bool
    temperature: float
    text: TextEcho
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["auto", "disabled"]
    user: str | None


class ResponseEvent(msgspec.Struct):
    """The ``data`` of one event of a Responses stream; the other fields depend on the type."""

    type: Annotated[str, msgspec.Meta(pattern=r"^response\.")]
    """``response.created``, ``response.in_progress``, events of items such as ``response.output_text.delta``, and one
    of ``response.completed`` and ``response.failed``."""
    sequence_number: int
    response: ResponseObject | UnsetType = UNSET


class PromptTokens(CachedTokens, forbid_unknown_fields=True):
    """Details of the tokens that the model read."""

    audio_tokens: int


class CompletionTokens(msgspec.Struct, forbid_unknown_fields=True):
    """Details of the tokens that the model wrote."""

    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class ChatUsage(msgspec.Struct, forbid_unknown_fields=True):
    """Tokens of all model calls of the run."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens


class ChatAnswerMessage(msgspec.Struct, forbid_unknown_fields=True):
    """What the agent said."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    tool_calls: list[ChatToolCall] | UnsetType = UNSET
    """Calls of the client's tools; what the agent does with its own has no place in a chat completion."""


class ChatChoice(msgspec.Struct, forbid_unknown_fields=True):
    """The one answer of a chat completion."""

    index: Literal[0]
    message: ChatAnswerMessage
    finish_reason: Literal["stop", "tool_calls"]
    logprobs: None


class ChatCompletion(Answer, forbid_unknown_fields=True, kw_only=True):
    """OpenAI's chat completion."""

    id: str
    object: Literal["chat.completion"]
    created: int
    """Seconds since the epoch."""
    model: str
    """The agent; in answers of ``/invocations`` the language model."""
    service_tier: Literal["default"]
    system_fingerprint: str
    """The agent's version."""
    choices: Annotated[list[ChatChoice], msgspec.Meta(min_length=1, max_length=1)]
    usage: ChatUsage
    metadata: dict[str, str] | UnsetType = UNSET
    """Only with the header ``x-mlflow-return-trace-id: true``: the ``trace_id``."""


class ChunkFunction(msgspec.Struct, forbid_unknown_fields=True):
    """The next piece of a call."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ChunkCall(msgspec.Struct, forbid_unknown_fields=True):
    """A call of a client's tool; all but its first chunk have no id."""

    index: int
    function: ChunkFunction
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET


class ChunkDelta(msgspec.Struct, forbid_unknown_fields=True):
    """What a chunk adds to the message."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    refusal: str | UnsetType = UNSET
    tool_calls: list[ChunkCall] | UnsetType = UNSET


class ChunkChoice(msgspec.Struct, forbid_unknown_fields=True):
    """The one answer that is streamed."""

    index: Literal[0]
    delta: ChunkDelta
    logprobs: None
    finish_reason: Literal["stop", "tool_calls"] | None


class ChatCompletionChunk(msgspec.Struct):
    """The ``data`` of one event of a chat stream. The first one has the gateway's own fields of a `ChatCompletion`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    service_tier: Literal["default"]
    system_fingerprint: str
    choices: list[ChunkChoice]
    """Empty in the chunk that has the usage."""
    usage: ChatUsage | UnsetType = UNSET
    """In a chunk of its own at the end, with ``stream_options.include_usage``."""
    approval_requests: list[WaitingApproval] | UnsetType = UNSET
    """In the last chunk, if the run waits for decisions on tool calls."""


EVENTS = {"ResponseObject": ResponseEvent, "ChatCompletion": ChatCompletionChunk}
"""What a stream's events are, by the name of what would be answered without."""


class RowError(msgspec.Struct, forbid_unknown_fields=True):
    """Why one row of a batch was not answered."""

    error_code: str
    message: str
    trace_id: str | UnsetType = UNSET


class Predictions(msgspec.Struct, forbid_unknown_fields=True):
    """The answer to a batch."""

    predictions: Annotated[
        list[Any], shaped({"items": any_of({"type": "string"}, ResponseObject, ChatCompletion, RowError)})
    ]
    """One a row, in order: the answer's text for a row that is a text, else the whole answer; an error where the run
    failed. If all fail, the first error is the answer to the whole."""


class DeletedResponse(msgspec.Struct, forbid_unknown_fields=True):
    """A stored response that was deleted."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputItems(msgspec.Struct, forbid_unknown_fields=True):
    """A page of the items that a response was the answer to."""

    object: Literal["list"]
    data: Annotated[list[Any], shaped({"items": any_of(*_ITEMS)})]
    first_id: str | None
    last_id: str | None
    """Ask for what comes ``after`` it."""
    has_more: bool


class Model(msgspec.Struct, forbid_unknown_fields=True):
    """An agent, as a model."""

    id: str
    """Its name."""
    object: Literal["model"]
    created: int
    owned_by: Literal["agent-gateway"]


class Models(msgspec.Struct, forbid_unknown_fields=True):
    """The agents that the caller may use."""

    object: Literal["list"]
    data: list[Model]


class HealthPart(msgspec.Struct, forbid_unknown_fields=True):
    """State of one part that the gateway stands on."""

    status: Literal["ok", "degraded", "down"]
    detail: str | UnsetType = UNSET
    """What is wrong and where to look."""


class HealthParts(msgspec.Struct, forbid_unknown_fields=True):
    """State of every part. Only the database can be ``down``: serving stands on it alone."""

    database: HealthPart
    mlflow: HealthPart
    evaluator: HealthPart
    outbox: HealthPart


class Health(msgspec.Struct, forbid_unknown_fields=True):
    """State of the gateway."""

    status: Literal["ok", "degraded", "down"]
    """The worst of the parts."""
    degraded: list[str]
    """Names of the parts that are not ``ok``."""
    parts: HealthParts


class RunningAgent(msgspec.Struct, forbid_unknown_fields=True):
    """An agent that is served."""

    version: str
    """First 12 digits of the SHA-256 of its folder."""
    model: str
    offline: bool
    """An offline model answers for it, not a language model."""


class Version(msgspec.Struct, forbid_unknown_fields=True):
    """What is running."""

    gateway: str
    mlflow: str
    agents: dict[str, RunningAgent]
    model: str
    """Model of the agents that name none; ``offline`` if there is none."""


class Document(msgspec.Struct):
    """An OpenAPI document."""

    openapi: str
    """Version of OpenAPI."""
    info: dict[str, Any]
    paths: dict[str, Any]
    components: dict[str, Any]
