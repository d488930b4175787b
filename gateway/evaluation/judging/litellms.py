"""Judges of providers that MLflow asks by LiteLLM: what they send to the relay, and how the relay asks for them.

In MLflow's place, `by_litellm` sends a call to the relay, as OpenAI's chat JSON for a URL that begins with
``litellm:``. There it waits its turn and is counted like any other. `LiteLLMTransport` is the end of that way: it gives
the call to LiteLLM, which has the provider's address and its key from the environment, and turns what comes of it into
an HTTP answer again, so that nothing between needs to know of it.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx
from mlflow.genai.judges.adapters.utils import ChatCompletionError
from mlflow.genai.utils.message_utils import pydantic_to_response_format

from gateway.evaluation.judging.providers import load_litellm
from gateway.evaluation.judging.wire import LITELLM_URL, json_object

_OPENAI = "openai"
_NO_STATUS = 500  # of an exception that names none: the provider, or LiteLLM itself, is broken
_HINTS = ("retry-after", "retry-after-ms")
_CONTEXT_WINDOW = "ContextWindowExceededError"  # LiteLLM begins its messages with the class

Send = Callable[[str | None, dict[str, Any]], dict[str, Any]]
"""Sends a body to the relay and returns the answer, for a URL; ``None`` is that of OpenAI's API.

Raises:
    ChatCompletionError: there is none; its message says why.
"""


def by_litellm(send: Send) -> Callable[..., Any]:
    """Return what stands in for MLflow's call of LiteLLM: the same arguments and answers, by way of ``send``."""

    def invoke(
        litellm_model: str,
        messages: list[Any],
        tools: list[dict[str, Any]],
        num_retries: int,  # noqa: ARG001 - the relay tries again, and nobody else
        response_format: Any,
        include_response_format: bool,
        inference_params: dict[str, Any] | None = None,
        api_base: str | None = None,
        api_key: str | None = None,
        extra_headers: dict[str, str] | None = None,
    ) -> Any:
        litellm = load_litellm()
        body: dict[str, Any] = {
            "model": litellm_model,
            "messages": [each if isinstance(each, dict) else each.model_dump(exclude_none=True) for each in messages],
            **(inference_params or {}),
        }
        if tools:
            body |= {"tools": tools, "tool_choice": "auto"}
        if include_response_format:
            body["response_format"] = _json_format(response_format)
        where = {"api_base": api_base, "api_key": api_key, "extra_headers": extra_headers}
        body |= {name: value for name, value in where.items() if value is not None}
        provider, _, name = litellm_model.partition("/")
        is_openai = provider == _OPENAI and api_base is None  # its address in the environment is the relay's own
        if is_openai:
            body["model"] = name
        try:
            return litellm.ModelResponse(**send(None if is_openai else LITELLM_URL, body))
        except ChatCompletionError as error:
            if error.status_code != 400:
                raise
            kind = litellm.BadRequestError
            if error.is_context_window_error or _CONTEXT_WINDOW in error.message:
                kind = litellm.ContextWindowExceededError
            raise kind(error.message, model=litellm_model, llm_provider=provider) from error

    return invoke


def _json_format(response_format: Any) -> dict[str, Any]:
    """Return the form of the answer as JSON Schema; ``None`` stands for that of a judge's verdict."""
    if isinstance(response_format, dict):
        return response_format
    if response_format is None:
        from mlflow.genai.judges.adapters.litellm_adapter import (  # noqa: PLC0415 - MLflow's own; nobody else needs it
            _get_default_judge_response_schema,
        )

        response_format = _get_default_judge_response_schema()
    form: dict[str, Any] = pydantic_to_response_format(response_format)
    return form


class LiteLLMTransport(httpx.AsyncBaseTransport):
    """Answers requests by LiteLLM; a provider's refusal is an answer, too."""

    def __init__(self, timeout_s: float):
        """Take the seconds after which LiteLLM gives a call up: some of its clients run in threads of their own."""
        self._timeout_s = timeout_s

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Ask once."""
        body = json_object(await request.aread()) or {}
        try:
            litellm = await asyncio.to_thread(load_litellm)
            ours = {"num_retries": 0, "max_retries": 0, "drop_params": True, "timeout": self._timeout_s}
            answer = await litellm.acompletion(**(body | ours))
        except Exception as error:  # noqa: BLE001 - LiteLLM passes on whatever its clients raise
            return _refusal(error)
        return httpx.Response(200, content=answer.model_dump_json(exclude_none=True, warnings=False))


def _refusal(error: Exception) -> httpx.Response:
    status = getattr(error, "status_code", None)
    headers = getattr(error, "litellm_response_headers", None)
    if headers is None:
        headers = getattr(getattr(error, "response", None), "headers", None)
    said = {"error": {"message": str(error), "type": type(error).__name__}}
    return httpx.Response(
        status if isinstance(status, int) and 400 <= status <= 599 else _NO_STATUS,
        headers=_hints(headers),
        content=json.dumps(said),
    )


def _hints(headers: Any) -> dict[str, str]:
    """Return what a refusal's headers say of the next try."""
    if not isinstance(headers, Mapping):
        return {}
    return {name.lower(): str(value) for name, value in headers.items() if name.lower() in _HINTS}
