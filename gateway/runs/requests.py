"""What a run is asked for and what it gives: the common form of every body that is accepted.

Nothing here knows of HTTP. `gateway.http` decodes its bodies into a `RunRequest` and renders a `RunResult`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import agents as sdk
from agents.agent_output import AgentOutputSchemaBase
from agents.exceptions import ModelBehaviorError
from agents.strict_schema import ensure_strict_json_schema
from agents.tool_context import ToolContext

from gateway.errors import GatewayError, InvalidRequest
from gateway.storage.schema import ANONYMOUS


class ClientTool(sdk.FunctionTool):
    """A function that the client brought and will run itself: the run ends when the model calls it."""

    is_client_tool: ClassVar[bool] = True


def client_tool(name: str, description: str, parameters: dict[str, Any] | None, *, strict: bool) -> ClientTool:
    """Return a tool of the client.

    Args:
        name: as the model calls it.
        description: what it does, for the model.
        parameters: JSON schema of its arguments; ``None``: it takes none.
        strict: the model must keep to the schema exactly, which only some schemas allow.

    Raises:
        InvalidRequest: the schema cannot be used.
    """
    schema = parameters or {"type": "object", "properties": {}}
    try:
        if strict:
            ensure_strict_json_schema(json.loads(json.dumps(schema)))
        return ClientTool(
            name=name,
            description=description,
            params_json_schema=schema,
            on_invoke_tool=_left_to_the_client,
            strict_json_schema=strict,
        )
    except (sdk.UserError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InvalidRequest(f"Tool {name!r} has parameters that cannot be used: {error}", "tools") from None


async def _left_to_the_client(_context: ToolContext[Any], _arguments: str) -> str:
    return ""


class ClientSchema(AgentOutputSchemaBase):
    """A JSON schema that the client wants the answer in."""

    def __init__(self, name: str, schema: dict[str, Any] | None, *, strict: bool):
        """Take the name, the schema (``None``: any JSON object will do), and whether it is to be kept exactly."""
        self._name = name
        self._schema = schema or {"type": "object"}
        self._strict = strict

    def is_plain_text(self) -> bool:
        """Return that it is not."""
        return False

    def name(self) -> str:
        """Return the client's name for it."""
        return self._name

    def json_schema(self) -> dict[str, Any]:
        """Return the schema."""
        return self._schema

    def is_strict_json_schema(self) -> bool:
        """Return what the client said."""
        return self._strict

    def validate_json(self, json_str: str) -> Any:
        """Return the parsed answer; the provider has held it against the schema, we only see that it is JSON."""
        try:
            return json.loads(json_str)
        except ValueError as error:
            raise ModelBehaviorError(f"the answer is not JSON: {error}") from None


class ApprovalAnswer(NamedTuple):
    """What a person decided on a tool call that waits for approval."""

    approval_id: str
    approve: bool
    reason: str | None = None
    """Told to the model when the call was not approved; ``None``: a standard sentence."""


@dataclass(frozen=True)
class RunOptions:
    """What a request may change about a run."""

    settings: sdk.ModelSettings | None = None
    """Passed to the model on top of the agent's own settings."""
    instructions: str | None = None
    """Shown to the model in front of the conversation, for this run alone."""
    tools: tuple[ClientTool, ...] = ()
    schema: ClientSchema | None = None
    context: dict[str, Any] = field(default_factory=dict)
    """The run's context, which tools can read: see ``docs/agents.md``."""

    @property
    def client_tools(self) -> frozenset[str]:
        """Names of the client's tools."""
        return frozenset(tool.name for tool in self.tools)


NO_OPTIONS = RunOptions()
"""The agent as it is."""


@dataclass(frozen=True)
class RunRequest:
    """One turn to be run."""

    items: list[Any]
    """This turn's new input, as Responses items; empty only if there are approvals."""
    agent: str | None = None
    """``None``: the default agent."""
    session_id: str | None = None
    """``None``: the session of ``previous_response_id`` or of the approvals, else a new one."""
    user: str | None = None
    key_id: str = ANONYMOUS
    """API key of the caller: sessions and responses belong to it."""
    transcript: list[Any] | None = None
    """Earlier items that the client carries itself: the model sees them in place of the stored history.
    ``None``: the stored history counts."""
    previous_response_id: str | None = None
    """Response that this turn follows; if its session has gone on since, a fork begins."""
    approvals: tuple[ApprovalAnswer, ...] = ()
    options: RunOptions = NO_OPTIONS
    remember: bool = True
    """Keep the turn in the session."""
    stream: bool = False
    """Give events as they come."""
    background: bool = False
    """Nobody waits for it: it is neither ended with its client's connection nor answered by it."""
    keep_trace: bool = False
    """The client asked that the trace be kept, whatever the sampling says."""
    traceparent: str | None = None
    """W3C trace context of the caller, as it was sent; ``None``: there was none."""
    tracestate: str | None = None
    """The header that goes with it."""
    render: "Callable[[Run, RunResult | GatewayError | None], dict[str, Any]] | None" = None
    """Makes the body of the response that is stored; ``None`` as outcome: it is under way. ``None``: none is kept."""

    @property
    def answers_calls(self) -> bool:
        """Whether it goes on with tool calls or approvals of the turn before."""
        known = {item.get("call_id") for item in self.items if item.get("type") == "function_call"}
        outputs = {item.get("call_id") for item in self.items if item.get("type") == "function_call_output"}
        return bool(self.approvals or outputs - known)


class TokenUsage(NamedTuple):
    """Tokens of all model calls of a run."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    """Part of ``input_tokens``."""
    reasoning_tokens: int = 0
    """Part of ``output_tokens``."""
    cache_write_tokens: int = 0
    """Part of ``input_tokens``."""

    @classmethod
    def of(cls, usage: sdk.Usage) -> "TokenUsage":
        """Return what the SDK counted."""
        return cls(
            usage.input_tokens,
            usage.output_tokens,
            usage.input_tokens_details.cached_tokens or 0,
            usage.output_tokens_details.reasoning_tokens or 0,
            usage.input_tokens_details.cache_write_tokens or 0,
        )

    def __sub__(self, other: "TokenUsage") -> "TokenUsage":
        """Return the tokens since ``other`` was counted."""
        return TokenUsage(*(mine - theirs for mine, theirs in zip(self, other, strict=True)))


@dataclass
class Run:
    """What is known of a run from its beginning on."""

    trace_id: str
    session_id: str
    """As the client gave it, or as generated: send it again to go on."""
    agent: str
    agent_version: str
    model: str
    offline: bool
    sampled: bool
    """Whether the draw keeps its conversation. If not, a tail rule still may."""
    created_at: float
    """Seconds since the epoch."""

    @property
    def response_id(self) -> str:
        """Id of the answer in the Responses API."""
        return self.trace_id.replace("tr-", "resp_", 1)


class ApprovalRequest(NamedTuple):
    """A tool call that waits for a person's decision."""

    approval_id: str
    tool: str
    arguments: str
    """JSON."""
    call_id: str


@dataclass(frozen=True)
class RunResult:
    """A run that was answered, or paused for approvals, or handed tool calls to the client."""

    run: Run
    answer: str
    """Text of the final answer; empty if the run paused or the client is to run tools."""
    output: list[dict[str, Any]]
    """Output items as the Responses API shows them: messages, tool calls, their outputs, approval requests."""
    usage: TokenUsage
    completed_at: float
    """Seconds since the epoch."""
    approvals: tuple[ApprovalRequest, ...] = ()
    """Tool calls that wait for a decision; the run goes on once all are answered."""
