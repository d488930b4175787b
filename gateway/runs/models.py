"""Which language model plays for an agent, and the span of each call of it."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from agents import Agent, Handoff, Model, ModelResponse, ModelSettings, OpenAIProvider, Tool
from agents.agent_output import AgentOutputSchemaBase
from agents.items import TResponseInputItem, TResponseStreamEvent
from agents.models.interface import ModelTracing
from agents.tool import FunctionTool
from agents.tracing import get_trace_provider
from openai import AsyncOpenAI
from openai.types.responses import ResponseCompletedEvent, ResponseFailedEvent, ResponseIncompleteEvent
from openai.types.responses.response_prompt_param import ResponsePromptParam

from gateway.errors import ConfigurationError
from gateway.plugins import AgentPlugin
from gateway.runs.clients import PlainClient
from gateway.settings import Settings
from gateway.tracing.capture.assembly import CUT_OFF
from gateway.tracing.capture.content import usage_counts
from gateway.tracing.capture.provider import ModelCall


class ChosenModel(NamedTuple):
    """The model that answers for an agent."""

    model: Model
    name: str
    offline: bool
    """It is the agent's offline model: no language model was asked."""


def openai_provider(settings: Settings) -> OpenAIProvider | None:
    """Return the provider of the models behind OpenAI's API; ``None`` without a key.

    It has an HTTP client of its own: the SDK's shared one belongs to whichever event loop used it first.
    """
    if settings.openai_api_key is None:
        return None
    client = PlainClient(api_key=settings.openai_api_key.get_secret_value(), base_url=settings.openai_base_url)
    return OpenAIProvider(openai_client=client, use_responses=settings.model_api == "responses")


def choose_model(plugin: AgentPlugin, default: str | None, provider: OpenAIProvider | None) -> ChosenModel:
    """Return the model for an agent: the one its code names, else the default, else its offline model.

    Args:
        plugin: the agent.
        default: ``GATEWAY_MODEL``.
        provider: looks a model up by name; ``None`` without a key.

    Raises:
        ConfigurationError: there is none of them, or the named one lacks its key.
    """
    own = plugin.agent.model
    if isinstance(own, Model):
        its_name = str(getattr(own, "model", type(own).__name__))
        return _traced(own, its_name, provider=provider_of(own, its_name))
    if name := own or default:
        if provider is None:
            raise ConfigurationError(f"Agent {plugin.name} asks for model {name}: set OPENAI_API_KEY.")
        model = provider.get_model(name)
        return _traced(model, name, provider=provider_of(model, name))
    if plugin.offline_model is not None:
        return _traced(plugin.offline_model, "offline", provider="offline", offline=True)
    raise ConfigurationError(
        f"Agent {plugin.name} has no model: set GATEWAY_MODEL and OPENAI_API_KEY, or give its folder an offline.py."
    )


def _traced(model: Model, name: str, *, provider: str | None, offline: bool = False) -> ChosenModel:
    return ChosenModel(TracedModel(model, name, provider), name, offline)


def provider_of(model: Model, name: str) -> str | None:
    """Return who runs a model, by the name that MLflow's price list has for it; ``None`` if there is no telling.

    From the host of its OpenAI client, or, where LiteLLM makes the call, from the first part of its name.
    """
    client = getattr(model, "_client", None)
    if isinstance(client, AsyncOpenAI):
        return _provider_at(client.base_url.host)
    if type(model).__module__.startswith("agents.extensions.models."):
        return name.split("/", 1)[0] if "/" in name else "openai"
    return None


def _provider_at(host: str) -> str:
    """Return the provider behind a host; the host's own name if it is not a known one."""
    known = (each for suffix, each in _HOSTS.items() if host == suffix or host.endswith("." + suffix))
    return next(known, host)


_HOSTS = {
    "openai.com": "openai",
    "openai.azure.com": "azure",
    "cognitiveservices.azure.com": "azure",
    "anthropic.com": "anthropic",
    "googleapis.com": "gemini",
    "mistral.ai": "mistral",
    "groq.com": "groq",
    "deepseek.com": "deepseek",
    "x.ai": "xai",
    "openrouter.ai": "openrouter",
    "together.xyz": "together_ai",
    "fireworks.ai": "fireworks_ai",
}


