"""A process of its own for `test_late_import`: a tool imports MLflow in its first call, nobody has before."""

import asyncio
import json
import sys
import time
import uuid
from pathlib import Path

from agents import Agent, RunConfig, Runner, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call

from gateway.runs.models import TracedModel
from gateway.tracing.capture import RunCapture, SpanCapture, assemble
from gateway.tracing.spans import Trace


@function_tool
async def work() -> str:
    """Work with MLflow."""
    import mlflow  # noqa: PLC0415 - the point of it

    with mlflow.start_span("inside"):
        mlflow.update_current_trace(tags={"a": "b"})
        return str(mlflow.get_active_trace_id())


async def main() -> None:
    """Run an agent once, and print what was seen."""
    capture = SpanCapture()
    capture.install()
    before = "mlflow" in sys.modules
    trace = Trace(f"tr-{uuid.uuid4().hex}", "calc", "v1", "s", None, False, 1.0, time.time_ns())
    run = RunCapture(trace, [{"role": "user", "content": "go"}], sampled=True)
    model = ScriptedModel([[function_call("work", "{}", call_id="c")], [assistant_message("done")]])
    config = RunConfig(model=TracedModel(model, "scripted", None), trace_id=run.sdk_trace_id)
    capture.begin(run)
    with capture.inside(run):
        await Runner.run(Agent(name="calc", tools=[work]), "go", run_config=config)
    capture.end(run)
    trace.ended_ns = time.time_ns()
    spans = assemble(run).spans
    seen = {
        "before": before,
        "spans": [span.name for span in spans],
        "inside": spans[3].parent_id == spans[2].span_id,
        "trace_id": spans[2].outputs == trace.trace_id,
        "tags": trace.tags,
        "files": [path.name for path in Path.cwd().iterdir()],
    }
    sys.stdout.write(json.dumps(seen))


asyncio.run(main())
