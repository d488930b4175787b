"""One agent, one turn, in the SDK: no session, no store. What live runs and offline evaluation have in common."""

import asyncio
import copy
import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import agents as sdk
import openai
import structlog
from agents import RunConfig, Runner
from agents.exceptions import ModelRefusalError, ModelTimeoutError, ToolTimeoutError
from agents.items import ToolApprovalItem
from agents.run_config import CallModelData, ModelInputData, ToolErrorFormatterArgs
from agents.run_internal.turn_preparation import get_model_settings
from agents.run_state import RunState

from gateway.errors import (
    AgentMisconfigured,
    AgentNotFound,
    ContextTooLong,
    InvalidRequest,
    MaxTurnsReached,
    ModelFailed,
    ModelMisbehaved,
    ModelRateLimited,
    ModelTimeout,
    RunBlocked,
    RunError,
    RunFailed,
    ToolTimeout,
)
from gateway.plugins import AgentPlugin
from gateway.runs.identity import defer_identities
from gateway.runs.items import ItemTranslator, output_items
from gateway.runs.models import ChosenModel, choose_model, openai_provider
from gateway.runs.requests import NO_OPTIONS, ApprovalAnswer, ApprovalRequest, RunOptions, TokenUsage
from gateway.settings import Settings
from gateway.tracing.capture import RunCapture, SpanCapture

log = structlog.get_logger(__name__)

Emit = Callable[[dict[str, Any]], None]
"""Takes an item-level event of a stream (`gateway.runs.items`)."""

_STOP_WAIT_S = 2.0  # for a tool that catches its cancellation; its session must not wait for it
_WITH_USAGE = sdk.ModelSettings(include_usage=True)
_MODEL_RETRY_S = 5.0  # what a client is told to wait when the model's provider did not say


class Snapshot(NamedTuple):
    """A run that waits for approvals, so that any process can go on with it."""

    state: dict[str, Any]
    """The SDK's run state, as JSON."""
    items: int
    """Items that the run had produced when it paused."""
    usage: TokenUsage
    """Tokens that it had used."""


@dataclass(frozen=True)
class Outcome:
    """What an execution gave."""

    answer: str | None
    """Text of the final answer; ``None`` if it paused, or if the client is to run tools."""
    items: list[Any]
    """Items for the session's history."""
    output: list[dict[str, Any]]
    """The same, as the Responses API shows them."""
    usage: TokenUsage
    snapshot: Snapshot | None = None
    approvals: tuple[ApprovalRequest, ...] = ()


