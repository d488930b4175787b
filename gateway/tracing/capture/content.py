"""What is in a span: from the SDK's data to MLflow's shapes, with an allow-list of attributes.

Never the run's context, never credentials: nothing is copied from a span but what is named here.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast, get_args

from agents.tracing import (
    AgentSpanData,
    CustomSpanData,
    FunctionSpanData,
    GenerationSpanData,
    GuardrailSpanData,
    HandoffSpanData,
    MCPListToolsSpanData,
    ResponseSpanData,
)

from gateway.tracing import messages
from gateway.tracing.capture.provider import ModelCall
from gateway.tracing.spans import SpanKind

CHAT_TOOLS = "mlflow.chat.tools"
TOKEN_USAGE = "mlflow.chat.tokenUsage"  # noqa: S105 - the name of an attribute
MODEL = "mlflow.llm.model"
PROVIDER = "mlflow.llm.provider"
ANSWERED_BY = "gateway.answered_by"
"""Name of the model that says it answered, where that is not the one that was asked."""
REASONING_TOKENS = "gateway.reasoning_tokens"
FIRST_TOKEN_S = "gateway.time_to_first_token_s"  # noqa: S105 - as above
"""Seconds from the begin of a streamed model call to its first token; on the run: to its first text."""
TRIGGERED = "gateway.guardrail_triggered"

_KINDS: frozenset[str] = frozenset(get_args(SpanKind))
_COUNTS = ("input_tokens", "output_tokens", "total_tokens")
_CACHE_COUNTS = {"cached_tokens": "cache_read_input_tokens", "cache_write_tokens": "cache_creation_input_tokens"}
_ITEM_KINDS: dict[str, SpanKind] = {
    "web_search_call": "TOOL",
    "file_search_call": "RETRIEVER",
    "code_interpreter_call": "TOOL",
    "image_generation_call": "TOOL",
    "mcp_call": "TOOL",
}


class Content(NamedTuple):
    """What `Span` takes from it."""

    name: str
    kind: SpanKind
    inputs: Any = None
    outputs: Any = None
    attributes: dict[str, Any] = {}  # noqa: RUF012 - never written to


class HostedCall(NamedTuple):
    """A tool that the model's provider ran while the model answered."""

    call_id: str
    content: Content
    error: str | None


def span_kind(named: Any) -> SpanKind:
    """Return the kind for a name that an author gave; ``CHAIN`` for all that MLflow shows no otherwise."""
    kind = str(named).upper()
    return cast("SpanKind", kind) if kind in _KINDS else "CHAIN"


def content(data: Any) -> Content:
    """Return what is in a span of the SDK's."""
    for kind in type(data).__mro__:
        if (read := _READERS.get(kind)) is not None:
            return read(data)
    return Content(str(data.type), "CHAIN")


def arguments(raw: str | None) -> Any:
    """Return the arguments of a tool call as an object; as the raw text if they are not valid JSON."""
    with contextlib.suppress(ValueError):
        return json.loads(raw) if raw else {}
    return raw


def plain(value: Any) -> Any:
    """Return pydantic's models as dicts, and everything else as it is."""
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def documents(outputs: Any) -> Any:
    """Return what a retriever found in the shape of MLflow's `Document`: texts, LangChain's documents, or dicts."""
    return [_document(each) for each in outputs] if isinstance(outputs, list | tuple) else outputs


def hosted_calls(output: Sequence[Any] | None) -> list[HostedCall]:
    """Return the calls of hosted tools among a model's output items."""
    return [_hosted(_fields(item)) for item in output or () if _type(item) in _ITEM_KINDS]


def function_calls(output: Sequence[Any] | None, known: Container[str]) -> list[Mapping[str, Any]]:
    """Return the calls of functions that are not ``known`` among a model's output items."""
    calls = (item for item in output or () if _type(item) == "function_call")
    return [_fields(call) for call in calls if _field(call, "name") not in known]


