"""The example agents, run by the SDK's own runner with their offline models."""

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import agents as sdk
import pytest
from agents import Agent, Model, RunConfig, Runner, RunResult, SQLiteSession, ToolCallItem, ToolCallOutputItem
from agents.tracing import Span, Trace, TracingProcessor, get_trace_provider

AGENTS_DIR = Path(__file__).parents[2] / "agents"


@dataclass(frozen=True)
class Plugin:
    """One agent folder, loaded by path."""

    folder: Path
    agent: Agent[Any]
    model: Model

    async def converse(self, *turns: str) -> list[RunResult]:
        """Run the turns one after the other in one session."""
        session = SQLiteSession("test")
        config = RunConfig(model=self.model, tracing_disabled=True)
        return [await Runner.run(self.agent, turn, session=session, run_config=config) for turn in turns]

    async def answers(self, *turns: str) -> list[str]:
        """What the agent said in each turn."""
        return [result.final_output for result in await self.converse(*turns)]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of one of the folder's JSON Lines files."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]


def load(name: str) -> Plugin:
    """Load a folder as package `agent_plugins.<name>`, so that its relative imports work."""
    package = f"agent_plugins.{name}"
    for parent, path in (("agent_plugins", AGENTS_DIR), (package, AGENTS_DIR / name)):
        module = ModuleType(parent)
        module.__path__ = [str(path)]
        sys.modules[parent] = module
    agent, offline = (importlib.import_module(f"{package}.{part}") for part in ("agent", "offline"))
    return Plugin(AGENTS_DIR / name, agent.agent, offline.model)


@pytest.fixture(scope="module")
def plugins() -> Iterator[dict[str, Plugin]]:
    """Both example agents, by name."""
    before = set(sys.modules)
    yield {name: load(name) for name in ("math", "support")}
    for name in set(sys.modules) - before:
        if name.startswith("agent_plugins"):
            del sys.modules[name]


@pytest.fixture
def math(plugins: dict[str, Plugin]) -> Plugin:
    """The calculator."""
    return plugins["math"]


@pytest.fixture
def support(plugins: dict[str, Plugin]) -> Plugin:
    """The support desk."""
    return plugins["support"]


def calls(result: RunResult) -> list[tuple[str, dict[str, Any]]]:
    """The tool calls of a run, in order."""
    raw: list[Any] = [item.raw_item for item in result.new_items if isinstance(item, ToolCallItem)]
    return [(call.name, json.loads(call.arguments)) for call in raw]


def outputs(result: RunResult) -> list[Any]:
    """What the tools of a run returned, in order."""
    return [item.output for item in result.new_items if isinstance(item, ToolCallOutputItem)]


def test_folder_does_not_shadow_the_sdk() -> None:
    """Neither `agents/` nor a folder in it is a package, so `agents` stays the SDK's."""
    assert not list(AGENTS_DIR.rglob("__init__.py"))
    assert AGENTS_DIR not in Path(sdk.__file__).parents


def test_golden_rows(math: Plugin) -> None:
    """The golden set is big enough to gate a release."""
    assert len(math.rows("golden.jsonl")) >= 12


async def test_golden_answers(math: Plugin) -> None:
    """The offline math agent gives exactly the expected answer to every golden question."""
    config = RunConfig(model=math.model, tracing_disabled=True)
    rows = math.rows("golden.jsonl")

    results = [await Runner.run(math.agent, row["inputs"]["messages"], run_config=config) for row in rows]

    assert [result.final_output for result in results] == [row["expectations"]["expected_response"] for row in rows]
    assert all(calls(result) for result in results)


async def test_second_call_uses_the_first_result(math: Plugin) -> None:
    """A question in two steps calls the second tool with what the first one returned."""
    (result,) = await math.converse("I bought 2 shares at $100 each. It's now worth $150. How much profit?")

    assert calls(result) == [("subtract", {"a": 150, "b": 100}), ("multiply", {"a": 50, "b": 2})]
    assert result.final_output == "100"


async def test_streamed_answer(math: Plugin) -> None:
    """A streamed run ends with the same answer as a collected one."""
    config = RunConfig(model=math.model, tracing_disabled=True)

    result = Runner.run_streamed(math.agent, "What is 15% of 240?", run_config=config)
    kinds = [event.name async for event in result.stream_events() if event.type == "run_item_stream_event"]

    assert result.final_output == "36"
    assert kinds == ["tool_called", "tool_output", "message_output_created"]


async def test_follow_ups_use_the_answer_before(math: Plugin) -> None:
    """A follow-up without a first number goes on from the last answer in the session."""
    turns = [
        "What is 12 + 30?",
        "and times 3?",
        "Add 10 to that.",
        "double that",
        "divide it by 4",
        "what is 50% of that?",
    ]

    assert await math.answers(*turns) == ["42", "126", "136", "272", "68", "34"]


