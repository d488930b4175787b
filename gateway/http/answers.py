"""A run's answer in the two shapes that clients know: a Responses object, and a chat completion."""

import time
from typing import Any

import msgspec

from gateway.errors import GatewayError, RunCancelled
from gateway.http.bodies import ChatBody, Conversation, ResponsesBody
from gateway.runs.requests import Run, RunResult, TokenUsage

_FINISHED_WITH_CALLS = "tool_calls"


class ResponsesAnswer:
    """Writes Responses objects for one request. Contract: OpenAI's API reference, "The response object"."""

    def __init__(self, body: ResponsesBody, *, model_is_agent: bool, show_tool_calls: bool = True):
        """Take the request.

        Args:
            body: the request.
            model_is_agent: show the agent's name as ``model``, else the language model's.
            show_tool_calls: whether to show the calls of the agent's own tools, where the request does not say.
        """
        self._body = body
        self._model_is_agent = model_is_agent
        self._shows_tools = show_tool_calls if body.show_tool_calls is None else body.show_tool_calls
        self._client_tools = frozenset(tool.name for tool in body.tools or ())

    def shows(self, item: dict[str, Any]) -> bool:
        """Whether an output item is to be shown."""
        if self._shows_tools or item["type"] not in {"function_call", "function_call_output"}:
            return True
        return item["type"] == "function_call" and item["name"] in self._client_tools

    def body(self, run: Run, outcome: RunResult | GatewayError | None) -> dict[str, Any]:
        """Return the response; ``outcome`` ``None``: it is under way."""
        result = outcome if isinstance(outcome, RunResult) else None
        return {
            "id": run.response_id,
            "object": "response",
            "created_at": int(run.created_at),
            "completed_at": int(result.completed_at) if result else None,
            "status": self._status(outcome),
            "error": _error(outcome) if isinstance(outcome, GatewayError) else None,
            "incomplete_details": None,
            "model": run.agent if self._model_is_agent else run.model,
            "output": [item for item in result.output if self.shows(item)] if result else [],
            "usage": _usage(result) if result else None,
            **self._echo(),
            **gateway_fields(run, result),
        }

    def _status(self, outcome: RunResult | GatewayError | None) -> str:
        if outcome is None:
            return "in_progress"
        if isinstance(outcome, RunCancelled) and self._body.background:
            return "cancelled"
        return "completed" if isinstance(outcome, RunResult) else "failed"

    def _echo(self) -> dict[str, Any]:
        """Return the fields that repeat the request, with the API's defaults: clients' parsers require them."""
        body = self._body
        conversation = body.conversation.id if isinstance(body.conversation, Conversation) else body.conversation
        reasoning = body.reasoning
        text = msgspec.to_builtins(body.text) if body.text else {}
        text_format = text.get("format") or {"type": "text"}
        if text_format["type"] == "json_schema":
            text_format["strict"] = bool(text_format["strict"])
        return {
            "background": bool(body.background),
            "conversation": {"id": conversation} if conversation else None,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": None,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "presence_penalty": body.presence_penalty or 0.0,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "reasoning": {
                "effort": reasoning.effort if reasoning else None,
                "summary": (reasoning.summary or reasoning.generate_summary) if reasoning else None,
            },
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": text_format, "verbosity": text.get("verbosity") or "medium"},
            "tool_choice": msgspec.to_builtins(body.tool_choice) or "auto",
            "tools": [_tool(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "user": body.user,
        }


class ChatAnswer:
    """Writes chat completions for one request. Contract: OpenAI's API reference, "The chat completion object"."""

    def __init__(self, body: ChatBody, *, model_is_agent: bool):
        """Take the request, and whether to show the agent's name as ``model``, else the language model's."""
        self._model_is_agent = model_is_agent
        self.client_tools = frozenset(tool.function.name for tool in body.tools or ())
        options = body.stream_options
        self.wants_usage = bool(options and options.include_usage)

    def frame(self, run: Run) -> dict[str, Any]:
        """Return the fields that all chunks of a stream share."""
        return {
            "id": _chat_id(run),
            "object": "chat.completion.chunk",
            "created": int(run.created_at),
            "model": run.agent if self._model_is_agent else run.model,
            "service_tier": "default",
            "system_fingerprint": run.agent_version,
        }

    def body(self, run: Run, result: RunResult) -> dict[str, Any]:
        """Return the completion."""
        message: dict[str, Any] = {"role": "assistant", "content": _said(result) or None, "refusal": _refused(result)}
        calls = [_chat_call(item) for item in result.output if self._is_for_client(item)]
        if calls:
            message["tool_calls"] = calls
        elif message["content"] is None and message["refusal"] is None:
            message["content"] = ""
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": _FINISHED_WITH_CALLS if calls else "stop",
            "logprobs": None,
        }
        return {
            **self.frame(run),
            "object": "chat.completion",
            "choices": [choice],
            "usage": self.usage(result),
            **gateway_fields(run, result),
        }

    def usage(self, result: RunResult) -> dict[str, Any]:
        """Return the usage in chat's words."""
        usage = result.usage
        return {
            "prompt_tokens": usage.input_tokens,
            "completion_tokens": usage.output_tokens,
            "total_tokens": usage.input_tokens + usage.output_tokens,
            "prompt_tokens_details": {**_cache(usage), "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": usage.reasoning_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def _is_for_client(self, item: dict[str, Any]) -> bool:
        return item["type"] == "function_call" and item["name"] in self.client_tools


def gateway_fields(run: Run, result: RunResult | None) -> dict[str, Any]:
    """Return the gateway's own fields, which stand beside those of either API."""
    fields = {
        "session_id": run.session_id,
        "trace_id": run.trace_id,
        "sampled": run.sampled,
        "agent": run.agent,
        "agent_version": run.agent_version,
        "offline": run.offline,
    }
    if result is not None and result.approvals:
        fields["approval_requests"] = [
            {"id": each.approval_id, "tool": each.tool, "arguments": each.arguments} for each in result.approvals
        ]
    return fields


def failed_by_a_crash(body: dict[str, Any]) -> dict[str, Any]:
    """Return a stored response whose process died while it was under way, as failed."""
    error = {"code": "server_error", "message": "The process that ran it ended before it was done. Send it again."}
    return {**body, "status": "failed", "error": error, "completed_at": int(time.time())}


def _error(error: GatewayError) -> dict[str, Any]:
    return {"code": error.code.lower(), "message": str(error)}


def _usage(result: RunResult) -> dict[str, Any]:
    usage = result.usage
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": _cache(usage),
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def _cache(usage: TokenUsage) -> dict[str, int]:
    return {"cached_tokens": usage.cached_tokens, "cache_write_tokens": usage.cache_write_tokens}


def _tool(tool: Any) -> dict[str, Any]:
    fields = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", **fields, "strict": bool(tool.strict)}


def _chat_id(run: Run) -> str:
    return run.trace_id.replace("tr-", "chatcmpl-", 1)


def _chat_call(item: dict[str, Any]) -> dict[str, Any]:
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}


def _said(result: RunResult, kind: str = "text") -> str:
    """Return what the agent said, as a stream would have brought it: also before it called tools."""
    messages = (item["content"] for item in result.output if item["type"] == "message")
    return "\n\n".join("".join(part.get(kind) or "" for part in parts) for parts in messages).strip("\n")


def _refused(result: RunResult) -> str | None:
    return _said(result, "refusal") or None