def derived_id(parent_id: str, call_id: str) -> str:
    """Return the id of a span that nobody made: always the same for the same call."""
    return hashlib.blake2b(f"{parent_id}/{call_id}".encode(), digest_size=8).hexdigest()


def model_output(data: Any) -> Sequence[Any] | None:
    """Return the output items of a model call, in the form of the Responses API; ``None`` if it has none."""
    if isinstance(data, ModelCall):
        return data.output
    if isinstance(data, ResponseSpanData) and data.response is not None:
        return data.response.output
    return None


def _custom(data: CustomSpanData) -> Content:
    fields = data.data
    kind = span_kind(fields.get("span_type"))
    if "inputs" not in fields and "outputs" not in fields:
        rest = {key: item for key, item in fields.items() if key != "span_type"}
        return Content(data.name, kind, None, rest)
    outputs = fields.get("outputs")
    return Content(data.name, kind, fields.get("inputs"), documents(outputs) if kind == "RETRIEVER" else outputs)


def _model_call(data: ModelCall) -> Content:
    answered_by = data.answered_by or _answered_by(data.inner)
    attributes: dict[str, Any] = {MODEL: data.model}
    if answered_by and answered_by != data.model:
        attributes[ANSWERED_BY] = answered_by
    if data.provider:
        attributes[PROVIDER] = data.provider
    if data.tools:
        attributes[CHAT_TOOLS] = data.tools
    attributes |= _usage(data.usage)
    inputs = {"messages": messages.from_items(data.input or [], instructions=data.instructions), **data.settings}
    return Content(data.model or "model", "CHAT_MODEL", inputs, _answer(data.output), attributes)


def _answered_by(inner: Any) -> str | None:
    """Return the name of the model that the wrapped model's own span holds; only that of the Responses API does."""
    response = getattr(inner, "response", None)
    return str(response.model) if response is not None and response.model else None


def _response(data: ResponseSpanData) -> Content:
    """Return a call of an agent that a tool ran with a model of its own, on the Responses API."""
    response = data.response
    if response is None:
        return Content("model", "CHAT_MODEL", {"messages": messages.from_items(data.input or [])})
    instructions = response.instructions if isinstance(response.instructions, str) else None
    attributes: dict[str, Any] = {MODEL: response.model, PROVIDER: "openai"}
    tools = [_fields(tool) for tool in response.tools or ()]
    if offered := [_function(tool) for tool in tools if tool.get("type") == "function"]:
        attributes[CHAT_TOOLS] = offered
    if response.usage is not None:
        attributes |= _usage(usage_counts(response.usage))
    inputs = {"messages": messages.from_items(data.input or [], instructions=instructions)}
    return Content(str(response.model), "CHAT_MODEL", inputs, _answer(response.output), attributes)


def _generation(data: GenerationSpanData) -> Content:
    """Return a call on another API, or one that an author made a span for: its messages are the chat API's."""
    attributes: dict[str, Any] = {MODEL: data.model} if data.model else {}
    attributes |= _usage(data.usage)
    answers = [{"index": index, "message": message} for index, message in enumerate(data.output or ())]
    inputs = {"messages": list(data.input)} if data.input else None
    return Content(data.model or "model", "CHAT_MODEL", inputs, {"choices": answers} if answers else None, attributes)


def usage_counts(usage: Any) -> dict[str, int]:
    """Return the token counts of a usage object of the SDK, or of the Responses API, by MLflow's names."""
    counts = {key: getattr(usage, key, None) or 0 for key in _COUNTS}
    details = getattr(usage, "input_tokens_details", None)
    for name, key in _CACHE_COUNTS.items():
        if count := getattr(details, name, None):
            counts[key] = count
    if reasoning := getattr(getattr(usage, "output_tokens_details", None), "reasoning_tokens", None):
        counts["reasoning_tokens"] = reasoning
    return counts