async def test_division_by_zero(math: Plugin) -> None:
    """A tool that fails is owned up to, and the conversation goes on."""
    failed, corrected = await math.converse("What is 10 divided by 0?", "Sorry, I meant 10 divided by 4.")

    assert outputs(failed) == ["Error: cannot divide 10 by zero"]
    assert failed.final_output == "I'm sorry, I can't work that out: cannot divide 10 by zero."
    assert corrected.final_output == "2.5"


@pytest.mark.parametrize(
    "question",
    ["", "Who are you?", "add 3 to that", "2 **** 3", "((((1 + ", "2 ** 9999", "42", "(" * 250 + "1", "1 + " * 9999],
)
async def test_what_is_not_arithmetic(math: Plugin, question: str) -> None:
    """What it cannot parse gets a polite answer that says what it can do, and no tool call."""
    (result,) = await math.converse(question)

    assert "I can add, subtract, multiply, divide and work out percentages" in result.final_output
    assert calls(result) == []


async def test_order_status(support: Plugin) -> None:
    """Several order numbers in one message are looked up at once, and the answer repeats what was found."""
    (result,) = await support.converse("What is the status of A-1001 and a-1007?")

    assert calls(result) == [("lookup_order", {"order_id": "A-1001"}), ("lookup_order", {"order_id": "A-1007"})]
    assert all(word in result.final_output for word in ("A-1001", "delivered", "2026-03-02", "A-1007", "processing"))


async def test_unknown_order(support: Plugin) -> None:
    """An unknown order number is a tool error the answer admits."""
    assert "there is no order A-9999" in (await support.answers("status of A-9999 please"))[0]


async def test_orders_by_email(support: Plugin) -> None:
    """The e-mail address is asked for once, and remembered from then on."""
    asked, listed, again = await support.converse(
        "Can you list my orders?", "It is oskar.linde@example.com", "Show my orders again"
    )

    assert calls(asked) == []
    assert "e-mail" in asked.final_output
    assert calls(listed) == calls(again) == [("list_orders", {"email": "oskar.linde@example.com"})]
    assert "A-1007" in listed.final_output
    assert "A-1008" in listed.final_output


@pytest.mark.parametrize(
    ("order_id", "decision"),
    [
        ("A-1001", "is approved"),
        ("A-1003", "is approved"),
        ("A-1002", "not been delivered"),
        ("A-1005", "more than 30 days ago"),
        ("A-1006", "a final sale"),
        ("A-1008", "already refunded"),
    ],
)
async def test_refund_rules(support: Plugin, order_id: str, decision: str) -> None:
    """Only a delivered, recent order that is neither final sale nor refunded gets its money back, and it says why."""
    (result,) = await support.converse(f"I want a refund for {order_id} because it is too big.")

    assert calls(result) == [("refund_order", {"order_id": order_id, "reason": "it is too big"})]
    assert decision in result.final_output


async def test_refund_changes_nothing(support: Plugin) -> None:
    """A refund is a decision only: asking twice gives the same answer, so runs stay repeatable."""
    first, second = await support.converse("Refund order A-1001", "Refund order A-1001")

    assert outputs(first) == outputs(second)


@pytest.mark.parametrize(
    ("order_id", "because"),
    [
        ("A-1007", "Order A-1007 is cancelled. That was possible because it has not been shipped yet."),
        ("A-1002", "I'm sorry, order A-1002 cannot be cancelled, because it is already shipped."),
        ("A-1011", "I'm sorry, order A-1011 cannot be cancelled, because it is already cancelled."),
        ("A-9999", "I'm sorry, there is no order A-9999; order numbers look like A-1001. Please check the number."),
    ],
)
async def test_cancellation_waits_for_approval(support: Plugin, order_id: str, because: str) -> None:
    """A cancellation stops for an approval; once given, only an order that is not shipped is cancelled."""
    (paused,) = await support.converse(f"Please cancel order {order_id}")
    state = paused.to_state()
    (asked,) = paused.interruptions
    state.approve(asked)

    result = await Runner.run(support.agent, state, run_config=RunConfig(model=support.model, tracing_disabled=True))

    assert calls(paused) == [("cancel_order", {"order_id": order_id})]
    assert (paused.final_output, result.final_output) == (None, because)


@pytest.mark.parametrize("reason", [None, "It is packed already."])
async def test_cancellation_not_approved(support: Plugin, reason: str | None) -> None:
    """Without the approval the order stays as it is, whatever the reason given, and the answer says so."""
    _, paused = await support.converse("Cancel my order", "It is A-1007")
    state = paused.to_state()
    state.reject(paused.interruptions[0], rejection_message=reason)

    result = await Runner.run(support.agent, state, run_config=RunConfig(model=support.model, tracing_disabled=True))

    assert result.final_output == "I'm sorry, the cancellation was not approved. Order A-1007 stays as it is."


async def test_order_number_asked_for_once(support: Plugin) -> None:
    """A request without an order number is taken up again when the number comes."""
    assert calls((await support.converse("I want a refund", "A-1001"))[1])[0][0] == "refund_order"


async def test_tracking(support: Plugin) -> None:
    """Tracking tells the carrier's word for a parcel it can reach."""
    (answer,) = await support.answers("Where is A-1009?")

    assert all(word in answer for word in ("A-1009", "shipped", "Harbour Post", "regional depot"))


