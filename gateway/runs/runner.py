"""One run of an agent, from the request to the committed turn and the finished trace."""

import asyncio
import time
import uuid
from dataclasses import dataclass
from typing import Any

import openai
import psycopg
import structlog
from agents import (
    InputGuardrailTripwireTriggered,
    MaxTurnsExceeded,
    ModelBehaviorError,
    OutputGuardrailTripwireTriggered,
    RunConfig,
    Runner,
    Usage,
)
from agents.run_config import ToolErrorFormatterArgs
from psycopg_pool import PoolTimeout

from gateway.crypto import Keys
from gateway.errors import (
    AgentNotFound,
    GatewayError,
    MaxTurnsReached,
    ModelFailed,
    RunBlocked,
    RunFailed,
    RunTimeout,
    ServiceUnavailable,
    SessionBusy,
)
from gateway.plugins import AgentPlugin
from gateway.runs.models import ChosenModel, choose_model
from gateway.runs.sessions import SessionStore
from gateway.settings import Settings
from gateway.tracing.capture import RunCapture, SpanCapture
from gateway.tracing.outbox import OutboxWriter
from gateway.tracing.redaction import Redactor
from gateway.tracing.sampling import keep_session
from gateway.tracing.spans import SpanError, Trace

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class RunRequest:
    """What every accepted body is decoded into."""

    items: list[Any]
    """This turn's new input, as Responses items; never empty."""
    agent: str | None = None
    """``None``: the default agent."""
    session_id: str | None = None
    """``None``: a new session."""
    user: str | None = None


@dataclass(frozen=True)
class RunResult:
    """A run that was answered."""

    answer: str
    output: list[Any]
    """Responses items that the run produced: messages, tool calls and their outputs."""
    session_id: str
    """As the client gave it, or as generated: send it again to go on."""
    trace_id: str
    sampled: bool
    """Whether the trace is kept and scored."""
    usage: Usage
    agent: str
    agent_version: str
    model: str
    offline: bool


