"""Redaction of values of all shapes: traces, objects, patterns of the settings, and what cannot be redacted."""

import dataclasses
import json
import math
import re
from collections import deque
from enum import StrEnum
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel

from gateway.errors import ConfigurationError
from gateway.tracing.redaction.redactor import Redactor, Unredactable
from gateway.tracing.redaction.walk import EXEMPT, Memory
from gateway.tracing.spans import Span, SpanError, Trace, decode, encode

EMAIL = "ann@example.com"


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return Redactor(b"k" * 32)


def make_trace(**fields: Any) -> Trace:
    return Trace("tr-1", "support", "v1", "s-1", "u-1", False, 1, 2, **fields)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Ann.Lee@Example.com", "ann.lee%40example.com"),
        ("ann\\u0040example.com", EMAIL),
        ("jos\\u00e9@example.com", "jose\u0301@example.com"),
        ("+49 (0)151 12345678", "0049 151 12345678"),
        ("+1 (202) 555-0173", "202-555-0173"),
        ("DE89 3704 0044 0532 0130 00", "de89370400440532013000"),
        ("2001:db8:0:0::1", "2001:DB8::1"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("219-09-9999", "SSN 219099999"),
        ("4111\u00a01111\u00a01111\u00a01111", '"4111111111111111"'),
        ('{"password": "a\\"b"}', "password: 'a\"b'"),
    ],
)
def test_ways_of_writing_one_value(redactor: Redactor, one: str, other: str) -> None:
    """Two ways of writing one value give one placeholder within a session."""
    placeholder = re.compile(r"<[A-Z]+:[a-z2-7]{4}>")
    (first,), (second,) = (placeholder.findall(redactor.text(text, "s")) for text in (one, other))
    assert first == second


def test_without_a_session_nothing_can_be_linked(redactor: Redactor) -> None:
    """Without a scope two values of a kind read the same, and redacting that again changes nothing."""
    text = redactor.text(f"{EMAIL} bob@example.com password=hunter22")
    assert text == "<EMAIL> <EMAIL> password=<SECRET>"
    assert redactor.text(text) == text
    assert redactor.text(text, "s") == text


def test_a_secret_ends_at_its_own_quote(redactor: Redactor) -> None:
    """Quotes and backslashes within a password do not let its rest through, at any depth of JSON."""
    text = secret = 'p"q\\r, "s'
    text = json.dumps({"password": secret, "to": "Rome"})
    for _ in range(3):
        text = json.dumps({"arguments": text})
        redacted: Any = redactor.text(text, "s")
        while "arguments" in (redacted := json.loads(redacted)):
            redacted = redacted["arguments"]
        assert redacted["to"] == "Rome"
        assert re.fullmatch(r"<SECRET:[a-z2-7]{4}>", redacted["password"])


@pytest.mark.parametrize(
    "field", [field for field in msgspec.structs.fields(Trace) if field.name not in EXEMPT[Trace] | {"spans", "error"}]
)
def test_every_field_of_a_trace_that_is_no_id_is_redacted(redactor: Redactor, field: Any) -> None:
    """A field that is added to the trace later is redacted unless it is listed as an id."""
    trace = make_trace()
    setattr(trace, field.name, {"a": EMAIL, EMAIL: ["x", EMAIL]} if "dict" in str(field.type) else f"of {EMAIL}")
    assert EMAIL not in repr(redactor.trace(trace))


def test_exempt_fields_exist() -> None:
    """What is exempt from redaction is a field of that struct: a renamed one would be forgotten here."""
    for struct, names in EXEMPT.items():
        known = set(struct.__struct_fields__)
        assert names - {"traceparent"} <= known, struct


def test_a_trace_is_redacted_but_for_its_ids(redactor: Redactor) -> None:
    """Spans, errors, names and attributes are redacted in the session's scope; ids, times and the rest stay."""
    tools = [{"function": {"name": "look_up", "parameters": {"password": {"type": "string"}}}}]
    message = {"role": "user", "content": f"I am {EMAIL}"}
    for _ in range(2):  # the second time much is remembered
        span = Span(
            "0123456789abcdef",
            None,
            f"for {EMAIL}",
            "CHAT_MODEL",
            10**18,
            10**18,
            {"messages": [dict(message), message]},
            [f"{EMAIL}"],
            {"mlflow.chat.tools": tools, "big": 2**70},
            SpanError(f"E{EMAIL}", f"no {EMAIL}"),
        )
        trace = redactor.trace(make_trace(spans=[span], error=SpanError("E", EMAIL)))
        email = redactor.text(EMAIL, "s-1")
        assert span.inputs == {"messages": [{"role": "user", "content": f"I am {email}"}] * 2}
        assert (span.name, span.outputs, span.span_id) == (f"for {email}", [email], "0123456789abcdef")
        assert span.attributes == {"mlflow.chat.tools": tools, "big": 2**70}
        assert EMAIL.encode() not in encode(trace)
        assert decode(encode(redactor.trace(trace))) == decode(encode(trace))
    assert message == {"role": "user", "content": f"I am {EMAIL}"}


def test_a_trace_without_a_session_is_a_scope_of_its_own(redactor: Redactor) -> None:
    """Two traces without a session cannot be linked by their placeholders."""
    names = set()
    for trace_id in ("tr-1", "tr-2"):
        trace = make_trace(spans=[Span("0" * 16, None, EMAIL, "AGENT", 1)])
        trace.trace_id, trace.session_id = trace_id, ""
        names.add(redactor.trace(trace).spans[0].name)
    assert len(names) == 2


class Color(StrEnum):
    MINE = EMAIL


@dataclasses.dataclass
class Data:
    token: str
    inner: Any = None


