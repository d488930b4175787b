"""What is accepted and not decoded into structs: items, chat messages, batches. For the OpenAPI document alone.

`gateway.http.requests` and `gateway.http.dataframes` check them. An item may have further fields, which are passed on
to the language model.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from gateway.http.bodies import ChatContext, Id, UserId

REF = "#/components/schemas/{name}"
"""Where the schema of a struct is in the document."""


def any_of(*kinds: "type | dict[str, Any]") -> dict[str, Any]:
    """Return the schema of a value that has one of several shapes: structs, or schemas by themselves."""
    refs = [kind if isinstance(kind, dict) else {"$ref": REF.format(name=kind.__name__)} for kind in kinds]
    return refs[0] if len(refs) == 1 else {"anyOf": refs}


def list_of(*kinds: type) -> dict[str, Any]:
    """Return the schema of a list of such values."""
    return {"type": "array", "items": any_of(*kinds)}


def shaped(schema: dict[str, Any]) -> msgspec.Meta:
    """Return what gives a field this schema."""
    return msgspec.Meta(extra_json_schema=schema)


class TextPart(msgspec.Struct):
    """A text: ``input_text`` of anyone, ``output_text`` of the assistant."""

    type: Literal["input_text", "output_text"]
    text: str


class RefusalPart(msgspec.Struct):
    """The assistant's refusal."""

    type: Literal["refusal"]
    refusal: str


class ImagePart(msgspec.Struct):
    """An image, for agents whose model can see."""

    type: Literal["input_image"]
    image_url: str
    """An address, or a ``data:`` URL."""
    detail: Literal["low", "high", "auto"] = "auto"


class FilePart(msgspec.Struct):
    """A file, for agents whose model can read it."""

    type: Literal["input_file"]
    filename: str | UnsetType = UNSET
    file_data: str | UnsetType = UNSET
    """A ``data:`` URL."""
    file_url: str | UnsetType = UNSET


_TEXT = {"type": "string"}
_CONTENT = any_of(_TEXT, list_of(TextPart, ImagePart, FilePart, RefusalPart))


class Message(msgspec.Struct):
    """A message of a conversation, as a Responses item."""

    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[Any, shaped(_CONTENT)]
    type: Literal["message"] = "message"
    id: str | UnsetType = UNSET
    status: Literal["in_progress", "completed", "incomplete"] | UnsetType = UNSET


class FunctionCall(msgspec.Struct):
    """A call of a tool: the agent's own, or one that the client brought and is to run."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    """JSON."""
    id: str | UnsetType = UNSET
    status: Literal["in_progress", "completed", "incomplete"] | UnsetType = UNSET


class FunctionCallOutput(msgspec.Struct):
    """What a tool gave."""

    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[Any, shaped(_CONTENT)]
    id: str | UnsetType = UNSET
    status: Literal["in_progress", "completed", "incomplete"] | UnsetType = UNSET


class ReasoningItem(msgspec.Struct):
    """What a reasoning model thought."""

    type: Literal["reasoning"]
    id: str | UnsetType = UNSET
    summary: list[dict[str, Any]] | UnsetType = UNSET
    encrypted_content: str | UnsetType = UNSET
    """Only with it is the item of use to the model when it is sent again."""


class ApprovalRequestItem(msgspec.Struct):
    """A tool call that waits for a person's decision. Sent back as input, it is passed over."""

    type: Literal["mcp_approval_request"]
    id: str
    """Answer with it."""
    name: str
    """The tool."""
    arguments: str
    """JSON."""
    server_label: str
    """The agent."""


class ApprovalResponseItem(msgspec.Struct):
    """A person's decision on a tool call, as a Responses item; the same as an entry of ``approvals``."""

    type: Literal["mcp_approval_response"]
    approval_request_id: str
    approve: bool
    reason: str | None = None
    id: str | UnsetType = UNSET


class ItemReference(msgspec.Struct):
    """An item of a stored response, by its id."""

    type: Literal["item_reference"]
    id: str


