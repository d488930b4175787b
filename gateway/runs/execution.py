"""One agent, one turn, in the SDK: no session, no store. What live runs and offline evaluation have in common."""

from typing import Any

import openai
import structlog
from agents import (
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    ModelBehaviorError,
    OutputGuardrailTripwireTriggered,
    RunConfig,
    Runner,
    RunResult,
)
from agents.run_config import ToolErrorFormatterArgs

from gateway.errors import AgentNotFound, MaxTurnsReached, ModelFailed, RunBlocked, RunFailed
from gateway.plugins import AgentPlugin
from gateway.runs.models import ChosenModel, choose_model, openai_provider
from gateway.settings import Settings
from gateway.tracing.capture import RunCapture, SpanCapture

log = structlog.get_logger(__name__)


class AgentExecutor:
    """The agents with their models, ready to run. One a process."""

    def __init__(self, settings: Settings, plugins: dict[str, AgentPlugin], capture: SpanCapture):
        """Choose each agent's model; raise `ConfigurationError` where there is none, or no such default agent."""
        self._plugins = plugins
        provider = openai_provider(settings)
        self._models = {name: choose_model(plugin, settings.model, provider) for name, plugin in plugins.items()}
        self._capture = capture
        self._max_turns = settings.max_turns
        self._default = settings.default_agent or next(iter(plugins))
        self.plugin(None)  # a wrong GATEWAY_DEFAULT_AGENT must not wait for the first request

    def plugin(self, name: str | None) -> AgentPlugin:
        """Return the agent of that name, or the default one; raise `AgentNotFound`."""
        try:
            return self._plugins[name or self._default]
        except KeyError:
            raise AgentNotFound(
                f"There is no agent {name or self._default!r} here; there is {', '.join(self._plugins)}."
            ) from None

    def model(self, name: str) -> ChosenModel:
        """Return the model that answers for the agent ``name``."""
        return self._models[name]

    async def execute(self, plugin: AgentPlugin, items: list[Any], run: RunCapture) -> RunResult:
        """Run the agent on Responses items; its spans are filed with ``run`` if that is sampled.

        Raises:
            RunError: what the SDK raised, as one of ours.
        """
        config = RunConfig(
            model=self._models[plugin.name].model,
            workflow_name=plugin.name,
            trace_id=run.sdk_trace_id,
            group_id=run.trace.session_id,
            tracing_disabled=not run.sampled,
            tracing={"include_task_and_turn_spans": False},
            trace_include_sensitive_data=True,  # redaction is ours, and comes before anything is written
            tool_error_formatter=self._note_tool_error,
        )
        try:
            # A clone a run: the SDK scans the runs in flight that share one Agent object.
            return await Runner.run(plugin.agent.clone(), items, run_config=config, max_turns=self._max_turns)
        except MaxTurnsExceeded as error:
            raise MaxTurnsReached(
                f"The agent did not come to an answer within {self._max_turns} model calls. Ask for less at once, or "
                "raise GATEWAY_MAX_TURNS."
            ) from error
        except (InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered) as error:
            raise RunBlocked("A guardrail of the agent blocked this request. Rephrase it.") from error
        except (openai.OpenAIError, ModelBehaviorError) as error:
            raise ModelFailed("The agent's language model failed. Try again; its trace has the details.") from error
        except Exception as error:
            log.warning("run failed", agent=plugin.name, trace_id=run.trace.trace_id, error=type(error).__name__)
            raise RunFailed("The agent failed on this request; its trace has the details.") from error

    def _note_tool_error(self, failure: ToolErrorFormatterArgs[Any]) -> None:
        """Put the true reason of a tool's failure on the trace; the model is told what the SDK would tell it."""
        if failure.error is not None:
            self._capture.note_tool_error(failure.error)


def answer_text(final_output: Any) -> str:
    """Return an agent's final output as text; a structured one as its JSON."""
    if isinstance(final_output, str):
        return final_output
    if hasattr(final_output, "model_dump_json"):
        return str(final_output.model_dump_json())
    return str(final_output)
