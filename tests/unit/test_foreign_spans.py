"""Spans that tools make with MLflow and OpenTelemetry: in the run's tree, in the right place, and nowhere else."""

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
from agents import Agent, Runner, custom_span, function_tool, trace
from agents.testing import ScriptedModel, assistant_message
from mlflow.entities import Document
from mlflow.entities.span import NO_OP_SPAN_TRACE_ID
from opentelemetry import context as otel_context
from opentelemetry import propagate
from opentelemetry import trace as otel

from gateway.tracing.capture import SpanCapture, outcome
from gateway.tracing.capture.assembly import CUT_OFF
from gateway.tracing.spans import SpanError, decode, encode

from .recorded import Captured, add, asks, calculator, is_whole, record

tracer = otel.get_tracer("a library")
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def capture(tmp_path, monkeypatch) -> Iterator[SpanCapture]:
    """The capture, installed as in the web process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    capture = SpanCapture()
    capture.install()
    yield capture
    capture.uninstall()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def run(capture):
    """Run an agent that calls one tool once, and return its trace."""

    async def start(tool: Any, arguments: str = "{}", **options: Any) -> Captured:
        steps = [[asks(tool.name, arguments)], [assistant_message("done")]]
        got = await record(capture, calculator(tool), steps, **options)
        assert is_whole(got)
        return got

    return start


def below(got: Captured, name: str) -> list[tuple[str, str]]:
    """(kind, name) of the spans right below the one of that name."""
    (above,) = [span.span_id for span in got.trace.spans if span.name == name]
    return [(span.kind, span.name) for span in got.trace.spans if span.parent_id == above]


@mlflow.trace(span_type="RETRIEVER")
def look_up(query: str) -> list[Document]:
    return [Document(page_content=f"about {query}", metadata={"doc_uri": "a.md"})]


@mlflow.trace
async def ponder(query: str) -> str:
    with tracer.start_as_current_span("select", attributes={"db.system": "postgres"}):
        return query.upper()


@function_tool
async def awaited(query: str) -> str:
    """Look up, awaited."""
    with mlflow.start_span("outer") as span:
        span.set_inputs({"query": query})
        look_up(query)
        await ponder(query)
        span.set_outputs("found")
    return "found"


@function_tool
def threaded(query: str) -> str:
    """Look up, in a thread."""
    with mlflow.start_span("outer") as span:
        span.set_inputs({"query": query})
        look_up(query)
        asyncio.run(ponder(query))
        span.set_outputs("found")
    return "found"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("tool", [awaited, threaded], ids=["async", "sync"])
async def test_mlflow_and_opentelemetry(run, tool, streamed):
    """Decorated functions, spans of MLflow and spans of OpenTelemetry nest below the tool they were made in."""
    got = await run(tool, '{"query": "x"}', streamed=streamed)
    assert below(got, tool.name) == [("CHAIN", "outer")]
    assert below(got, "outer") == [("RETRIEVER", "look_up"), ("CHAIN", "ponder")]
    assert below(got, "ponder") == [("CHAIN", "select")]
    spans = {span.name: span for span in got.trace.spans}
    assert (spans["outer"].inputs, spans["outer"].outputs) == ({"query": "x"}, "found")
    assert spans["look_up"].inputs == {"query": "x"}
    assert spans["look_up"].outputs == [{"page_content": "about x", "metadata": {"doc_uri": "a.md"}, "id": None}]
    assert (spans["ponder"].outputs, spans["select"].attributes) == ("X", {"db.system": "postgres"})
    assert decode(encode(got.trace)) == got.trace


async def test_agent_in_a_span_of_a_tool(run):
    """An agent that a tool runs inside a span of MLflow's lies below it, and what its own tools make below those."""

    @function_tool
    async def ask(query: str) -> str:
        """Ask a second agent."""
        model = ScriptedModel([[asks("awaited", '{"query": "y"}')], [assistant_message("Y")]], emit_traces=True)
        inner = Agent(name="Second", tools=[awaited], model=model)
        with mlflow.start_span("careful"):
            # As in a program of its own: with the SDK's frames around it, and a trace that it names itself.
            with trace("second workflow"):
                result = await Runner.run(inner, "y")
            with tracer.start_as_current_span("after"):
                return str(result.final_output)

    got = await run(ask, '{"query": "y"}')
    assert below(got, "calc") == [("CHAT_MODEL", "scripted"), ("TOOL", "ask"), ("CHAT_MODEL", "scripted")]
    assert below(got, "ask") == [("CHAIN", "careful")]
    assert below(got, "careful") == [("AGENT", "Second"), ("CHAIN", "after")]
    assert [kind for kind, _ in below(got, "Second")] == ["CHAT_MODEL", "TOOL", "CHAT_MODEL"]
    assert below(got, "awaited") == [("CHAIN", "outer")]