class AgentExecutor:
    """The agents with their models, ready to run. One a process."""

    def __init__(self, settings: Settings, plugins: dict[str, AgentPlugin], capture: SpanCapture):
        """Choose each agent's model; raise `ConfigurationError` where there is none, or no such default agent."""
        defer_identities()
        self._plugins = plugins
        provider = openai_provider(settings)
        self._models = {name: choose_model(plugin, settings.model, provider) for name, plugin in plugins.items()}
        self._capture = capture
        self._configs = {name: self._template(name) for name in plugins}
        self._agents = {name: self._prepared(plugin.agent, self._configs[name]) for name, plugin in plugins.items()}
        self._shows_history = {name: _needs_history(plugin.agent) for name, plugin in plugins.items()}
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

    def check(self, plugin: AgentPlugin, options: RunOptions) -> None:
        """Raise `InvalidRequest` if the client's tools cannot stand beside the agent's, or it chose one not there."""
        own = {tool.name for tool in plugin.agent.tools}
        choice = options.settings.tool_choice if options.settings else None
        if isinstance(choice, str) and choice not in {"auto", "none", "required"} | own | options.client_tools:
            raise InvalidRequest(f"tool_choice names {choice!r}, and there is no such tool.", "tool_choice")
        taken = own & options.client_tools
        if taken:
            raise InvalidRequest(
                f"The agent {plugin.name} has a tool named {', '.join(sorted(taken))} itself. Rename yours.", "tools"
            )

    async def execute(
        self,
        plugin: AgentPlugin,
        items: list[Any],
        run: RunCapture,
        options: RunOptions = NO_OPTIONS,
        emit: Emit | None = None,
        *,
        history: int = 0,
    ) -> Outcome:
        """Run the agent on Responses items; its spans are filed with ``run`` if that is sampled.

        Args:
            plugin: the agent.
            items: the whole conversation that the model is to see.
            run: takes the spans.
            options: what the request changes.
            emit: takes the events of a stream as they come; ``None``: no stream is wanted.
            history: how many of the items, from the first, are of earlier turns. Where nothing but the model looks at
                them, the SDK is spared them: it copies what it is given several times a model call.

        Raises:
            RunError: what the SDK raised, as one of ours.
        """
        told = [{"role": "developer", "content": options.instructions}] if options.instructions else []
        if history and not self._shows_history[plugin.name]:
            earlier, asked = [*told, *items[:history]], items[history:]
        else:
            earlier, asked = [], [*told, *items]
        return await self._run(plugin, self._agent(plugin, options), asked, run, options, emit, None, earlier)

    async def resume(
        self,
        plugin: AgentPlugin,
        snapshot: Snapshot,
        decisions: dict[str, ApprovalAnswer],
        run: RunCapture,
        options: RunOptions = NO_OPTIONS,
        emit: Emit | None = None,
    ) -> Outcome:
        """Go on with a run that paused; ``decisions`` are by call id. The rest is as for `execute`.

        Raises:
            RunError: as for `execute`; also when the agent was changed so much that its run cannot go on.
        """
        agent = self._agent(plugin, options)
        try:
            state: Any = await RunState.from_json(agent, snapshot.state, context_override=options.context)
        except sdk.UserError as error:
            raise AgentMisconfigured(
                "The agent was changed since this run paused, so it cannot go on. Ask again in a new message."
            ) from error
        state.set_trace(None)  # the spans from here on belong to the trace of this request
        for item in state.get_interruptions():
            decision = decisions[str(item.call_id)]
            if decision.approve:
                state.approve(item)
            else:
                state.reject(item, rejection_message=decision.reason)
        return await self._run(plugin, agent, state, run, options, emit, snapshot)

    async def _run(
        self,
        plugin: AgentPlugin,
        agent: sdk.Agent[Any],
        asked: Any,
        run: RunCapture,
        options: RunOptions,
        emit: Emit | None,
        before: Snapshot | None,
        earlier: list[Any] | None = None,
    ) -> Outcome:
        config = self._config(plugin, run, options, streamed=emit is not None)
        if earlier:
            config.call_model_input_filter = _after(earlier)
        context = None if isinstance(asked, RunState) else options.context
        try:
            with self._capture.inside(run):
                if emit is None:
                    result: Any = await Runner.run(
                        agent, asked, run_config=config, max_turns=self._max_turns, context=context
                    )
                    return _outcome(plugin, result, run.stem, options, before)
                streamed = Runner.run_streamed(
                    agent, asked, run_config=config, max_turns=self._max_turns, context=context
                )
                translator = ItemTranslator(run.stem, options.client_tools)
                await _forward(streamed, translator, emit)
                outcome = _outcome(plugin, streamed, run.stem, options, before)
                for request in outcome.approvals:
                    for event in translator.add(_approval_item(plugin.name, request)):
                        emit(event)
                return replace(outcome, output=translator.output)
        except Exception as error:
            failure = error if isinstance(error, RunError) else self._failure(error)
            log.warning("run failed", agent=plugin.name, trace_id=run.trace.trace_id, error=type(error).__name__)
            raise failure from error

    def _agent(self, plugin: AgentPlugin, options: RunOptions) -> sdk.Agent[Any]:
        """Return a copy for one run: the SDK scans the runs in flight that share one Agent object."""
        # Not `clone`, which looks at every field again: they are those of an agent that was looked at.
        agent = copy.copy(self._agents[plugin.name])
        if options.tools:
            agent.tools = [*plugin.agent.tools, *options.tools]
            agent.tool_use_behavior = _stop_at_client_tools(plugin.agent, options.client_tools)
        if options.schema is not None:
            agent.output_type = options.schema
        return agent

    def _template(self, agent: str) -> RunConfig:
        """Return what the runs of an agent have in common; made once, since to make it is a tenth of a run's work."""
        return RunConfig(
            model=self._models[agent].model,
            workflow_name=agent,
            tracing={"include_task_and_turn_spans": False},
            trace_include_sensitive_data=True,  # redaction is ours, and comes before anything is written
            tool_error_formatter=self._note_tool_error,
        )

    @staticmethod
    def _prepared(agent: sdk.Agent[Any], config: RunConfig) -> sdk.Agent[Any]:
        """Return the agent with its model and the settings that it has with it, which the SDK finds anew each turn."""
        prepared = copy.copy(agent)
        prepared.model_settings = get_model_settings(agent, config)
        prepared.model = config.model
        return prepared

    def _config(self, plugin: AgentPlugin, run: RunCapture, options: RunOptions, *, streamed: bool) -> RunConfig:
        config = copy.copy(self._configs[plugin.name])
        config.trace_id, config.group_id = run.sdk_trace_id, run.trace.session_id
        config.tracing_disabled = not run.sampled
        config.model_settings = options.settings
        if streamed:  # servers that speak Chat Completions leave the usage out of a stream unless they are asked for it
            config.model_settings = replace(options.settings, include_usage=True) if options.settings else _WITH_USAGE
        return config

    def _failure(self, error: Exception) -> RunError:
        """Return what the SDK or the model's client raised as one of ours. No word of theirs goes to the client."""
        match error:
            case sdk.MaxTurnsExceeded():
                return MaxTurnsReached(
                    f"The agent did not come to an answer within {self._max_turns} model calls. Ask for less at once, "
                    "or raise GATEWAY_MAX_TURNS."
                )
            case (
                sdk.InputGuardrailTripwireTriggered()
                | sdk.OutputGuardrailTripwireTriggered()
                | sdk.ToolInputGuardrailTripwireTriggered()
                | sdk.ToolOutputGuardrailTripwireTriggered()
            ):
                return RunBlocked("A guardrail of the agent blocked this request. Rephrase it.")
            case ModelRefusalError():
                return RunBlocked("The agent's language model refused to answer. Rephrase the request.")
            case sdk.ModelBehaviorError():
                return ModelMisbehaved("The agent's language model answered something unusable. Try again.")
            case ToolTimeoutError():
                return ToolTimeout(
                    f"The tool {error.tool_name} did not answer within {error.timeout_seconds:g} s. Try again later."
                )
            case ModelTimeoutError() | openai.APITimeoutError():
                return ModelTimeout("The agent's language model did not answer in time. Try again.")
            case openai.OpenAIError():
                return _model_failure(error)
            case sdk.UserError() if error.__cause__ is None:  # else it wraps what a tool raised
                return AgentMisconfigured(
                    "The agent's code uses the SDK in a way that the SDK refuses; its trace has the details."
                )
            case _:
                return RunFailed("The agent failed on this request; its trace has the details.")

    def _note_tool_error(self, failure: ToolErrorFormatterArgs[Any]) -> None:
        """Put the true reason of a tool's failure on the trace; the model is told what the SDK would tell it."""
        if failure.error is not None:
            self._capture.note_tool_error(failure.error)