def _usage(usage: dict[str, Any] | None) -> dict[str, Any]:
    if not usage:
        return {}
    counts = {key: usage.get(key) or 0 for key in _COUNTS}
    counts["total_tokens"] = counts["total_tokens"] or counts["input_tokens"] + counts["output_tokens"]
    counts |= {key: usage[key] for key in _CACHE_COUNTS.values() if usage.get(key)}
    reasoning = usage.get("reasoning_tokens")
    return {TOKEN_USAGE: counts} | ({REASONING_TOKENS: reasoning} if reasoning else {})


def _answer(output: Iterable[Any] | None) -> dict[str, Any] | None:
    if output is None:
        return None
    # The provider's own tools have spans of their own; in the message they would be JSON amid the text.
    said = [item for item in output if _type(item) not in _ITEM_KINDS]
    return {"choices": [{"index": 0, "message": messages.answer(said)}]}


def _hosted(item: Mapping[str, Any]) -> HostedCall:
    kind = str(item["type"])
    asked = {key: item[key] for key in ("action", "queries", "code", "server_label") if item.get(key) is not None}
    outputs: Any = next((item[key] for key in ("output", "outputs") if item.get(key) is not None), None)
    name = kind.removesuffix("_call")
    if kind == "mcp_call":
        name, asked["arguments"] = str(item.get("name")), arguments(item.get("arguments"))
    if kind == "file_search_call":
        outputs = [_file_part(part) for part in item.get("results") or ()]
    error = item.get("error") or (item["status"] if item.get("status") in {"failed", "incomplete"} else None)
    made = Content(name, _ITEM_KINDS[kind], asked, outputs, {"gateway.hosted": True})
    return HostedCall(str(item.get("id")), made, str(error) if error else None)


def _file_part(part: Mapping[str, Any]) -> dict[str, Any]:
    about = {"doc_uri": part.get("filename"), "score": part.get("score")}
    return {"page_content": part.get("text") or "", "metadata": about, "id": part.get("file_id")}


def _document(found: Any) -> Any:
    if isinstance(found, str):
        return {"page_content": found, "metadata": {}}
    if (text := getattr(found, "page_content", None)) is not None:
        known = {"page_content": text, "metadata": dict(getattr(found, "metadata", None) or {})}
        return known | ({"id": found.id} if getattr(found, "id", None) else {})
    return found


def _function(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = {key: tool.get(key) for key in ("name", "description", "parameters")}
    return {"type": "function", "function": function}


def _type(item: Any) -> Any:
    return _field(item, "type")


def _field(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, dict) else getattr(item, name, None)


def _fields(item: Any) -> Mapping[str, Any]:
    return item if isinstance(item, dict) else item.model_dump(exclude_none=True)


def _tool_call(data: FunctionSpanData) -> Content:
    return Content(data.name, "TOOL", arguments(data.input), plain(data.output))


def _agent(data: AgentSpanData) -> Content:
    return Content(data.name, "AGENT")


def _handoff(data: HandoffSpanData) -> Content:
    route = {"from_agent": data.from_agent, "to_agent": data.to_agent}
    return Content(f"handoff to {data.to_agent}", "HANDOFF", route)


def _guardrail(data: GuardrailSpanData) -> Content:
    attributes = {TRIGGERED: True} if data.triggered else {}
    return Content(data.name, "GUARDRAIL", None, {"triggered": data.triggered}, attributes)


def _mcp_tools(data: MCPListToolsSpanData) -> Content:
    return Content(f"list tools of {data.server}", "CHAIN", {"server": data.server}, data.result)


_READERS: dict[type, Callable[[Any], Content]] = {
    ModelCall: _model_call,
    FunctionSpanData: _tool_call,
    AgentSpanData: _agent,
    ResponseSpanData: _response,
    GenerationSpanData: _generation,
    HandoffSpanData: _handoff,
    GuardrailSpanData: _guardrail,
    MCPListToolsSpanData: _mcp_tools,
    CustomSpanData: _custom,
}
