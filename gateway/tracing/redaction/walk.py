"""The way through a value to all texts in it.

A trace repeats itself: each model call carries the history, the tools and the instructions. So a part that was seen in
this trace is not looked at again, nor is one that is remembered to hold nothing, from whatever trace.
"""

from collections.abc import Callable
from typing import Any

import msgspec

from gateway.tracing.redaction.checks import MAX_CARD_DIGITS, is_card_number
from gateway.tracing.redaction.fields import ID, kind_of_field
from gateway.tracing.redaction.plain import plain
from gateway.tracing.spans import Span, SpanError, Trace

_GENERATION_BYTES = 2_000_000
_ITEM_BYTES = 32_000  # a prompt or the definitions of tools; larger ones would push those out
_NAMES = 10_000
_LEAST_CARD = 10**12
_UNKNOWN = object()

EXEMPT: dict[type, frozenset[str]] = {
    Trace: frozenset({
        "trace_id", "agent", "agent_version", "session_id", "user_id", "offline",
        "started_ns", "ended_ns", "client_left", "key_id", "traceparent",
    }),
    Span: frozenset({"span_id", "parent_id", "kind", "start_ns", "end_ns"}),
    SpanError: frozenset(),
}  # fmt: skip
"""Fields of traces that hold no text of people, tools or models. A field that is not listed is redacted."""


class Memory:
    """Texts and parts of traces that are known to hold nothing, and names of fields; bounded, oldest out first.

    Two generations: when the younger one is full, it becomes the older one, and what is asked for moves up.
    """

    def __init__(self) -> None:
        self.young: set[str | bytes] = set()
        self._old: set[str | bytes] = set()
        self._bytes = 0
        self.names: dict[str, str | None] = {}
        """Kinds of fields by those names that hold nothing themselves."""

    @property
    def size_bytes(self) -> int:
        """What the texts and parts take at the most, the memory of names not included."""
        return sum(len(item) + 100 for generation in (self.young, self._old) for item in generation)

    def holds(self, item: str | bytes) -> bool:
        """Whether the item is remembered."""
        if item in self.young:
            return True
        if item not in self._old:
            return False
        self.add(item)
        return True

    def add(self, item: str | bytes) -> None:
        """Remember that there is nothing in it."""
        size = len(item) + 100  # with what Python needs for it
        if size > _ITEM_BYTES:
            return
        if self._bytes + size > _GENERATION_BYTES:
            self._old, self.young, self._bytes = self.young, set(), 0
        self.young.add(item)
        self._bytes += size

    def name(self, name: str, kind: str | None) -> None:
        """Remember what a field's name says."""
        if len(self.names) >= _NAMES:
            self.names.clear()
        self.names[name] = kind


