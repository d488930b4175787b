"""How fast redaction is, on traces as the gateway makes them and on inputs made to be slow.

Run it with::

    .venv/bin/python loadtests/redaction.py

The first table has traces: their size as they are stored (msgpack), the processor time that `Redactor.trace` takes for
one, and MB/s. Every trace has texts of its own; the instructions and tools are those of one agent, as in life. The
second has texts of 1 and 10 MB: where the time is linear, the ratio is about 10. Processor time, best of a few rounds.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from gateway.tracing import messages
from gateway.tracing.capture.content import CHAT_TOOLS, MODEL, PROVIDER, TOKEN_USAGE
from gateway.tracing.redaction.redactor import Redactor
from gateway.tracing.spans import Span, Trace, encode

_WORDS = [
    "order",
    "shipped",
    "tomorrow",
    "refund",
    "please",
    "check",
    "the",
    "status",
    "of",
    "my",
    "invoice",
    "and",
    "delivery",
    "address",
    "account",
    "balance",
    "when",
    "will",
    "it",
    "arrive",
    "we",
    "could",
    "not",
    "find",
    "any",
    "item",
    "in",
    "stock",
    "thank",
    "you",
    "for",
    "waiting",
    "transfer",
    "flight",
    "hotel",
    "booking",
    "seat",
    "window",
]
_INSTRUCTIONS = "You help the customers of a shop. Be brief, and never promise a date that the tools did not give. " * 8
_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"{name.replace('_', ' ').capitalize()}, given the order's number. Fails if there is none.",
            "parameters": {
                "type": "object",
                "properties": {
                    "order_id": {"type": "string", "description": "Number of the order, as in the confirmation."},
                    "reason": {"type": "string", "enum": ["late", "broken", "unwanted"], "description": "Why."},
                },
                "required": ["order_id"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("look_up_order", "refund_order", "cancel_order", "ask_a_person", "track_parcel")
]
_ROUNDS = 5
_TRACES = 200


def _sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=words)).capitalize() + "."


def _personal(rng: random.Random) -> str:
    number = rng.randrange(1000, 10_000)
    return rng.choice(
        [f"Write to ann.lee{number}@example.com. ", f"Call +1-202-555-{number}. ", f"My password is hunter{number}! "]
    )


def _result(rng: random.Random, personal: str) -> str:
    rows = [
        {
            "order_id": f"A-{rng.randrange(10**8)}",
            "status": "shipped",
            "price": rng.randrange(10_000) / 100,
            "note": _sentence(rng, 10),
            "at": f"2026-0{rng.randint(1, 9)}-11T12:{rng.randint(10, 59)}:00Z",
        }
        for _ in range(3)
    ]
    return json.dumps({"orders": rows, "contact": personal})


def make_trace(rng: random.Random, calls: int, history: int, *, personal: bool) -> Trace:
    """Return a trace of ``calls`` tool calls, after ``history`` earlier messages, in the shapes of `assemble`."""
    told = _personal(rng) if personal else ""
    trace = Trace(f"tr-{rng.getrandbits(128):032x}", "support", "v1", f"s-{rng.getrandbits(64)}", None, True, 1, 2)
    new: list[Any] = [{"role": "user", "content": told + _sentence(rng, 25)}]
    earlier = [{"role": ("user", "assistant")[at % 2], "content": _sentence(rng, 30)} for at in range(history)]
    items = earlier + new
    trace.spans = [Span("0" * 16, None, "support", "AGENT", 1, 2, {"messages": messages.from_items(new)})]
    for call in range(calls + 1):
        ids = {"name": "look_up_order", "call_id": f"call_{rng.getrandbits(64):x}"}
        arguments = json.dumps({"order_id": f"A-{rng.randrange(10**8)}"})
        asks = {"type": "function_call", **ids, "arguments": arguments}
        answers = {"role": "assistant", "content": _sentence(rng, 40) + told}
        output = [asks] if call < calls else [answers]
        trace.spans.append(_model_call(items, output, call))
        if call < calls:
            result = _result(rng, told)
            trace.spans.append(
                Span(f"{call:016x}", "0" * 16, "look_up_order", "TOOL", 1, 2, json.loads(arguments), result)
            )
            items = [*items, asks, {"type": "function_call_output", "call_id": ids["call_id"], "output": result}]
        else:
            trace.spans[0].outputs = {"messages": [answers]}
    return trace


def _model_call(items: list[Any], output: list[Any], call: int) -> Span:
    attributes = {
        MODEL: "gpt-4o",
        PROVIDER: "openai",
        CHAT_TOOLS: json.loads(json.dumps(_TOOLS)),
        TOKEN_USAGE: {"input_tokens": 1000 + call, "output_tokens": 60, "total_tokens": 1060 + call},
    }
    inputs = {"messages": messages.from_items(items, instructions=_INSTRUCTIONS), "temperature": 0.2}
    outputs = {"choices": [{"index": 0, "message": messages.answer(output)}]}
    return Span(f"{call + 100:016x}", "0" * 16, "gpt-4o", "CHAT_MODEL", 1, 2, inputs, outputs, attributes)


SHAPES = {
    "3 spans, nothing personal": (0, 0, False),
    "3 spans, personal": (0, 0, True),
    "5 spans, personal": (1, 2, True),
    "11 spans, personal": (4, 6, True),
    "11 spans, nothing personal": (4, 6, False),
    "21 spans, 40 messages of history": (9, 40, True),
}

UNITS = {
    "prose": "The order was shipped on 2026-01-31 and costs 12.50 EUR, thank you for waiting. ",
    "JSON": '{"order_id": "A-1001", "price": 12.5, "at": "2026-01-31T12:00:00Z"}, ',
    "addresses": "ann@example.com, ",
    "one letter": "a",
    "beyond ASCII": "é",
    "digits and blanks": "0 ",
    "one run of digits": "4",
    "groups like a card's": "4444-",
    "at signs": "a@",
    "keys that never end": "-----BEGIN ",
    "private keys that never end": "-----BEGIN PRIVATE KEY-----",
    "base64": "QUJD" * 19 + "\n",
    "an open quote": 'password="',
    "nested quotes": 'password=\\"a\\\\\\"b',
    "secrets": "password=hunter22 ",
    "backslashes": "\\",
    "escapes": "\\u0040",
    "colons": "1:",
    "dots": "1.",
    "account numbers": "DE89 ",
    "placeholders": "<SECRET:abcd> ",
    "plus signs": "+1",
}
"""What texts of any length are made of."""


def _seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def _redact_all(redactor: Redactor, traces: list[Trace]) -> None:
    for trace in traces:
        redactor.trace(trace)


def trace_rows() -> Iterator[tuple[str, float, float, float]]:
    """Yield a shape of trace, kilobytes of one, microseconds for one, and MB/s."""
    for name, (calls, history, personal) in SHAPES.items():
        best, size = float("inf"), 0
        redactor = Redactor(b"k" * 32)
        for number in range(_ROUNDS):
            rng = random.Random(number)
            traces = [make_trace(rng, calls, history, personal=personal) for _ in range(_TRACES)]
            size = sum(len(encode(trace)) for trace in traces)
            best = min(best, _seconds(partial(_redact_all, redactor, traces)))
        yield name, size / _TRACES / 1e3, best / _TRACES * 1e6, size / best / 1e6


def text_rows() -> Iterator[tuple[str, float, float]]:
    """Yield a kind of text, MB/s at 10 MB, and how many times as long that took as 1 MB."""
    redactor = Redactor(b"k" * 32)
    for name, unit in UNITS.items():
        small, large = (unit * (size // len(unit)) for size in (1_000_000, 10_000_000))
        one = min(_seconds(partial(redactor.text, small, "s")) for _ in range(2))
        ten = _seconds(partial(redactor.text, large, "s"))
        yield name, 10 / ten, ten / one


def main() -> None:
    """Print both tables."""
    console = Console()
    table = Table("trace", "kB", "µs", "MB/s")
    for name, size_kb, each_us, speed in trace_rows():
        table.add_row(name, f"{size_kb:.1f}", f"{each_us:.0f}", f"{speed:.0f}")
    console.print(table)
    table = Table("text of 10 MB", "MB/s", "time ÷ time of 1 MB")
    for name, speed, ratio in text_rows():
        table.add_row(name, f"{speed:.1f}", f"{ratio:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