async def test_tasks_and_threads_of_a_tool(run):
    """Spans of tasks that a tool spawns, and of threads that it gives its context to, stay below it."""

    @function_tool
    async def spawn() -> str:
        """Do many things at once."""

        async def work(number: int) -> None:
            with mlflow.start_span(f"task {number}"), custom_span(f"step {number}"):
                await asyncio.gather(*(ponder(f"{number}-{each}") for each in range(2)))

        with mlflow.start_span("all") as outer:
            await asyncio.gather(*(work(number) for number in range(3)))
            context = otel_context.get_current()

            def by_context() -> None:
                otel_context.attach(context)
                with tracer.start_as_current_span("given a context"):
                    pass

            def by_parent() -> None:
                mlflow.start_span_no_context("given a parent", parent_span=outer).end()

            for target in (by_context, by_parent):
                thread = threading.Thread(target=target)
                thread.start()
                await asyncio.to_thread(thread.join)
        return "done"

    got = await run(spawn)
    assert below(got, "spawn") == [("CHAIN", "all")]
    tasks = [("CHAIN", f"task {number}") for number in range(3)]
    assert below(got, "all") == [*tasks, ("CHAIN", "given a context"), ("CHAIN", "given a parent")]
    for number in range(3):
        assert below(got, f"task {number}") == [("CHAIN", f"step {number}")]
        assert below(got, f"step {number}") == [("CHAIN", "ponder")] * 2


async def test_update_current_trace(run):
    """What a tool says of the trace is on the trace; what is the gateway's to say is not taken over."""

    @function_tool
    async def label() -> str:
        """Label the trace."""
        mlflow.update_current_trace(
            tags={"shop": "north", "mlflow.traceName": "mine"},
            metadata={"basket": "7", "mlflow.source.git.commit": "abc"},
            client_request_id="req-1",
            session_id="another",
            request_preview="asked",
        )
        with mlflow.start_span("inside"):
            mlflow.update_current_trace(tags={"step": "two"}, response_preview="answered")
        return mlflow.get_active_trace_id()

    got = await run(label)
    trace = got.trace
    assert trace.tags == {"shop": "north", "step": "two"}
    assert trace.metadata == {"basket": "7", "mlflow.source.git.commit": "abc"}
    assert (trace.client_request_id, trace.request_preview, trace.response_preview) == ("req-1", "asked", "answered")
    assert got.of("TOOL")[0].outputs == trace.trace_id
    assert trace.session_id == "s-1"


async def test_current_span_is_the_tools(run):
    """What a tool sets on the current span is on its own span; so a function tool says that it is a retriever."""

    @function_tool
    async def find(query: str) -> str:
        """Find documents."""
        span = mlflow.get_current_active_span()
        span.set_span_type("RETRIEVER")
        span.set_outputs([Document(page_content="a"), Document(page_content="b")])
        span.set_attributes({"index": "main", "api_key": "sk-1"})
        otel.get_current_span().set_attribute("hits", 2)
        return "a, b"

    got = await run(find, '{"query": "x"}')
    (span,) = got.of("RETRIEVER")
    assert (span.name, span.parent_id, span.inputs) == ("find", got.root.span_id, {"query": "x"})
    assert [found["page_content"] for found in span.outputs] == ["a", "b"]
    assert {key: span.attributes[key] for key in ("index", "hits")} == {"index": "main", "hits": 2}
    assert "api_key" not in span.attributes
    assert not got.of("TOOL")


async def test_failing_span(run):
    """A span whose block raised says why; the tool's own span does, too."""

    @function_tool
    async def break_down() -> str:
        """Fail in a span."""
        with mlflow.start_span("fragile"):
            raise LookupError("no row 7")

    got = await run(break_down)
    (fragile,) = [span for span in got.trace.spans if span.name == "fragile"]
    assert fragile.error == SpanError("LookupError", "no row 7")
    assert outcome(got.trace).tool_failed


async def test_span_left_open(run):
    """A span that had not ended with its run is closed then, and says so; later ones belong to no run."""
    late: list[Any] = []

    @function_tool
    async def leave() -> str:
        """Leave a span open, and a task behind."""
        late.append(mlflow.start_span_no_context("open"))
        late.append(otel_context.get_current())
        return "left"

    got = await run(leave)
    (span,) = [span for span in got.trace.spans if span.name == "open"]
    assert (span.end_ns, span.attributes[CUT_OFF], span.error.type) == (got.trace.ended_ns, True, "CANCELLED")
    late[0].end()
    assert not tracer.start_span("late", context=late[1]).is_recording()


