"""The shop's customers and orders: made up, fixed, and seen from a fixed day, so that answers never change."""

from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

TODAY = date(2026, 3, 16)
"""The day the shop lives in. A moving one would make a refund that is allowed today refused next month."""

UNREACHABLE_CARRIER = "Kestrel Freight"
"""The carrier whose tracking service never answers."""


@dataclass(frozen=True)
class Customer:
    """Someone who bought something."""

    name: str
    email: str
    phone: str


@dataclass(frozen=True)
class Order:
    """One order; `delivered` is None until the parcel has arrived."""

    order_id: str
    customer: Customer
    item: str
    amount: float
    status: str
    ordered: date
    delivered: date | None
    carrier: str
    final_sale: bool = False
    refunded: bool = False

    def summary(self) -> dict[str, Any]:
        """The order as plain JSON values, dates as YYYY-MM-DD."""
        fields = asdict(self) | {"ordered": self.ordered.isoformat()}
        return fields | {"currency": "USD", "delivered": self.delivered.isoformat() if self.delivered else None}


_MIRA = Customer("Mira Holloway", "mira.holloway@example.com", "+1-202-555-0101")
_TOMAS = Customer("Tomas Brandvold", "tomas.brandvold@example.com", "+1-202-555-0117")
_ANJALI = Customer("Anjali Redfern", "anjali.redfern@example.com", "+1-202-555-0123")
_OSKAR = Customer("Oskar Linde", "oskar.linde@example.com", "+1-202-555-0138")
_LEILA = Customer("Leila Marchetti", "leila.marchetti@example.com", "+1-202-555-0142")
_DESMOND = Customer("Desmond Achterberg", "desmond.achterberg@example.com", "+1-202-555-0156")

CUSTOMERS = (_MIRA, _TOMAS, _ANJALI, _OSKAR, _LEILA, _DESMOND)

_SWIFT = "Swift Parcel"
_HARBOUR = "Harbour Post"

# Between them the orders meet every refund rule and both kinds of carrier.
_ORDERS = (
    Order("A-1001", _MIRA, "copper kettle", 49.9, "delivered", date(2026, 2, 26), date(2026, 3, 2), _SWIFT),
    Order("A-1002", _MIRA, "linen apron", 24.5, "shipped", date(2026, 3, 12), None, _SWIFT),
    Order("A-1003", _TOMAS, "espresso grinder", 139.0, "delivered", date(2026, 2, 19), date(2026, 2, 24), _HARBOUR),
    Order("A-1004", _TOMAS, "cast iron pan", 64.0, "shipped", date(2026, 3, 9), None, UNREACHABLE_CARRIER),
    Order("A-1005", _ANJALI, "walnut board", 38.75, "delivered", date(2026, 1, 8), date(2026, 1, 14), _SWIFT),
    Order("A-1006", _ANJALI, "sample teapot", 19.0, "delivered", date(2026, 3, 1), date(2026, 3, 5), _HARBOUR, True),
    Order("A-1007", _OSKAR, "stoneware bowls", 57.2, "processing", date(2026, 3, 15), None, _HARBOUR),
    Order(
        "A-1008", _OSKAR, "bread knife", 33.0, "delivered", date(2026, 2, 20), date(2026, 2, 25), _SWIFT, refunded=True
    ),
    Order("A-1009", _LEILA, "glass carafe", 28.4, "shipped", date(2026, 3, 11), None, _HARBOUR),
    Order("A-1010", _LEILA, "pasta roller", 74.9, "delivered", date(2026, 3, 3), date(2026, 3, 9), UNREACHABLE_CARRIER),
    Order("A-1011", _DESMOND, "spice rack", 45.6, "cancelled", date(2026, 3, 4), None, _SWIFT),
)

ORDERS = {order.order_id: order for order in _ORDERS}
