"""Plays the model for the support agent: finds the customer's intent by keyword and answers from the tool results.

Three flaws are built in, so that live scoring has something to find; each is marked "Flaw" where it happens:

- a failed `track_shipment` is reported and never tried another way;
- a question about gift wrapping is searched twice with the same words, and the answer ignores what was found;
- a question about warranty asks for the order number, and once more after the customer gave it.
"""

import re
from typing import Any

from gateway.runs.offline import Call, OfflineModel, ToolResult, View

HELP = "I can help with an order's status, refunds, parcel tracking, a list of your orders and our return policy."
ASK_ORDER = "Which order is it about? Please give me the order number, such as A-1001."
ASK_EMAIL = "Gladly. Which e-mail address did you order with?"
ASK_WARRANTY_ORDER = "I can check the warranty for you. Could you please give me the order number?"
GIFT_WRAPPING = "We love to make every purchase a pleasure! Just let us know whenever there is anything else."

_ORDER_ID = re.compile(r"\bA-\d{4}\b", re.IGNORECASE)
# The counts keep the search linear on long texts without any "@".
_EMAIL = re.compile(r"[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,4}")

# The first match wins, so what is more specific comes first.
_INTENTS = {
    "warranty": r"\bwarrant",
    "gift_wrapping": r"\bgift[- ]?wrap",
    "cancel": r"\bcancel\b",
    "refund": r"\brefund (?:my|the|this|it|for|order|a-)|\b(?:get|want|like|need) (?:a |my |to )?(?:refund|money back)|"
    r"\b(?:return|send back) (?:my |the |this )?(?:order|a-\d)",
    "tracking": r"\btrack|\bwhere\b|\bparcel|\bshipment|\barrive",
    "policy": r"\bpolic|\breturn|\brefund|\bexchange|\bdamage|\bbroken|\bfinal sale|\bgift|\bstore credit",
    "orders": r"\b(?:my|all|list|which|what) orders\b|\bmy purchases\b|\border history\b",
    "status": r"\bstatus\b|\bwhat about\b|\blook up\b|\bcheck\b",
    "thanks": r"\bthank|\bcheers\b|\bgreat\b|\bperfect\b|\bbye\b",
    "greeting": r"\bhello\b|\bhi\b|\bgood (?:morning|afternoon|evening)\b",
}


def decide(view: View) -> str | Call | list[Call]:
    """Call the tools the customer's last message asks for, then answer from their results."""
    intent = _intent(view)
    if view.tool_results_this_turn:
        return _from_results(intent, view.tool_results_this_turn)
    if intent == "warranty":
        # Flaw: also asked when the customer has just given it, see _intent().
        return ASK_WARRANTY_ORDER
    if intent in {"policy", "gift_wrapping"}:
        return Call("search_return_policy", query=_question(view.last_user, intent))
    if intent == "orders":
        email = _last_match(_EMAIL, view.user_texts)
        return Call("list_orders", email=email) if email else ASK_EMAIL
    if intent in {"cancel", "refund", "tracking", "status"}:
        return _order_calls(view, intent)
    return _small_talk(intent)


def _from_results(intent: str | None, results: list[ToolResult]) -> str | Call:
    if intent == "gift_wrapping":
        # Flaw: the same search again, and then an answer that has nothing to do with what it found.
        return Call(results[0].name, **results[0].arguments) if len(results) == 1 else GIFT_WRAPPING
    return " ".join(_answer(result) for result in results)


def _intent(view: View) -> str | None:
    text = view.last_user
    own = _matching_intent(text)
    given = _ORDER_ID.search(text) or _EMAIL.search(text)
    before = _matching_intent(view.user_texts[-2]) if len(view.user_texts) > 1 else None
    if given and before == "warranty" and own in {None, "status"}:
        return "warranty"
    if own == "policy" and _ORDER_ID.search(text):
        return "refund"
    if own:
        return own
    if given and before in {"cancel", "refund", "tracking", "orders"}:
        return before  # the answer to our question back, such as the bare order number
    if given:
        return "status" if _ORDER_ID.search(text) else "orders"
    return None


def _matching_intent(text: str) -> str | None:
    lowered = text.lower()
    return next((intent for intent, pattern in _INTENTS.items() if re.search(pattern, lowered)), None)