async def _forward(streamed: Any, translator: ItemTranslator, emit: Emit) -> None:
    """Pass on the events of a streamed run until it has ended. When cancelled, end the run first."""
    try:
        async for event in streamed.stream_events():
            for item_event in translator.feed(event):
                emit(item_event)
    except BaseException:
        # Leaving the iterator does not stop the SDK's own task; its spans are whole only when that has ended.
        streamed.cancel()
        if (task := streamed.run_loop_task) is not None:
            await asyncio.wait([task], timeout=_STOP_WAIT_S)
        for item_event in translator.close():
            emit(item_event)
        raise


def _outcome(plugin: AgentPlugin, result: Any, stem: str, options: RunOptions, before: Snapshot | None) -> Outcome:
    """Return what is new since the run began, or since it paused."""
    new_items = result.new_items[before.items if before else 0 :]
    fresh = [item for item in new_items if not isinstance(item, ToolApprovalItem)]
    handed_over = _calls_of(fresh, options.client_tools)
    # What the SDK holds for the outputs of the client's tools only stands in for what the client will say.
    kept = [item for item in fresh if not (item.type == "tool_call_output_item" and item.call_id in handed_over)]
    usage = TokenUsage.of(result.context_wrapper.usage)
    approvals = tuple(
        ApprovalRequest(f"mcpr_{uuid.uuid4().hex}", str(item.name), str(item.arguments or "{}"), str(item.call_id))
        for item in result.interruptions
    )
    snapshot = Snapshot(result.to_state().to_json(), len(result.new_items), usage) if approvals else None
    return Outcome(
        answer=None if approvals or handed_over else answer_text(result.final_output),
        # Not `result.to_input_list()`: a handoff may have rewritten the history that it begins with.
        items=[item.to_input_item() for item in kept],
        output=[
            *output_items(fresh, stem, options.client_tools),
            *(_approval_item(plugin.name, request) for request in approvals),
        ],
        usage=usage - before.usage if before else usage,
        snapshot=snapshot,
        approvals=approvals,
    )


