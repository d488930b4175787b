"""What the tests of scorers share: turns of a real agent, and a judge that reads what it is asked.

A turn is a run of the SDK's runner on a scripted model, captured and exported as in the live path. The judge is played
by a scripted server: it takes the prompt apart, refuses one that does not hold this very turn's texts or that holds
another's, and says "no" where it reads `MARK` in the part that it is to judge. So a judge that is shown the wrong text,
or none, gives the wrong verdict or none at all.
"""

import json
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agents import Agent, RunConfig, Runner, Usage, custom_span, function_tool
from agents.testing import ScriptedModel, assistant_message, function_call
from mlflow.entities import AssessmentSource, Expectation
from mlflow.entities import Trace as MlflowTrace
from mlflow.genai.scorers.base import Scorer

from gateway.evaluation.export import to_mlflow
from gateway.evaluation.scoring import LiveScorer
from gateway.rules import ScorerRule
from gateway.runs.models import TracedModel
from gateway.testing import Answer, HttpError
from gateway.tracing.capture import RunCapture, SpanCapture, assemble
from gateway.tracing.spans import Trace

MARK = "GRUMBLE"
"""What a judge of these tests fails."""


def rules(query: str) -> list[str]:
    """Return the texts that the policy has on something."""
    return [f"Rule one on {query}.", f"Rule two on {query}."]


@function_tool
async def lookup_order(order_id: str, reason: str | None = None) -> str:
    """Look an order up.

    Args:
        order_id: Number of the order.
        reason: Why it is looked up.
    """
    return f"order {order_id} is at depot D-{order_id}"


@function_tool
async def search_policy(query: str) -> list[dict[str, Any]]:
    """Search the policy."""
    found = rules(query.removesuffix(f" {MARK}"))
    found[1] += f" {MARK}" if MARK in query else ""
    documents = [{"page_content": text, "metadata": {"doc_uri": f"policy/{place}"}} for place, text in enumerate(found)]
    with custom_span("index", {"span_type": "RETRIEVER", "inputs": {"query": query}, "outputs": documents}):
        return documents


@dataclass(frozen=True)
class Turn:
    """One answered turn about an order of its own."""

    order: str
    entity: MlflowTrace
    question: str
    answer: str

    @property
    def documents(self) -> list[str]:
        """What the policy search found, without the mark."""
        return rules(self.order)


async def turn(
    capture: SpanCapture, bad: bool = False, tools: bool = True, session: str = "s-1", fails: bool = False
) -> Turn:
    """Run the agent once about an order of its own; where ``bad``, everything it does and says bears the mark."""
    order = uuid.uuid4().hex[:8]
    mark = f" {MARK}" if bad else ""
    question, answer = f"Where is order {order}?", f"Order {order} is at D-{order}.{mark}"
    calls = [
        function_call("lookup_order", json.dumps({"order_id": order, "reason": f"asked{mark}"}), call_id="c1"),
        function_call("search_policy", json.dumps({"query": f"{order}{mark}"}), call_id="c2"),
    ]
    steps: list[Any] = [
        *([calls] if tools else []),
        RuntimeError("overloaded") if fails else [assistant_message(answer)],
    ]
    usage = Usage(input_tokens=7, output_tokens=3, total_tokens=10)
    run = RunCapture(
        Trace(
            trace_id=f"tr-{uuid.uuid4().hex}", agent="clerk", agent_version="v1", session_id=session, user_id=None,
            offline=False, started_ns=time.time_ns(), ended_ns=0, spans=[],
        ),
        [{"role": "user", "content": question}],
        sampled=True,
    )  # fmt: skip
    clerk = Agent(name="clerk", instructions="Help.", tools=[lookup_order, search_policy])
    config = RunConfig(
        model=TracedModel(ScriptedModel(steps, default_usage=usage), "scripted", "lab"),
        trace_id=run.sdk_trace_id,
        tracing={"include_task_and_turn_spans": False},
    )
    capture.begin(run)
    try:
        with capture.inside(run):
            result = await Runner.run(clerk, run.turn_input, run_config=config)
        run.answer = str(result.final_output)
    except RuntimeError:
        answer = ""
    capture.end(run)
    run.trace.ended_ns = time.time_ns()
    return Turn(order, to_mlflow(assemble(run), "1", {}), question, answer)


async def conversation(capture: SpanCapture, turns: int, bad: Sequence[int] = (), tools: bool = True) -> list[Turn]:
    """Return a conversation, of which the turns at the places ``bad`` bear the mark."""
    session = f"s-{uuid.uuid4().hex}"
    said = [await turn(capture, bad=place in bad, tools=tools, session=session) for place in range(turns)]
    for place, each in enumerate(said):  # two in a millisecond have no order
        each.entity.info.request_time += place
    return said


def expect(entity: MlflowTrace, source: str = "HUMAN", metadata: dict[str, str] | None = None, **named: Any) -> None:
    """State what is expected of a trace."""
    origin = AssessmentSource(source_type=source, source_id="somebody")
    entity.info.assessments += [
        Expectation(name=name, value=value, source=origin, metadata=metadata) for name, value in named.items()
    ]


def live(scorer: Scorer, version: str = "v1", **rule: Any) -> LiveScorer:
    """Make a scorer live."""
    return LiveScorer(scorer, version, ScorerRule(**rule))


class Asked:
    """One request to the judge, taken apart."""

    def __init__(self, body: dict[str, Any]):
        self.body = body
        self.messages: list[dict[str, Any]] = body["messages"]
        self.text = "\n".join(str(message.get("content") or "") for message in self.messages)

    def part(self, tag: str) -> str:
        """Return what stands between the tags: the last such part, since instructions name tags too."""
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", self.text, re.DOTALL)
        assert found, f"no <{tag}> in {self.text}"
        return str(found[-1])

    def given(self, name: str) -> Any:
        """Return the value that a template's variable was given, which stands in the user's message as JSON."""
        [user] = [str(message["content"]) for message in self.messages if message["role"] == "user"]
        begin = re.search(rf"^{name}: ", user, re.MULTILINE)
        assert begin, f"no {name} in {user}"
        return json.JSONDecoder().raw_decode(user[begin.end() :])[0]

    def said(self, role: str) -> list[str]:
        """Return what one side said in the conversation that is judged."""
        return [message["content"] for message in self.given("conversation") if message["role"] == role]


def verdict(value: Any, rationale: str = "as read") -> str:
    """Return a judge's answer."""
    return json.dumps({"result": value, "rationale": rationale})


def yes_or_no(text: str) -> str:
    """Return the verdict on a text."""
    return verdict("no" if MARK in text else "yes", rationale=text)


@dataclass
class Reader:
    """The judge's script: refuses a prompt with wrong texts in it, and leaves the verdict to ``judges``."""

    judges: Callable[[Asked], Answer]
    holds: Sequence[str] = ()
    """What each prompt has to hold."""
    lacks: Sequence[str] = ()
    """What none may hold."""
    asked: list[Asked] = field(default_factory=list)

    def __call__(self, body: dict[str, Any]) -> Answer | HttpError:
        asked = Asked(body)
        self.asked.append(asked)
        wrong = [f"lacks {text!r}" for text in self.holds if text not in asked.text]
        wrong += [f"holds {text!r}" for text in self.lacks if text in asked.text]
        try:
            return HttpError(400, f"this prompt {wrong}: {asked.text}") if wrong else self.judges(asked)
        except AssertionError as error:
            return HttpError(400, f"not what was to be judged: {error}")
