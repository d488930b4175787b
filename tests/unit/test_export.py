"""Our traces as MLflow's entities, and as spans of OpenTelemetry: no store, no server."""

import json
from typing import Any

import pytest

from gateway.evaluation.conventions import to_opentelemetry
from gateway.evaluation.export import kept_tags, to_mlflow
from gateway.evaluation.store import is_away
from gateway.settings import MLFLOW_DEFAULTS
from gateway.tracing.spans import Span, SpanError, Trace

MS = 1_000_000
CALL = {"mlflow.llm.model": "gpt-4o-mini", "mlflow.llm.provider": "openai"}
USAGE = {"mlflow.chat.tokenUsage": {"input_tokens": 1000, "output_tokens": 0, "total_tokens": 1000}}


@pytest.fixture(autouse=True)
def _as_in_the_evaluator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep MLflow from fetching prices from outside, as the evaluator does."""
    for name, value in MLFLOW_DEFAULTS.items():
        monkeypatch.setenv(name, value)


def trace(*spans: Span, **fields: Any) -> Trace:
    """Return a trace whose root is an agent that answers."""
    root = Span("a" * 16, None, "math", "AGENT", MS, 9 * MS, {"messages": [{"role": "user", "content": "hi"}]})
    frame = {"agent": "math", "agent_version": "v1", "session_id": "s", "user_id": None, "offline": False}
    times = {"started_ns": MS, "ended_ns": 9 * MS}
    return Trace(**(frame | times | {"trace_id": f"tr-{'1' * 32}", "spans": [root, *spans]} | fields))


def child(kind: Any = "CHAT_MODEL", number: str = "b", parent: str = "a", **fields: Any) -> Span:
    """Return a span below the root, or below another one."""
    return Span(number * 16, parent * 16, "it", kind, 2 * MS, 3 * MS, **fields)


def test_cost_and_usage_count_once_what_a_parent_sums_up() -> None:
    """A span of an author's own that repeats the sum of its model calls does not double the trace's."""
    inner = child(number="c", parent="b", attributes=CALL | USAGE)
    found = to_mlflow(trace(child("CHAIN", attributes=USAGE), inner), "1", {}).info
    assert found.token_usage["total_tokens"] == 1000
    assert found.cost["total_cost"] == pytest.approx(0.00015)


@pytest.mark.parametrize(
    ("attributes", "offline"),
    [(CALL | USAGE, True), (USAGE | {"mlflow.llm.model": "no-such-model"}, False), (CALL, False)],
)
def test_what_has_no_price_has_no_cost(attributes, offline) -> None:
    """An offline model costs nothing that is known, nor does a model off the list, or one that tells no usage."""
    found = to_mlflow(trace(child(attributes=attributes), offline=offline), "1", {})
    assert found.info.cost is None
    assert found.data.spans[1].llm_cost is None


def test_our_own_tags_and_metadata_stand_over_an_authors() -> None:
    """Tags and metadata of a tool's author are taken over, cut to what MLflow takes, and replace none of ours."""
    own = {"tags": {"agent": "x", "long": "y" * 9000}, "metadata": {"gateway.agent": "x", "page": "1"}}
    found = to_mlflow(trace(**own), "1", kept_tags(0.25, ["sampled", "slow"])).info
    assert (found.tags["agent"], len(found.tags["long"])) == ("math", 4096)
    assert (found.trace_metadata["gateway.agent"], found.trace_metadata["page"]) == ("math", "1")
    assert (found.tags["gateway.inclusion_probability"], found.tags["gateway.kept_because"]) == ("0.25", "sampled,slow")


def test_a_client_that_left_an_answered_run_is_no_error() -> None:
    """Only a run that was cancelled is in error and tagged as such."""
    answered = to_mlflow(trace(client_left=True), "1", {}).info
    cancelled = to_mlflow(trace(error=SpanError("CANCELLED", "stopped")), "1", {}).info
    assert (answered.state, answered.trace_metadata["gateway.client_left"]) == ("OK", "true")
    assert "gateway.cancelled" not in answered.tags
    assert (cancelled.state, cancelled.tags["gateway.cancelled"]) == ("ERROR", "true")


def test_messages_take_the_conventions_form() -> None:
    """Instructions stand apart, calls and their results are parts of messages, and the answer says why it ended."""
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    inputs = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
        ],
        "temperature": 0.5,
    }
    outputs = {"choices": [{"message": {"role": "assistant", "content": None, "tool_calls": [call]}}]}
    called = trace(child(inputs=inputs, outputs=outputs, attributes=CALL))
    span = to_opentelemetry(called, probability=1.0, reasons=["error"])[1]
    found = {key: json.loads(value) for key, value in span.attributes.items() if str(value).startswith("[")}
    part = {"type": "tool_call", "id": "c1", "name": "add", "arguments": '{"a": 1}'}
    answer = {"type": "tool_call_response", "id": "c1", "response": "2"}
    assert found["gen_ai.system_instructions"] == [{"type": "text", "content": "Be brief."}]
    assert found["gen_ai.input.messages"] == [
        {"role": "assistant", "parts": [part]},
        {"role": "tool", "parts": [answer]},
    ]
    assert found["gen_ai.output.messages"] == [{"role": "assistant", "parts": [part], "finish_reason": "tool_call"}]
    assert span.attributes["gen_ai.request.temperature"] == 0.5


def test_without_a_caller_the_trace_is_ours() -> None:
    """No ``traceparent``: our own id, and a root without a parent."""
    root = to_opentelemetry(trace(), probability=0.25, reasons=["sampled"])[0]
    assert (f"{root.context.trace_id:032x}", root.parent) == ("1" * 32, None)
    assert (root.attributes["gateway.inclusion_probability"], root.attributes["gateway.kept_because"]) == (
        0.25,
        ["sampled"],
    )


class Refusal(Exception):
    sqlstate = "54000"


def test_an_outage_is_told_from_a_refusal() -> None:
    """What lies at the bottom decides: a connection that broke is an outage, a row that is too large is none."""

    def raised(cause: Exception) -> Exception:
        error = RuntimeError("MLflow says")
        error.__cause__ = cause
        return error

    assert is_away(raised(ConnectionResetError()))
    assert not is_away(raised(ValueError()))
    assert not is_away(raised(Refusal("index row too large")))