class TracedModel(Model):
    """Wraps a model so that each call is one span, with messages, tool definitions and usage, whatever its kind.

    The SDK's own models make spans that lack the tool definitions, custom models make none; the wrapped model's
    span is not recorded beside this one (`gateway.tracing.capture.provider`), only read for who answered.
    """

    def __init__(self, inner: Model, name: str, provider: str | None):
        self._inner = inner
        self._name = name
        self._provider = provider
        self._definitions: dict[tuple[int, ...], tuple[list[Tool], list[dict[str, Any]]]] = {}

    async def get_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],  # noqa: A002 - the interface's name
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff[Any, Agent[Any]]],
        tracing: ModelTracing,
        *,
        previous_response_id: str | None,
        conversation_id: str | None,
        prompt: ResponsePromptParam | None,
    ) -> ModelResponse:
        """Call the model inside a span."""
        with self._span(system_instructions, input, model_settings, tools, handoffs, tracing) as span:
            response = await self._inner.get_response(
                system_instructions,
                input,
                model_settings,
                tools,
                output_schema,
                handoffs,
                tracing,
                previous_response_id=previous_response_id,
                conversation_id=conversation_id,
                prompt=prompt,
            )
            span.span_data.output = response.output
            span.span_data.usage = usage_counts(response.usage)
            return response

    async def stream_response(
        self,
        system_instructions: str | None,
        input: str | list[TResponseInputItem],  # noqa: A002 - the interface's name
        model_settings: ModelSettings,
        tools: list[Tool],
        output_schema: AgentOutputSchemaBase | None,
        handoffs: list[Handoff[Any, Agent[Any]]],
        tracing: ModelTracing,
        *,
        previous_response_id: str | None,
        conversation_id: str | None,
        prompt: ResponsePromptParam | None,
    ) -> AsyncIterator[TResponseStreamEvent]:
        """Call the model inside a span, which ends with the stream."""
        with self._span(system_instructions, input, model_settings, tools, handoffs, tracing) as span:
            events = self._inner.stream_response(
                system_instructions,
                input,
                model_settings,
                tools,
                output_schema,
                handoffs,
                tracing,
                previous_response_id=previous_response_id,
                conversation_id=conversation_id,
                prompt=prompt,
            )
            data = span.span_data
            async for event in events:
                if data.first_text_ns is None and event.type.endswith(".delta"):
                    _note_first(data, event.type)
                if isinstance(event, ResponseCompletedEvent | ResponseIncompleteEvent | ResponseFailedEvent):
                    data.output, data.answered_by = event.response.output, event.response.model
                    if usage := event.response.usage:
                        data.usage = usage_counts(usage)
                yield event

    async def close(self) -> None:
        """Close the wrapped model."""
        await self._inner.close()

    def get_retry_advice(self, request: Any) -> Any:
        """Pass on what the wrapped model advises."""
        return self._inner.get_retry_advice(request)

    def _span(
        self,
        instructions: str | None,
        asked: str | list[TResponseInputItem],
        settings: ModelSettings,
        tools: list[Tool],
        handoffs: list[Handoff[Any, Agent[Any]]],
        tracing: ModelTracing,
    ) -> "_FailingSpan":
        if tracing.is_disabled():  # nobody will read it: no copies for it
            unread = ModelCall([], self._name, provider=self._provider, instructions=None, tools=[], settings={})
            return _FailingSpan(get_trace_provider().create_span(unread, disabled=True))
        data = ModelCall(
            # A copy: the SDK goes on to build the next turn's input, and the span is read later.
            asked if isinstance(asked, str) else list(asked),
            self._name,
            provider=self._provider,
            instructions=instructions,
            tools=self._tool_definitions(tools, handoffs),
            settings={key: value for key in _SETTINGS if (value := getattr(settings, key)) is not None},
        )
        return _FailingSpan(get_trace_provider().create_span(data))

    def _tool_definitions(self, tools: list[Tool], handoffs: list[Handoff[Any, Agent[Any]]]) -> list[dict[str, Any]]:
        """Return the definitions of the tools, made once for the same tools."""
        if handoffs:  # the SDK makes these anew each time
            return tool_definitions(tools, handoffs)
        key = tuple(map(id, tools))
        if (cached := self._definitions.get(key)) is None:
            if len(self._definitions) >= _CACHED_DEFINITIONS:
                self._definitions.clear()
            # With the tools themselves, so that no other object takes over their ids.
            cached = self._definitions[key] = (tools, tool_definitions(tools, ()))
        return cached[1]


def _note_first(data: ModelCall, kind: str) -> None:
    """Note when the answer began, and when its text did."""
    now = time.time_ns()
    data.first_token_ns = data.first_token_ns or now
    if kind == "response.output_text.delta":
        data.first_text_ns = now


_CACHED_DEFINITIONS = 64  # sets of tools; those of an agent are one, tools that clients bring add theirs
_SETTINGS = ("temperature", "top_p", "max_tokens", "tool_choice", "parallel_tool_calls")


class _FailingSpan:
    """A span that marks itself failed when its block raises; the SDK's own span does not."""

    def __init__(self, span: Any):
        self._span = span

    def __enter__(self) -> Any:
        return self._span.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, asyncio.CancelledError):
            self._span.set_error({"message": "cancelled", "data": {CUT_OFF: True}})
        elif error is not None and not isinstance(error, GeneratorExit):
            self._span.set_error({"message": f"{type(error).__name__}: {error}", "data": None})
        self._span.__exit__(kind, error, traceback)


def tool_definitions(tools: Sequence[Tool], handoffs: Sequence[Handoff[Any, Agent[Any]]]) -> list[dict[str, Any]]:
    """Return the functions that the model may call, as the Chat Completions API and MLflow's judges have them."""
    functions = [
        (tool.name, tool.description, tool.params_json_schema) for tool in tools if isinstance(tool, FunctionTool)
    ]
    functions += [(each.tool_name, each.tool_description, each.input_json_schema) for each in handoffs]
    return [
        {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
        for name, description, parameters in functions
    ]