async def test_policy_question(support: Plugin) -> None:
    """A policy question is answered with the best document of the search."""
    (result,) = await support.converse("How long do refunds take?")

    assert calls(result) == [("search_return_policy", {"query": "How long do refunds take?"})]
    assert "5 business days" in result.final_output
    assert {"page_content", "metadata"} == set(outputs(result)[0][0])


async def test_flaw_carrier_error_is_never_resolved(support: Plugin) -> None:
    """The unreachable carrier fails each time it is asked, without a retry in between."""
    for result in await support.converse("Where is order A-1004?", "Where is order A-1004?"):
        assert calls(result) == [("track_shipment", {"order_id": "A-1004"})]
        assert outputs(result) == ["Error: the tracking service of Kestrel Freight does not answer"]
        assert "the carrier is unavailable" in result.final_output


async def test_flaw_gift_wrapping_is_searched_twice(support: Plugin) -> None:
    """Gift wrapping is searched twice with equal arguments, and the answer takes nothing from what was found."""
    (result,) = await support.converse("Hello! Do you offer gift wrapping? Write to me@example.com.")

    first, second = calls(result)
    assert first == second == ("search_return_policy", {"query": "Do you offer gift wrapping?"})
    documents = [document for output in outputs(result) for document in output]
    assert documents
    assert not any(document["metadata"]["title"] in result.final_output for document in documents)


async def test_flaw_warranty_asks_twice(support: Plugin) -> None:
    """The order number for a warranty question is asked for again right after it was given."""
    first, second = await support.answers("Is my kettle under warranty?", "The order number is A-1001.")

    assert first == second
    assert "order number" in first


class SpanCollector(TracingProcessor):
    """Keeps what ended, for a look at the spans an agent makes itself."""

    def __init__(self) -> None:
        self.ended: list[Span[Any]] = []

    def on_trace_start(self, trace: Trace) -> None:
        """Ignore it."""

    def on_trace_end(self, trace: Trace) -> None:
        """Ignore it."""

    def on_span_start(self, span: Span[Any]) -> None:
        """Ignore it."""

    def on_span_end(self, span: Span[Any]) -> None:
        """Keep the span."""
        self.ended.append(span)

    def shutdown(self) -> None:
        """Hold nothing to release."""

    def force_flush(self) -> None:
        """Hold nothing back."""


@pytest.fixture
def spans() -> Iterator[list[Span[Any]]]:
    """The spans that ended during the test."""
    collector = SpanCollector()
    # The SDK has one list of processors a process; other tests of the same session must find theirs again.
    before = list(cast("Any", get_trace_provider())._multi_processor._processors)
    sdk.set_trace_processors([collector])
    yield collector.ended
    sdk.set_trace_processors(before)


async def test_policy_search_is_a_retriever_span(support: Plugin, spans: list[Span[Any]]) -> None:
    """The policy search leaves a span below its tool's span with the query and the documents found."""
    await Runner.run(support.agent, "Can I exchange an item?", run_config=RunConfig(model=support.model))

    (tool,) = [span for span in spans if span.span_data.type == "function"]
    (search,) = [span for span in spans if span.span_data.type == "custom"]
    assert search.parent_id == tool.span_id
    assert search.span_data.name == "return_policy_search"
    assert search.span_data.data["span_type"] == "RETRIEVER"
    assert search.span_data.data["inputs"] == {"query": "Can I exchange an item?"}
    assert search.span_data.data["outputs"][0]["metadata"]["title"] == "Exchanges"


async def test_tool_error_keeps_its_reason_in_the_trace(support: Plugin, spans: list[Span[Any]]) -> None:
    """A failed tool's span names the error itself, not the SDK's placeholder for it."""
    await Runner.run(support.agent, "Track A-1010", run_config=RunConfig(model=support.model))

    (tool,) = [span for span in spans if span.span_data.type == "function"]
    assert tool.error is not None
    assert "Kestrel Freight does not answer" in str(tool.error)


@pytest.mark.parametrize("name", ["math", "support"])
async def test_samples(plugins: dict[str, Plugin], name: str) -> None:
    """Every sample conversation runs to its end, and only the flawed ones meet a tool error."""
    for sample in plugins[name].rows("samples.jsonl"):
        results = await plugins[name].converse(*sample["turns"])

        errors = [output for result in results for output in outputs(result) if str(output).startswith("Error")]
        assert all(result.final_output for result in results)
        assert not any("did not understand" in result.final_output for result in results)
        assert bool(errors) == (sample["expect"].get("no_tool_errors") is False), sample["name"]


@pytest.mark.parametrize("name", ["math", "support"])
def test_samples_are_well_formed(plugins: dict[str, Plugin], name: str) -> None:
    """Each sample has a name of its own, at least one turn, and says which scorers must fail."""
    rows = plugins[name].rows("samples.jsonl")

    assert all(row.keys() == {"name", "turns", "expect"} and row["turns"] for row in rows)
    assert len({row["name"] for row in rows}) == len(rows)