def _calls_of(items: list[Any], names: frozenset[str]) -> set[str]:
    """Return the ids of the calls of these tools."""
    calls = (item for item in items if item.type == "tool_call_item")
    return {str(item.call_id) for item in calls if getattr(item.raw_item, "name", None) in names}


def _approval_item(agent: str, request: ApprovalRequest) -> dict[str, Any]:
    """Return an approval as the Responses API shows those of MCP servers: the agent stands for the server."""
    return {
        "type": "mcp_approval_request",
        "id": request.approval_id,
        "name": request.tool,
        "arguments": request.arguments,
        "server_label": agent,
    }


def _needs_history(agent: sdk.Agent[Any]) -> bool:
    """Whether anything but the model looks at the earlier turns: handoffs, guardrails, hooks, a run that can pause."""
    plain = all(isinstance(tool, sdk.FunctionTool) and tool.needs_approval is False for tool in agent.tools)
    return not plain or bool(agent.handoffs or agent.input_guardrails or agent.hooks or agent.mcp_servers)


def _after(earlier: list[Any]) -> Callable[[CallModelData[Any]], ModelInputData]:
    """Return what puts the earlier items before what the SDK has for a model call."""

    def put(call: CallModelData[Any]) -> ModelInputData:
        return ModelInputData([*earlier, *call.model_data.input], call.model_data.instructions)

    return put


def _stop_at_client_tools(agent: sdk.Agent[Any], names: frozenset[str]) -> Any:
    """Return a rule that ends the run once the client is to run a tool, and is the agent's own rule otherwise."""
    own = agent.tool_use_behavior

    async def decide(
        context: sdk.RunContextWrapper[Any], results: list[sdk.FunctionToolResult]
    ) -> sdk.ToolsToFinalOutputResult:
        if any(result.tool.name in names for result in results):
            return sdk.ToolsToFinalOutputResult(is_final_output=True)
        if callable(own):
            decision = own(context, results)
            return await decision if asyncio.iscoroutine(decision) else decision  # type: ignore[return-value]
        stops = own.get("stop_at_tool_names", []) if isinstance(own, dict) else None
        for result in results:
            if own == "stop_on_first_tool" or (stops and result.tool.name in stops):
                return sdk.ToolsToFinalOutputResult(is_final_output=True, final_output=result.output)
        return sdk.ToolsToFinalOutputResult(is_final_output=False)

    return decide


def _model_failure(error: openai.OpenAIError) -> RunError:
    if isinstance(error, openai.RateLimitError):
        failure = ModelRateLimited("The language model's provider takes no more requests for now. Try again later.")
        failure.retry_after_s = _retry_after(error) or _MODEL_RETRY_S
        return failure
    if isinstance(error, openai.BadRequestError) and error.code == "context_length_exceeded":
        return ContextTooLong("The conversation is too long for the agent's language model. Begin a new session.")
    return ModelFailed("The agent's language model failed. Try again; its trace has the details.")


def _retry_after(error: openai.RateLimitError) -> float | None:
    try:
        return max(float(error.response.headers["retry-after"]), 0.0)
    except (KeyError, ValueError):
        return None


def answer_text(final_output: Any) -> str:
    """Return an agent's final output as text; a structured one as its JSON."""
    if isinstance(final_output, str):
        return final_output
    if hasattr(final_output, "model_dump_json"):
        return str(final_output.model_dump_json())
    if isinstance(final_output, dict | list):
        return json.dumps(final_output, ensure_ascii=False)
    return str(final_output)
