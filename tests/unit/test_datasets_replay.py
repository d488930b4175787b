"""How a row can be replayed: whether redaction took what a tool needs."""

import pytest

from gateway.evaluation.datasets.conversion import conversation_so_far
from gateway.evaluation.datasets.replay import Replay, replay_of

from .traces import Call, trace

EMAIL = "<EMAIL:k3f7>"
FOUND = {"orders": [{"order_id": "A-1009", "email": EMAIL}]}


def replay(*arguments: object, **fields: object) -> Replay:
    """Return how a row of a trace can be replayed."""
    made = trace(*arguments, **fields)
    return replay_of(made, {"messages": conversation_so_far(made)})


def test_what_holds_nothing_personal_is_asked_again() -> None:
    """A row without placeholders is live."""
    assert replay("Where is A-1001?", "Here.", Call("get_order", {"id": "A-1001"}, {"id": "A-1001"})) == Replay("live")


def test_a_placeholder_that_no_tool_needs_does_no_harm() -> None:
    """An address that the user only mentioned, and one that a tool gave, leave a row live."""
    assert replay(f"Gift wrapping? Write to {EMAIL}.", "Yes!", Call("search", {"q": "gift"}, [])).mode == "live"
    given = replay("Who ordered A-1009?", "Somebody.", Call("get_order", {"id": "A-1009"}, FOUND),
                   Call("send_mail", {"to": EMAIL}, "sent"))  # fmt: skip
    assert given.mode == "live"


def test_a_placeholder_that_a_tool_must_look_up_wants_the_recorded_results() -> None:
    """An address that went into a tool's arguments cannot be looked up again; the row says which."""
    found = replay(f"List my orders, I am {EMAIL}", "A-1009", Call("list_orders", {"email": EMAIL}, FOUND))
    assert found == Replay("recorded_tools", f"list_orders was called with {EMAIL}")
    assert found.tags() == {
        "gateway.replay": "recorded_tools",
        "gateway.replay_because": f"list_orders was called with {EMAIL}",
    }


def test_a_failed_call_is_a_recorded_result() -> None:
    """That a tool failed can be played again like any result."""
    call = Call("list_orders", {"email": EMAIL}, None, error="no such customer")
    assert replay(f"I am {EMAIL}", "Sorry.", call).mode == "recorded_tools"


@pytest.mark.parametrize(
    ("asked", "call"),
    [
        (f"I am {EMAIL}", Call("list_orders", {"email": EMAIL}, None)),
        ("[input_image]\nWhat is this?", Call("search", {"q": "cup"}, [])),
    ],
)
def test_what_is_not_in_the_trace_leaves_the_recorded_answer(asked: str, call: Call) -> None:
    """Where a needed result, or an image of the input, was not kept, only the answer of then can be scored."""
    assert replay(asked, "A cup.", call).mode == "recorded_answer"
