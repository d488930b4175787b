"""Which language model plays for an agent, and the span of each call of it."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple

from agents import Agent, Handoff, Model, ModelResponse, ModelSettings, OpenAIProvider, Tool
from agents.agent_output import AgentOutputSchemaBase
from agents.items import TResponseInputItem, TResponseStreamEvent
from agents.models.interface import ModelTracing
from agents.tool import FunctionTool
from agents.tracing import generation_span
from openai import AsyncOpenAI
from openai.types.responses import ResponseCompletedEvent
from openai.types.responses.response_prompt_param import ResponsePromptParam

from gateway.errors import ConfigurationError
from gateway.plugins import AgentPlugin
from gateway.settings import Settings


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
    client = AsyncOpenAI(api_key=settings.openai_api_key.get_secret_value(), base_url=settings.openai_base_url)
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
        return _traced(own, getattr(own, "model", type(own).__name__), provider=None)
    if name := own or default:
        if provider is None:
            raise ConfigurationError(f"Agent {plugin.name} asks for model {name}: set OPENAI_API_KEY.")
        return _traced(provider.get_model(name), name, provider="openai")
    if plugin.offline_model is not None:
        return _traced(plugin.offline_model, "offline", provider=None, offline=True)
    raise ConfigurationError(
        f"Agent {plugin.name} has no model: set GATEWAY_MODEL and OPENAI_API_KEY, or give its folder an offline.py."
    )


def _traced(model: Model, name: str, *, provider: str | None, offline: bool = False) -> ChosenModel:
    return ChosenModel(TracedModel(model, name, provider), name, offline)


class TracedModel(Model):
    """Wraps a model so that each call is one span, with messages, tool definitions and usage, whatever its kind.

    The SDK's own models make spans that lack the tool definitions, custom models make none; the wrapped model's
    tracing is switched off so that no call is seen twice.
    """

    def __init__(self, inner: Model, name: str, provider: str | None):
        self._inner = inner
        self._name = name
        self._provider = provider

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
                ModelTracing.DISABLED,
                previous_response_id=previous_response_id,
                conversation_id=conversation_id,
                prompt=prompt,
            )
            span.span_data.output = response.output
            usage = response.usage
            span.span_data.usage = _usage(usage.input_tokens, usage.output_tokens, usage.total_tokens)
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
                ModelTracing.DISABLED,
                previous_response_id=previous_response_id,
                conversation_id=conversation_id,
                prompt=prompt,
            )
            async for event in events:
                if isinstance(event, ResponseCompletedEvent):
                    span.span_data.output = event.response.output
                    if usage := event.response.usage:
                        span.span_data.usage = _usage(usage.input_tokens, usage.output_tokens, usage.total_tokens)
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
        if tracing.is_disabled():
            return _FailingSpan(generation_span(disabled=True))
        config = {
            "provider": self._provider,
            "instructions": instructions,
            "tools": tool_definitions(tools, handoffs),
            "settings": {key: getattr(settings, key) for key in _SETTINGS if getattr(settings, key) is not None},
        }
        # A copy: the SDK goes on to build the next turn's input, and the span is read later.
        history = asked if isinstance(asked, str) else list(asked)
        return _FailingSpan(generation_span(input=history, model=self._name, model_config=config))  # type: ignore[arg-type]


_SETTINGS = ("temperature", "top_p", "max_tokens", "tool_choice", "parallel_tool_calls")


class _FailingSpan:
    """A span that marks itself failed when its block raises; the SDK's own span does not."""

    def __init__(self, span: Any):
        self._span = span

    def __enter__(self) -> Any:
        return self._span.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if error is not None and not isinstance(error, GeneratorExit):
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


def _usage(input_tokens: int, output_tokens: int, total_tokens: int) -> dict[str, Any]:
    return {"input_tokens": input_tokens, "output_tokens": output_tokens, "total_tokens": total_tokens}
