"""Runs of the real runner on a script, captured as in the web process."""

import asyncio
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agents import Agent, Model, RunConfig, Runner, Usage, function_tool
from agents.testing import ScriptedModel, function_call

from gateway.runs.models import TracedModel
from gateway.tracing.capture import RunCapture, SpanCapture, assemble
from gateway.tracing.spans import Span, SpanError, Trace


@function_tool
async def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@dataclass
class Captured:
    """A run's trace, and how it ended."""

    trace: Trace
    error: BaseException | None

    @property
    def root(self) -> Span:
        return self.trace.spans[0]

    def of(self, kind: str) -> list[Span]:
        return [span for span in self.trace.spans if span.kind == kind]

    def shape(self) -> list[tuple[str, str, str | None]]:
        """(kind, name, parent's name) of each span, in order."""
        names = {span.span_id: span.name for span in self.trace.spans}
        return [(s.kind, s.name, names[s.parent_id] if s.parent_id else None) for s in self.trace.spans]


def scripted(*steps: Any) -> ScriptedModel:
    """Return a model that answers with these steps, one a call."""
    return ScriptedModel(steps, default_usage=Usage(input_tokens=7, output_tokens=3, total_tokens=10))


def begun(question: str = "go", **options: Any) -> RunCapture:
    """Return a run that begins now."""
    trace = Trace(
        trace_id=f"tr-{uuid.uuid4().hex}", agent="calc", agent_version="v1", session_id="s-1", user_id=None,
        offline=False, started_ns=time.time_ns(), ended_ns=0, spans=[],
    )  # fmt: skip
    return RunCapture(trace, [{"role": "user", "content": question}], **{"sampled": True} | options)


async def record(
    capture: SpanCapture,
    agent: Agent[Any],
    steps: Sequence[Any] | Model,
    question: str = "go",
    streamed: bool = False,
    **options: Any,
) -> Captured:
    """Run an agent on a script as the gateway does, and return its trace."""
    model = TracedModel(steps if isinstance(steps, Model) else scripted(*steps), "scripted", "lab")
    run = begun(question, **options)

    def note(failure: Any) -> None:
        capture.note_tool_error(failure.error)

    config = RunConfig(
        model=model,
        trace_id=run.sdk_trace_id,
        tracing_disabled=not run.sampled,
        tracing={"include_task_and_turn_spans": False},
        tool_error_formatter=note,
    )
    capture.begin(run)
    error: BaseException | None = None
    try:
        with capture.inside(run):
            if streamed:
                result: Any = Runner.run_streamed(agent.clone(), run.turn_input, run_config=config)
                async for _ in result.stream_events():
                    pass
            else:
                result = await Runner.run(agent.clone(), run.turn_input, run_config=config)
        run.answer = str(result.final_output)
    except (Exception, asyncio.CancelledError) as raised:
        error = raised
        cancelled = isinstance(raised, asyncio.CancelledError)
        run.trace.error = SpanError("CANCELLED" if cancelled else type(raised).__name__, str(raised))
    capture.end(run)
    run.trace.ended_ns = time.time_ns()
    return Captured(assemble(run), error)


def calculator(*tools: Any, **options: Any) -> Agent[Any]:
    return Agent(name="Calculator", instructions="Add.", tools=list(tools or (add,)), **options)


def asks(name: str, arguments: str = '{"a": 1, "b": 2}', call_id: str = "c1") -> Any:
    return function_call(name, arguments, call_id=call_id)


def is_whole(captured: Captured) -> bool:
    """Whether the spans make one tree below one root, each within the run's time."""
    spans = captured.trace.spans
    ids = {span.span_id for span in spans}
    return (
        len(ids) == len(spans)
        and [span.parent_id for span in spans].count(None) == 1
        and spans[0].parent_id is None
        and all(span.parent_id in ids for span in spans[1:])
        and all(captured.trace.started_ns <= s.start_ns <= s.end_ns <= captured.trace.ended_ns for s in spans)
        and all(len(span.span_id) == 16 for span in spans)
    )