class Struct(msgspec.Struct, rename="camel"):
    api_key: str
    inner: Any = None


class Model(BaseModel):
    note: str
    card: int = 4111111111111111


class Text(str):
    __slots__ = ()

    def __str__(self) -> str:  # noqa: D105
        return "harmless"


def test_objects_of_all_kinds(redactor: Redactor) -> None:
    """Objects are taken as JSON; what they hold is found, in whatever they are nested."""
    value = [
        Data("zzz", Struct("zzz", Model(note=EMAIL))),
        Color.MINE,
        Text(EMAIL),
        ValueError(EMAIL),
        deque([EMAIL]),
        {EMAIL},
        bytearray(EMAIL.encode()),
        memoryview(EMAIL.encode()),
        EMAIL.encode("utf-16"),
        {EMAIL.encode(): {1: EMAIL}},
        {"ssn": 219099999},
    ]
    redacted = redactor.value(value)
    text = json.dumps(redacted)
    assert not [left for left in (EMAIL, "zzz", "4111", "219099999", "a\\u0000n") if left in text]
    assert redacted[0] == {
        "token": "<SECRET>",
        "inner": {"apiKey": "<SECRET>", "inner": {"note": "<EMAIL>", "card": "<CARD>"}},
    }
    assert redacted[3] == "ValueError: <EMAIL>"
    assert redacted[8:10] == ["<32 bytes>", {"<EMAIL>": {"1": "<EMAIL>"}}]


def test_numbers_that_stay(redactor: Redactor) -> None:
    """Numbers of any size, and those that are none, stay as they are."""
    value = [2**100, 10**5000, -5, 1.5, math.inf, 1e300]
    assert redactor.value(value) == value
    assert math.isnan(redactor.value(math.nan))


def test_names_that_become_one(redactor: Redactor) -> None:
    """Two names of fields that are redacted to one keep both their values."""
    assert redactor.value({"bob@example.com": 1, "Bob@example.com": 2}) == {"<EMAIL>": 1, "<EMAIL>_": 2}


def test_ids_by_their_names(redactor: Redactor) -> None:
    """Under a name that says order or part, a number like a phone's stays; an address or a secret does not."""
    given = {"order_id": "415-555-2671", "version": "1.2.3.4", "trackingNumber": "219-09-9999", "invoice": EMAIL}
    assert redactor.value(given) == given | {"invoice": "<EMAIL>"}
    assert redactor.value({"user_id": "415-555-2671"}) == {"user_id": "<PHONE>"}


class Broken:
    def __str__(self) -> str:  # noqa: D105
        raise LookupError(EMAIL)


def deep() -> Any:
    value: Any = EMAIL
    for _ in range(10_000):
        value = [value]
    return value


def cyclic() -> Any:
    value: dict[str, Any] = {"of": EMAIL}
    value["self"] = [value]
    return value


@pytest.mark.parametrize("make", [deep, cyclic, Broken])
def test_what_cannot_be_redacted_raises(redactor: Redactor, make: Any) -> None:
    """Too deep, nested in itself, or broken: an error that says nothing of the value, and no result."""
    trace = make_trace(spans=[Span("1", None, "n", "TOOL", 1, inputs=make())])
    for attempt in (lambda: redactor.value({"a": make()}), lambda: redactor.trace(trace)):
        with pytest.raises(Unredactable) as raised:
            attempt()
        assert EMAIL not in str(raised.value)
        assert raised.value.__cause__ is raised.value.__context__ is None
    with pytest.raises(Unredactable):
        redactor.text(5)  # type: ignore[arg-type]


def test_patterns_of_the_settings() -> None:
    """A kind of one's own is found by its group ``value``, or whole, and takes part in all the rest."""
    redactor = Redactor(b"k" * 32, {"STAFF": r"\bE-(?P<value>\d{6})\b", "ORT": "(?i)münchen|köln"})
    text = redactor.text(f"E-123456 aus Köln, {EMAIL}", "s")
    assert re.fullmatch(r"E-<STAFF:\w{4}> aus <ORT:\w{4}>, <EMAIL:\w{4}>", text)
    assert redactor.text(text, "s") == text
    assert redactor.text("E-123456 in MÜNCHEN") == "E-<STAFF> in <ORT>"
    assert redactor.value({"E-123456": ["KÖLN"]}) == {"E-<STAFF>": ["<ORT>"]}


@pytest.mark.parametrize(
    ("kind", "expression", "says"),
    [
        ("STAFF", "(", "missing \\)"),
        ("STAFF", "(?=a)", "invalid perl operator"),
        ("STAFF", "x{2000}", "repetition"),
        ("STAFF", "[0-9]*", "empty text"),
        ("STAFF", r"\b", "empty text"),
        ("staff", "x", "capital"),
        ("A" * 22, "x", "capital"),
    ],
)
def test_a_bad_pattern_ends_the_start(kind: str, expression: str, says: str) -> None:
    """The message names the setting and the kind, and has what RE2 said."""
    with pytest.raises(ConfigurationError, match=f"(?s)GATEWAY_REDACT_PATTERNS: {kind}.*{says}"):
        Redactor(b"k" * 32, {kind: expression})


def test_the_memory_is_bounded() -> None:
    """However much passes through, what is remembered stays small, and what is asked for stays the longest."""
    memory = Memory()
    memory.add("often")
    for number in range(100_000):
        memory.add(f"{number:0200}")
        memory.name(f"name {number}", None)
        assert number % 1000 or memory.holds("often")
    assert not memory.holds(f"{0:0200}")
    assert memory.size_bytes < 5_000_000
    assert len(memory.names) <= 10_000
