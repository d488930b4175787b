"""The trace as it travels from the web process to the evaluator: plain structs, encoded as msgpack.

They know nothing of MLflow; `gateway.evaluation.export` turns them into MLflow's spans. Ids are those of OpenTelemetry
(W3C trace context): 32 hex digits a trace, 16 a span. MLflow's id of a trace is ``tr-`` and the 32 digits.
"""

from typing import Any, Literal, NamedTuple

import msgspec

from gateway.storage.schema import ANONYMOUS

SpanKind = Literal[
    "AGENT",
    "CHAT_MODEL",
    "TOOL",
    "RETRIEVER",
    "HANDOFF",
    "GUARDRAIL",
    "CHAIN",
    "LLM",
    "EMBEDDING",
    "RERANKER",
    "PARSER",
    "MEMORY",
]
"""Span types as MLflow's UI and judges know them; ``CHAIN`` is any other span of an agent's author."""


class SpanError(msgspec.Struct, omit_defaults=True):
    """Why a span failed."""

    type: str
    """Class name of the exception."""
    message: str


class Span(msgspec.Struct, omit_defaults=True):
    """One operation of a run."""

    span_id: str
    parent_id: str | None
    """``None`` for the root."""
    name: str
    kind: SpanKind
    start_ns: int
    """Wall clock, nanoseconds since the epoch, as is ``end_ns``."""
    end_ns: int = 0
    inputs: Any = None
    outputs: Any = None
    attributes: dict[str, Any] = {}
    """An allow-list that `capture` fills: MLflow's keys, never the run's context, never keys."""
    error: SpanError | None = None


class Trace(msgspec.Struct, omit_defaults=True):
    """One finished run of an agent."""

    trace_id: str
    """MLflow's id: ``tr-`` and 32 hex digits."""
    agent: str
    agent_version: str
    """Hash of the agent's folder."""
    session_id: str
    user_id: str | None
    offline: bool
    """The agent's offline model answered, not a language model."""
    started_ns: int
    """Nanoseconds since the epoch, as is ``ended_ns``."""
    ended_ns: int = 0
    spans: list[Span] = []
    """Root first. Empty for a run that was sampled out."""
    error: SpanError | None = None
    """Why the run failed; ``None`` when it was answered."""
    client_left: bool = False
    """The client was gone before the run had ended."""
    key_id: str = ANONYMOUS
    """API key of the request. For the ledger alone: MLflow is not told."""
    traceparent: str | None = None
    """The caller's W3C header, if it sent a valid one: its trace goes on in this one."""
    tracestate: str | None = None
    """The header that came with it, as it came."""
    tags: dict[str, str] = {}
    """Set by a tool's author with ``mlflow.update_current_trace``, as is all below."""
    metadata: dict[str, str] = {}
    client_request_id: str | None = None
    request_preview: str | None = None
    response_preview: str | None = None

    @property
    def duration_ms(self) -> float:
        """Wall-clock duration of the run in milliseconds."""
        return (self.ended_ns - self.started_ns) / 1e6


class Outcome(NamedTuple):
    """What a finished trace says of its run: the grounds on which it may be worth keeping."""

    failed: bool
    """The run was not answered."""
    tool_failed: bool
    """A tool or retriever failed, or the model called one that is not there."""
    guardrail_tripped: bool
    """A guardrail of any kind stopped something."""
    duration_s: float


_encoder = msgspec.msgpack.Encoder(enc_hook=str)
_decoder = msgspec.msgpack.Decoder(Trace)


def encode(trace: Trace) -> bytes:
    """Return the msgpack form; a value of a type that msgpack has no form for becomes its ``str``."""
    try:
        return _encoder.encode(trace)
    except OverflowError:
        return _encoder.encode(_narrow(msgspec.to_builtins(trace, enc_hook=str)))


def _narrow(value: Any) -> Any:
    """Return a copy in which whole numbers beyond 64 bits are texts: a calculator's results may be."""
    if isinstance(value, dict):
        return {key: _narrow(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_narrow(item) for item in value]
    is_wide = isinstance(value, int) and not -(2**63) <= value < 2**64
    return str(value) if is_wide else value


def decode(data: bytes) -> Trace:
    """Return the trace that `encode` wrote."""
    return _decoder.decode(data)