class AgentRunner:
    """Runs agents. One a web process."""

    def __init__(
        self,
        settings: Settings,
        keys: Keys,
        agents: dict[str, AgentPlugin],
        sessions: SessionStore,
        capture: SpanCapture,
        outbox: OutboxWriter,
        redactor: Redactor,
    ):
        self._settings = settings
        self._sampling_key = keys.derive("sampling")
        self._agents = agents
        self._models = {name: choose_model(plugin, settings) for name, plugin in agents.items()}
        self._sessions = sessions
        self._capture = capture
        self._outbox = outbox
        self._redactor = redactor
        self._default = settings.default_agent or next(iter(agents))
        self.agent(self._default)  # a wrong GATEWAY_DEFAULT_AGENT must not wait for the first request

    def agent(self, name: str | None) -> AgentPlugin:
        """Return the agent of that name, or the default one; raise `AgentNotFound`."""
        try:
            return self._agents[name or self._default]
        except KeyError:
            raise AgentNotFound(f"There is no agent {name!r} here; there is {', '.join(self._agents)}.") from None

    def model(self, name: str) -> ChosenModel:
        """Return the model that answers for the agent ``name``."""
        return self._models[name]

    async def run(self, request: RunRequest) -> RunResult:
        """Run the agent and return its answer.

        Raises:
            AgentNotFound: there is no such agent; nothing was stored.
            RunError: the run failed; the session is as it was, the trace is kept like any other.
            SessionBusy: another run held the session for longer than this one's whole time.
        """
        plugin = self.agent(request.agent)
        session_id = request.session_id or f"s-{uuid.uuid4().hex}"
        run = self._begin(plugin, request, session_id)
        try:
            output, usage = await self._answer(plugin, request, run)
        except BaseException as error:
            self._finish(run, _run_error(error))
            raise
        self._finish(run, None)
        model = self._models[plugin.name]
        return RunResult(
            answer=run.answer or "",
            output=output,
            session_id=session_id,
            trace_id=run.trace.trace_id,
            sampled=run.sampled,
            usage=usage,
            agent=plugin.name,
            agent_version=plugin.version,
            model=model.name,
            offline=model.offline,
        )

    def _begin(self, plugin: AgentPlugin, request: RunRequest, session_id: str) -> RunCapture:
        rate = self._settings.sample_rate
        stored_id = self._redactor.identifier(session_id, "session")
        trace = Trace(
            trace_id=f"tr-{uuid.uuid4().hex}",
            agent=plugin.name,
            agent_version=plugin.version,
            session_id=stored_id,
            user_id=self._redactor.identifier(request.user, "user") if request.user else None,
            offline=self._models[plugin.name].offline,
            inclusion_probability=rate,
            started_ns=time.time_ns(),
            ended_ns=0,
            spans=[],
        )
        run = RunCapture(trace, request.items, sampled=keep_session(self._sampling_key, stored_id, rate))
        self._capture.begin(run)
        return run

    def _finish(self, run: RunCapture, error: SpanError | None) -> None:
        self._capture.end(run)
        run.trace.ended_ns = time.time_ns()
        run.trace.error = error
        if error is not None:
            run.answer = None
        self._outbox.offer(run)

    async def _answer(self, plugin: AgentPlugin, request: RunRequest, run: RunCapture) -> tuple[list[Any], Usage]:
        """Take the session's turn, run, commit; return the new items and the usage."""
        waiting = True
        try:
            async with (
                asyncio.timeout(self._settings.run_timeout_s),
                self._sessions.turn(run.trace.session_id) as turn,
            ):
                waiting = False
                result = await self._call(plugin, turn.history + request.items, run)
                items = result.to_input_list()
                run.answer = _text(result.final_output)
                await self._sessions.commit(turn, items[len(turn.history) :])
                return items[len(turn.history) + len(request.items) :], result.context_wrapper.usage
        except (psycopg.OperationalError, PoolTimeout) as error:
            log.error("database away", error=str(error))
            raise ServiceUnavailable(
                "The gateway cannot reach its database, so it cannot load or keep the session. Try again shortly."
            ) from error
        except TimeoutError:
            limit = f"{self._settings.run_timeout_s:g} s"
            if waiting:
                raise SessionBusy(
                    f"Another request held this session's turn for {limit}. Send one turn at a time, or try again."
                ) from None
            raise RunTimeout(
                f"The run took longer than {limit}. Ask for less at once, or raise GATEWAY_RUN_TIMEOUT_S."
            ) from None

    async def _call(self, plugin: AgentPlugin, items: list[Any], run: RunCapture) -> Any:
        """Run the agent in the SDK; turn what it raises into our errors."""
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
            return await Runner.run(plugin.agent.clone(), items, run_config=config, max_turns=self._settings.max_turns)
        except MaxTurnsExceeded as error:
            raise MaxTurnsReached(
                f"The agent did not come to an answer within {self._settings.max_turns} model calls. Ask for less at "
                "once, or raise GATEWAY_MAX_TURNS."
            ) from error
        except (InputGuardrailTripwireTriggered, OutputGuardrailTripwireTriggered) as error:
            raise RunBlocked("A guardrail of the agent blocked this request. Rephrase it.") from error
        except (openai.OpenAIError, ModelBehaviorError) as error:
            raise ModelFailed("The agent's language model failed. Try again; see the trace for details.") from error
        except Exception as error:
            log.warning("run failed", agent=plugin.name, trace_id=run.trace.trace_id, error=type(error).__name__)
            raise RunFailed("The agent failed on this request; see the trace for details.") from error

    def _note_tool_error(self, failure: ToolErrorFormatterArgs[Any]) -> None:
        """Put the true reason of a tool's failure on the trace; the model is told what the SDK would tell it."""
        if failure.error is not None:
            self._capture.note_tool_error(failure.error)


def _run_error(error: BaseException) -> SpanError:
    """Return what the trace says of a run that was not answered."""
    if isinstance(error, asyncio.CancelledError):
        return SpanError("CANCELLED", "The run was cancelled before it was answered.")
    if isinstance(error, GatewayError):
        return SpanError(error.code, str(error.__cause__ or error))
    return SpanError(type(error).__name__, str(error))


def _text(final_output: Any) -> str:
    """Return the answer as text; a structured output as its JSON."""
    if isinstance(final_output, str):
        return final_output
    if hasattr(final_output, "model_dump_json"):
        return str(final_output.model_dump_json())
    return str(final_output)