class Walk:
    """One way through one value or trace."""

    def __init__(self, text: Callable[[str, bool], str], hashed: Callable[[str, str], str], memory: Memory):
        """Take what redacts a text (and whether its name says that it is an id), and what replaces one whole."""
        self._redact = text
        self._hashed = hashed
        self._memory = memory
        self._texts: dict[str, str] = {}
        self._parts: dict[bytes, Any] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._changes = 0
        """How often something was not let through as it was: a part during which this stays holds nothing."""

    def struct(self, value: Any) -> None:
        """Redact the struct's fields in place, all but the exempt ones."""
        exempt = EXEMPT.get(type(value), frozenset())
        fields = value.__struct_fields__
        redacted = [(name, self._field(name, getattr(value, name))) for name in fields if name not in exempt]
        for name, item in redacted:
            setattr(value, name, item)

    def _field(self, field: str, value: Any) -> Any:
        """Return a field's value redacted: structs of the trace stay structs."""
        kind = type(value)
        if kind is str:
            return self.text(value)
        if kind is dict:
            # Attributes repeat as a whole (the tools that the model was given), lists of messages item by item.
            redact = self._part if field == "attributes" else self._items
            named = ((*self._name(name), item) for name, item in value.items())
            return {name: redact(item) if says is None else self._named(says, item) for name, says, item in named}
        if isinstance(value, msgspec.Struct):
            self.struct(value)
            return value
        if kind is list and value and isinstance(value[0], msgspec.Struct):
            return [self._field(field, each) for each in value]
        return self.value(value)

    def _items(self, value: Any) -> Any:
        """Return a value redacted whose items may be those of other spans and traces, as messages are."""
        if type(value) is list:
            return [self._part(each) for each in value]
        return self.value(value)

    def _part(self, value: Any) -> Any:
        if type(value) is not dict and type(value) is not list:
            return self.value(value)
        try:
            encoded = self._encode(value)
        except (TypeError, ValueError, OverflowError):  # objects, half surrogate pairs, or wide numbers
            return self.value(value)
        if self._memory.holds(encoded):
            return value
        if encoded not in self._parts:
            before = self._changes
            redacted = self.value(value)
            if self._changes == before:
                self._memory.add(encoded)
                return value
            self._parts[encoded] = redacted
        self._changes += 1
        return self._parts[encoded]

    def value(self, value: Any) -> Any:
        """Return a copy of a JSON-like value with every string in it redacted."""
        kind = type(value)
        if kind is str:
            return self.text(value)
        if value is None or kind is bool:
            return value
        if kind is dict:
            return self._dict(value)
        if kind is list:
            return [self.value(each) for each in value]
        if kind is int or kind is float:
            return self._number(value) if value >= _LEAST_CARD else value
        return self._other(value)

    def text(self, value: str) -> str:
        """Return a text redacted."""
        if value in self._memory.young:
            return value
        known = self._texts.get(value)
        if known is None:
            known = value
            if not self._memory.holds(value):
                known = self._redact(value, False)
                if known is value:
                    self._memory.add(value)
                else:
                    self._texts[value] = known
        if known is not value:
            self._changes += 1
        return known

    def _dict(self, value: dict[Any, Any]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        names, young = self._memory.names, self._memory.young
        for given, item in value.items():
            kind: Any = names.get(given, _UNKNOWN)
            name = given
            if kind is _UNKNOWN:
                name, kind = self._name(given)
                while name in result:  # two names that became one
                    name += "_"
            if kind is not None:
                result[name] = self._named(kind, item)
            elif type(item) is str and item in young:
                result[name] = item
            else:
                result[name] = self.value(item)
        return result

    def _name(self, name: Any) -> tuple[str, str | None]:
        """Return a field's name redacted, and what it says of what stands under it."""
        if type(name) is not str:
            self._changes += 1
            name = name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name)
        if name in self._memory.names:
            return name, self._memory.names[name]
        redacted, kind = self._redact(name, False), kind_of_field(name)
        if redacted is name:
            self._memory.name(name, kind)
        else:
            self._changes += 1
        return redacted, kind

    def _named(self, kind: str, item: Any) -> Any:
        """Redact a mapping's item whose name says what it is."""
        if isinstance(item, list | tuple | set | frozenset):
            return [self._named(kind, each) for each in item]
        if isinstance(item, bytes | bytearray | memoryview):
            item = plain(item)
        if isinstance(item, bool) or not isinstance(item, str | int | float):
            return self.value(item)
        if kind == ID:
            return self._id(item) if isinstance(item, str) else self.value(item)
        if not item:
            return self.value(item)
        self._changes += 1
        return self._hashed(kind, str(item))

    def _id(self, item: str) -> str:
        redacted = self._redact(item, True)
        if redacted is not item:
            self._changes += 1
        return redacted

    def _number(self, value: float) -> Any:
        """Return a large number, or a placeholder if it is a payment card's."""
        if value >= 10**MAX_CARD_DIGITS or (isinstance(value, float) and not value.is_integer()):
            return value
        digits = str(int(value))
        if not is_card_number(digits):
            return value
        self._changes += 1
        return self._hashed("CARD", digits)

    def _other(self, value: Any) -> Any:
        """Return an object, or a subclass of JSON's types, as JSON."""
        self._changes += 1
        if isinstance(value, str):
            return self.text(str.__str__(value))
        if isinstance(value, bool | int | float):
            return self.value(float(value) if isinstance(value, float) else int(value))
        return self.value(plain(value))