INPUT_ITEMS = (
    Message,
    FunctionCall,
    FunctionCallOutput,
    ReasoningItem,
    ApprovalRequestItem,
    ApprovalResponseItem,
    ItemReference,
)
"""Items that ``input`` may have."""


class ChatTextPart(msgspec.Struct):
    """A text in a chat message."""

    type: Literal["text"]
    text: str


class ChatImageUrl(msgspec.Struct):
    """Where an image is."""

    url: str
    """An address, or a ``data:`` URL."""


class ChatImagePart(msgspec.Struct):
    """An image in a chat message, for agents whose model can see."""

    type: Literal["image_url"]
    image_url: ChatImageUrl


class ChatToolFunction(msgspec.Struct):
    """What a `ChatToolCall` calls."""

    name: str
    arguments: str
    """JSON."""


class ChatToolCall(msgspec.Struct):
    """A call of a tool that the client brought and is to run."""

    id: str
    type: Literal["function"]
    function: ChatToolFunction


_CHAT_CONTENT = any_of(_TEXT, list_of(ChatTextPart, ChatImagePart))


class ChatMessage(msgspec.Struct):
    """A message of a user, or an instruction."""

    role: Literal["user", "system", "developer"]
    content: Annotated[Any, shaped(_CHAT_CONTENT)]


class ChatAssistantMessage(msgspec.Struct):
    """A message of the assistant, in a transcript that the client keeps itself."""

    role: Literal["assistant"]
    content: Annotated[Any, shaped(_CHAT_CONTENT)]


class ChatCallsMessage(msgspec.Struct):
    """The assistant's calls of the client's tools, sent back together with their results."""

    role: Literal["assistant"]
    tool_calls: Annotated[list[ChatToolCall], msgspec.Meta(min_length=1)]
    content: str | None = None


class ChatToolMessage(msgspec.Struct):
    """The result of a tool that the client ran."""

    role: Literal["tool"]
    tool_call_id: str
    content: Annotated[Any, shaped(_CHAT_CONTENT)]


CHAT_MESSAGES = (ChatMessage, ChatAssistantMessage, ChatCallsMessage, ChatToolMessage)
"""Messages that ``messages`` may have."""


class ScoringParams(msgspec.Struct, forbid_unknown_fields=True):
    """What holds for every row that does not say it itself."""

    agent: str | None = None
    session_id: Id | None = None
    user: UserId | None = None
    custom_inputs: dict[str, Any] | None = None
    context: ChatContext | None = None


class ScoringBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What the forms of MLflow's scoring server have in common."""

    params: ScoringParams | None = None
    stream: Literal[False] | None = None


class ScoringFrame(msgspec.Struct, forbid_unknown_fields=True):
    """A table by its rows."""

    columns: list[str]
    """One is ``input`` or ``messages``, or a text by any name; others may be those of ``params``."""
    data: Annotated[list[list[Any]], msgspec.Meta(min_length=1)]
    """A list of values a row, in the order of the columns; ``null`` where the row has none."""
    index: list[Any] | UnsetType = UNSET
    """Passed over."""


class DataframeSplitBody(ScoringBody, forbid_unknown_fields=True, kw_only=True):
    """A batch as pandas writes a dataframe with ``orient="split"``."""

    dataframe_split: ScoringFrame


class DataframeRecordsBody(ScoringBody, forbid_unknown_fields=True, kw_only=True):
    """A batch as pandas writes a dataframe with ``orient="records"``."""

    dataframe_records: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)]
    """One object a row; its fields are the columns."""


class InstancesBody(ScoringBody, forbid_unknown_fields=True, kw_only=True):
    """A batch in the row format of TensorFlow Serving."""

    instances: Annotated[list[str | dict[str, Any]], msgspec.Meta(min_length=1)]
    """A text or an object a row."""


class InputsBody(ScoringBody, forbid_unknown_fields=True, kw_only=True):
    """A batch in the column format of TensorFlow Serving: columns, rows, or one row by itself."""

    inputs: str | list[str | dict[str, Any]] | dict[str, Any]


SCORING_BODIES = (DataframeSplitBody, DataframeRecordsBody, InstancesBody, InputsBody)
"""Forms of a batch."""
