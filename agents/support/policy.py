"""The shop's return policy, in short documents, and a keyword search over them."""

import re
from typing import Any, NamedTuple

REFUND_WINDOW_DAYS = 30
"""As the policy promises it; the refund rules read the same number."""


class Document(NamedTuple):
    """One section of the policy."""

    source: str
    title: str
    text: str


DOCUMENTS = (
    Document(
        "policy/return-window.md",
        "Return window",
        f"You can return an item within {REFUND_WINDOW_DAYS} days of delivery. It must be unused and in its box.",
    ),
    Document(
        "policy/final-sale.md",
        "Final sale",
        "Items marked final sale, such as samples and clearance pieces, cannot be returned or refunded.",
    ),
    Document(
        "policy/refund-time.md",
        "Refund time",
        "A refund reaches the original payment method within 5 business days after it is approved.",
    ),
    Document(
        "policy/return-shipping.md",
        "Return shipping cost",
        "A return label costs 4.95 USD, taken off the refund. Faulty items are sent back free of charge.",
    ),
    Document(
        "policy/exchanges.md",
        "Exchanges",
        "An item can be exchanged for another size or colour once; the price difference is charged or paid back.",
    ),
    Document(
        "policy/damaged-items.md",
        "Damaged items",
        "Report damage within 7 days of delivery with a photo, and we replace the item or pay it back in full.",
    ),
    Document(
        "policy/gift-receipts.md",
        "Gift receipts",
        "Whoever received a gift can send it back with the gift receipt and gets store credit for its price.",
    ),
    Document(
        "policy/late-returns.md",
        "Late returns",
        "Returns that reach us up to 15 days late are paid in store credit; after that they go back to you.",
    ),
    Document(
        "policy/international.md",
        "International returns",
        "Returns from abroad need a customs form marked returned goods; duties are not paid back.",
    ),
)

_IGNORED = frozenset(
    {"a", "an", "and", "are", "at", "be", "can", "do", "does", "for", "from", "have", "how", "i", "if", "in", "is"}
    | {"it", "my", "of", "offer", "on", "or", "the", "to", "what", "with", "you", "your"}
)


def search(query: str, limit: int = 3) -> list[dict[str, Any]]:
    """The `limit` documents that share most words with the query, best first; empty when none shares any.

    A word in the title counts twice: the title says what a document is about, its text mentions much in passing.
    """
    wanted = _words(query)

    def score(document: Document) -> int:
        return 2 * len(wanted & _words(document.title)) + len(wanted & _words(document.text))

    ranked = sorted(DOCUMENTS, key=score, reverse=True)
    return [
        {"page_content": document.text, "metadata": {"source": document.source, "title": document.title}}
        for document in ranked[:limit]
        if score(document) > 0
    ]


def _words(text: str) -> set[str]:
    """The words that carry meaning, with a plural's "s" cut off so that "refunds" finds "refund"."""
    return {word.removesuffix("s") for word in re.findall(r"[a-z]+", text.lower())} - _IGNORED
