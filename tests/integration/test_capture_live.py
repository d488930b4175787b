"""Capture in the web process: an agent that knows nothing of the gateway, and uses MLflow as its author is used to."""

import sys
from textwrap import dedent

import mlflow
import pytest

from .runs import kinds, say, text, traces

AGENT = """
    import mlflow
    from agents import Agent, function_tool
    from opentelemetry import trace

    mlflow.set_tracking_uri("http://127.0.0.1:1")
    mlflow.openai.autolog()
    tracer = trace.get_tracer(__name__)


    @mlflow.trace(span_type="RETRIEVER")
    def look_up(what: str) -> list[str]:
        mlflow.update_current_trace(tags={"what": what})
        return [f"about {what}"]


    @function_tool
    def find(what: str) -> str:
        '''Find something.'''
        with tracer.start_as_current_span("connect"):
            return look_up(what)[0]


    agent = Agent(name="scribe", tools=[find])
"""
OFFLINE = """
    from gateway.runs.offline import Call, OfflineModel

    def decide(view):
        results = view.tool_results_this_turn
        return results[0].output if results else [Call("find", what=view.last_user)]

    model = OfflineModel(decide)
"""


@pytest.fixture
def settings(make_settings, tmp_path):
    """Settings that serve such an agent alone."""
    folder = tmp_path / "agents" / "scribe"
    folder.mkdir(parents=True)
    (folder / "agent.py").write_text(dedent(AGENT))
    (folder / "offline.py").write_text(dedent(OFFLINE))
    for name in [name for name in sys.modules if name.startswith("agent_plugins.")]:
        del sys.modules[name]
    yield make_settings(agents_dir=folder.parent, default_agent="scribe")
    mlflow.openai.autolog(disable=True)


@pytest.mark.parametrize("stream", [False, True])
async def test_author_who_uses_mlflow(settings, serve, stream):
    """Served, streamed or not, the agent's own spans are in the one tree of its run, and its tags on the trace."""
    async with serve(settings) as client:
        answer = await say(client, "ships", stream=stream)
        assert "about ships" in (answer.text if stream else text(answer))
    (trace,) = traces(settings).values()
    names = {span.span_id: span.name for span in trace.spans}
    assert kinds(trace) == ["scribe", "offline", "find", "connect", "look_up", "offline"]
    assert [names.get(span.parent_id or "") for span in trace.spans] == [
        None,
        "scribe",
        "scribe",
        "find",
        "connect",
        "scribe",
    ]
    assert trace.spans[4].outputs == [{"page_content": "about ships", "metadata": {}}]
    assert trace.tags == {"what": "ships"}
    assert trace.spans[2].attributes["gateway.arguments_valid"] is True
