"""The support desk of a small kitchenware shop: orders, refunds, cancellations, tracking and the return policy."""

from datetime import date, timedelta
from typing import Any

from agents import Agent, RunContextWrapper, custom_span, function_tool

from .data import ORDERS, TODAY, UNREACHABLE_CARRIER, Order
from .policy import REFUND_WINDOW_DAYS, search

INSTRUCTIONS = """\
You are the support desk of a kitchenware shop. You help with orders, refunds, parcels and the return policy.
- Take every fact from a tool: status, amounts and dates from the order tools, rules from search_return_policy.
- Order numbers look like A-1001. Ask for the number, or for the e-mail address, only when the customer gave neither.
- refund_order decides by the shop's rules; report its decision and its reason, never promise more.
- cancel_order waits for the approval of a colleague: call it without asking the customer again. When it was not
  approved, say that the order stays as it is.
- When a tool fails, say so plainly and say what the customer can do.
- Answer in one or two friendly sentences.
"""


class UnknownOrder(LookupError):
    """No order has this number."""

    def __init__(self, order_id: str) -> None:
        super().__init__(f"there is no order {order_id}; order numbers look like A-1001")


class CarrierUnavailable(ConnectionError):
    """The carrier's tracking service does not answer."""

    def __init__(self, carrier: str) -> None:
        super().__init__(f"the tracking service of {carrier} does not answer")


def explain_failure(_context: RunContextWrapper[Any], error: Exception) -> str:
    """Tell the model what went wrong; the SDK's own message would hide the reason from it."""
    return f"Error: {error}"


def _find(order_id: str) -> Order:
    try:
        return ORDERS[order_id.upper()]
    except KeyError:
        raise UnknownOrder(order_id) from None


def refund_decision(order: Order, today: date) -> tuple[bool, str]:
    """Whether the order may be refunded on that day, and why."""
    if order.refunded:
        return False, "it was already refunded"
    if order.delivered is None:
        return False, f"it has not been delivered, its status is {order.status}"
    if order.final_sale:
        return False, "it was a final sale"
    if today - order.delivered > timedelta(days=REFUND_WINDOW_DAYS):
        return False, f"it was delivered on {order.delivered}, more than {REFUND_WINDOW_DAYS} days ago"
    return True, f"it was delivered on {order.delivered}, within {REFUND_WINDOW_DAYS} days"


def cancel_decision(order: Order) -> tuple[bool, str]:
    """Whether the order may be cancelled, and why."""
    if order.status == "processing":
        return True, "it has not been shipped yet"
    return False, f"it is already {order.status}"


# The tools are coroutines because the SDK runs plain functions in a small thread pool, which costs more than the work.
@function_tool(failure_error_function=explain_failure)
async def lookup_order(order_id: str) -> dict[str, Any]:
    """Look up one order: customer, item, amount, status, dates and carrier.

    Args:
        order_id: The order number, such as A-1001.
    """
    return _find(order_id).summary()


@function_tool(failure_error_function=explain_failure)
async def list_orders(email: str) -> list[dict[str, Any]]:
    """List the orders of the customer with this e-mail address; empty when there are none.

    Args:
        email: The address the customer ordered with.
    """
    orders = [order for order in ORDERS.values() if order.customer.email == email.lower()]
    return [
        {"order_id": order.order_id, "item": order.item, "amount": order.amount, "status": order.status}
        for order in orders
    ]


@function_tool(failure_error_function=explain_failure)
async def refund_order(order_id: str, reason: str) -> dict[str, Any]:
    """Decide on a refund by the shop's rules. Payments are made from the decision, later and elsewhere.

    Args:
        order_id: The order number, such as A-1001.
        reason: Why the customer wants the money back, in a few words.
    """
    order = _find(order_id)
    approved, because = refund_decision(order, TODAY)
    return {
        "order_id": order.order_id,
        "decision": "approved" if approved else "refused",
        "because": because,
        "amount": order.amount if approved else 0.0,
        "currency": "USD",
        "customer_reason": reason,
    }


@function_tool(failure_error_function=explain_failure, needs_approval=True)
async def cancel_order(order_id: str) -> dict[str, Any]:
    """Cancel an order, unless it is shipped already. The order is changed from the decision, later and elsewhere.

    Args:
        order_id: The order number, such as A-1001.
    """
    order = _find(order_id)
    approved, because = cancel_decision(order)
    return {"order_id": order.order_id, "decision": "cancelled" if approved else "refused", "because": because}


@function_tool(failure_error_function=explain_failure)
async def track_shipment(order_id: str) -> dict[str, Any]:
    """Ask the carrier where the parcel of an order is.

    Args:
        order_id: The order number, such as A-1001.
    """
    order = _find(order_id)
    if order.carrier == UNREACHABLE_CARRIER:
        raise CarrierUnavailable(order.carrier)
    place = {"delivered": "handed over to the customer", "shipped": "at the regional depot"}
    return {
        "order_id": order.order_id,
        "carrier": order.carrier,
        "status": order.status,
        "place": place.get(order.status, "not handed to the carrier"),
        "delivered": order.delivered.isoformat() if order.delivered else None,
    }


@function_tool(failure_error_function=explain_failure)
async def search_return_policy(query: str) -> list[dict[str, Any]]:
    """Search the shop's return policy; gives up to three documents, best first.

    Args:
        query: What the customer wants to know, in their words.
    """
    data: dict[str, Any] = {"span_type": "RETRIEVER", "inputs": {"query": query}}
    # A span of its own, because retrieval scorers look for RETRIEVER spans and a tool call is a TOOL span.
    with custom_span(name="return_policy_search", data=data) as span:
        documents = search(query)
        span.span_data.data["outputs"] = documents
    return documents


agent = Agent(
    name="support",
    instructions=INSTRUCTIONS,
    tools=[lookup_order, list_orders, refund_order, cancel_order, track_shipment, search_return_policy],
)