def _question(text: str, intent: str) -> str:
    """The sentence that asks; what surrounds it, such as how to reach the customer, would only blur the search."""
    sentences = re.split(r"(?<=[.!?])\s+", text)
    return next((sentence for sentence in sentences if _matching_intent(sentence) == intent), text)


def _last_match(pattern: re.Pattern[str], texts: list[str]) -> str | None:
    """What the customer gave most recently: a bare "refund it" means the order they spoke of before."""
    return next((found[-1] for text in reversed(texts) if (found := pattern.findall(text))), None)


def _order_calls(view: View, intent: str) -> str | list[Call]:
    named = list(dict.fromkeys(_ORDER_ID.findall(view.last_user.upper())))
    latest = _last_match(_ORDER_ID, view.user_texts)
    order_ids = named or ([latest.upper()] if latest else [])
    if not order_ids:
        return ASK_ORDER
    if intent == "refund":
        reason = re.search(r"\b(?:because|since|as it)\b (.+?)(?:[.!?](?:\s|$)|$)", view.last_user, re.IGNORECASE)
        return [
            Call("refund_order", order_id=order_id, reason=reason.group(1) if reason else "no reason given")
            for order_id in order_ids
        ]
    tool = {"cancel": "cancel_order", "tracking": "track_shipment", "status": "lookup_order"}[intent]
    return [Call(tool, order_id=order_id) for order_id in order_ids]


def _answer(result: ToolResult) -> str:
    if result.output.startswith("Error"):
        return _failure(result)
    value = result.value()
    match result.name:
        case "lookup_order":
            return _status(value)
        case "list_orders":
            return _listing(value)
        case "refund_order":
            return _refund(value)
        case "cancel_order":
            return _cancellation(result.arguments["order_id"], value)
        case "track_shipment":
            return f"Order {value['order_id']} is {value['status']}: {value['carrier']} says it is {value['place']}."
        case _:
            return _policy(value)


def _failure(result: ToolResult) -> str:
    problem = result.output.removeprefix("Error: ")
    if result.name == "track_shipment" and "does not answer" in problem:
        # Flaw: lookup_order would still know the order's status, but it gives up here.
        order_id = result.arguments["order_id"]
        return f"I'm sorry, the carrier is unavailable: {problem}. I cannot say where order {order_id} is."
    return f"I'm sorry, {problem}. Please check the number."


def _status(order: dict[str, Any]) -> str:
    delivered = f" It was delivered on {order['delivered']}." if order["delivered"] else ""
    return (
        f"Order {order['order_id']} ({order['item']}, {order['amount']:.2f} {order['currency']}) is {order['status']}. "
        f"It was placed on {order['ordered']} and goes with {order['carrier']}.{delivered}"
    )


def _listing(orders: list[dict[str, Any]]) -> str:
    if not orders:
        return "I found no orders under that e-mail address."
    lines = [f"{order['order_id']} ({order['item']}, {order['amount']:.2f} USD, {order['status']})" for order in orders]
    return f"You have {len(orders)} order(s): {'; '.join(lines)}."


def _refund(decision: dict[str, Any]) -> str:
    order_id, because = decision["order_id"], decision["because"]
    if decision["decision"] == "refused":
        return f"I'm sorry, a refund for order {order_id} is refused, because {because}."
    amount = f"{decision['amount']:.2f} {decision['currency']}"
    return f"Your refund of {amount} for order {order_id} is approved, because {because}."


def _cancellation(order_id: str, decision: Any) -> str:
    if not isinstance(decision, dict):
        # The call was not approved: its output is then a sentence, whichever the one who refused it chose.
        return f"I'm sorry, the cancellation was not approved. Order {order_id} stays as it is."
    if decision["decision"] == "refused":
        return f"I'm sorry, order {order_id} cannot be cancelled, because {decision['because']}."
    return f"Order {order_id} is cancelled. That was possible because {decision['because']}."


def _policy(documents: list[dict[str, Any]]) -> str:
    if not documents:
        return "I'm sorry, our return policy says nothing about that."
    best = documents[0]
    return f"{best['metadata']['title']}: {best['page_content']}"


def _small_talk(intent: str | None) -> str:
    if intent == "thanks":
        return "You're welcome! Have a good day."
    if intent == "greeting":
        return f"Hello! {HELP}"
    return f"I'm sorry, I did not understand that. {HELP}"


model = OfflineModel(decide, name="offline-support")