async def test_outside_of_runs(run, caplog):
    """Spans of no run go nowhere, and nobody is warned; a tool may change MLflow's settings."""

    @function_tool
    async def tinker() -> str:
        """Point MLflow to a server, as a module would."""
        mlflow.set_tracking_uri("http://127.0.0.1:1")
        mlflow.tracing.enable()
        with mlflow.start_span("still here"):
            return "done"

    with caplog.at_level(logging.WARNING):
        assert not otel.get_tracer("x").start_span("lost").is_recording()
        ponder_result = await ponder("x")
        got = await run(tinker)
        mlflow.flush_trace_async_logging()
    assert (ponder_result, below(got, "tinker")) == ("X", [("CHAIN", "still here")])
    assert [record.message for record in caplog.records] == []


async def test_unsampled_run_keeps_nothing(capture):
    """In a run that is not sampled a tool's spans are not recorded, and its work goes on."""
    seen = []

    @function_tool
    async def work() -> str:
        """Work in a span."""
        with mlflow.start_span("unseen") as span:
            seen.append(span.trace_id)
            return "done"

    got = await record(capture, calculator(work), [[asks("work", "{}")], [assistant_message("done")]], sampled=False)
    assert (seen, len(got.trace.spans)) == ([NO_OP_SPAN_TRACE_ID], 1)


@pytest.mark.parametrize("sampled", [True, False])
async def test_traceparent_is_passed_on(capture, sampled):
    """What a tool calls is told the caller's trace id, and as parent the tool's span if that is recorded."""
    sent: dict[str, str] = {}

    @function_tool
    async def call() -> str:
        """Call another service."""
        propagate.inject(sent)
        return "called"

    got = await record(
        capture,
        calculator(call),
        [[asks("call", "{}")], [assistant_message("done")]],
        traceparent=CALLER,
        tracestate="vendor=1",
        sampled=sampled,
    )
    version, trace_id, span_id, flags = sent["traceparent"].split("-")
    assert (version, trace_id, flags) == ("00", CALLER.split("-")[1], "01" if sampled else "00")
    assert sent["tracestate"] == "vendor=1"
    assert span_id == (got.of("TOOL")[0].span_id if sampled else CALLER.split("-")[2])
    assert (got.trace.traceparent, got.trace.tracestate) == (CALLER, "vendor=1")
    assert got.trace.trace_id != "tr-" + trace_id


async def test_two_runs_of_one_caller(capture):
    """Runs that share the caller's trace id stay apart, MLflow's notes included."""

    @function_tool
    async def label(name: str) -> str:
        """Label the trace."""
        with mlflow.start_span(f"labelling {name}"):
            await barrier.wait()
            mlflow.update_current_trace(tags={"name": name})
            await barrier.wait()
        return name

    barrier = asyncio.Barrier(2)
    runs = [
        record(
            capture,
            calculator(label),
            [[asks("label", json.dumps({"name": name}))], [assistant_message(name)]],
            traceparent=CALLER,
        )
        for name in "ab"
    ]
    for name, got in zip("ab", await asyncio.gather(*runs), strict=True):
        assert is_whole(got)
        assert got.trace.tags == {"name": name}
        assert below(got, "label") == [("CHAIN", f"labelling {name}")]


async def test_nothing_is_kept(run, capture):
    """When a run has ended, neither the capture nor MLflow holds anything of it."""
    await run(awaited, '{"query": "x"}')
    manager = mlflow.tracing.trace_manager.InMemoryTraceManager.get_instance()
    assert (len(manager._traces), manager._otel_id_to_mlflow_trace_id) == (0, {})
    assert (capture._runs, capture._foreign._owners) == ({}, {})


async def test_plain_run(run):
    """A run whose tools make no spans is as it was."""
    got = await run(add, '{"a": 1, "b": 2}')
    assert [(span.kind, span.name) for span in got.trace.spans] == [
        ("AGENT", "calc"),
        ("CHAT_MODEL", "scripted"),
        ("TOOL", "add"),
        ("CHAT_MODEL", "scripted"),
    ]


def test_late_import(tmp_path):
    """The capture does not import MLflow; a tool that does so in its first call finds it set up."""
    script = Path(__file__).parent / "late_import.py"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    ended = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {
        "before": False,
        "spans": ["calc", "scripted", "work", "inside", "scripted"],
        "inside": True,
        "trace_id": True,
        "tags": {"a": "b"},
        "files": [],
    }
    assert "WARNING" not in ended.stderr
