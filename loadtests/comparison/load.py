"""The load: requests one after the other on some connections, or at moments that do not wait for answers.

The same code drives clients over HTTP and the bare loop in its own process, so that both are timed alike.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import aiohttp
import msgspec


@dataclass(frozen=True)
class Load:
    """What is asked for how long."""

    seconds: float = 10.0
    """How long new requests are sent; those under way are then waited for."""
    connections: int = 16
    """How many ask at once, each again when it was answered."""
    requests: int | None = None
    """How many are sent at the most; ``None``: as many as the time allows."""
    thinking_ms: int = 0
    """How long each of a run's two model calls takes."""
    ramp_s: float = 0.0
    """Seconds over which the connections begin one after the other."""
    due_s: list[float] | None = None
    """Moments, in seconds from the start, at which a request is sent whatever became of the others; ``None``: none."""


@dataclass(frozen=True)
class Answer:
    """What a client saw of one request."""

    ok: bool
    trace_id: str | None = None


@dataclass
class Outcome:
    """What came of a load."""

    took_s: float = 0.0
    """From the first request to the last answer."""
    latencies_s: list[float] = field(default_factory=list)
    """Of the good answers."""
    failures: int = 0
    trace_ids: list[str] = field(default_factory=list)
    """Trace ids that the answers named."""

    def as_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return asdict(self)

    def percentile_ms(self, share: float) -> float:
        """Return the latency, in milliseconds, that this share of the answers did not exceed; nan without any."""
        ordered = sorted(self.latencies_s)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] * 1000 if ordered else float("nan")


Ask = Callable[[int], Awaitable[Answer]]
"""Makes the request of that number (from 0)."""


async def carry_out(load: Load, ask: Ask) -> Outcome:
    """Make the requests and return what came of them."""
    outcome, started, number = Outcome(), time.perf_counter(), 0

    async def one(due: float | None = None) -> None:
        nonlocal number
        mine, number = number, number + 1
        # An open load counts from the moment that the request was due: a late start is a wait like any other.
        began = time.perf_counter() if due is None else started + due
        answer = await ask(mine)
        if answer.ok:
            outcome.latencies_s.append(time.perf_counter() - began)
        else:
            outcome.failures += 1
        if answer.trace_id is not None:
            outcome.trace_ids.append(answer.trace_id)

    async def connection(place: int) -> None:
        await asyncio.sleep(load.ramp_s * place / load.connections)
        until = started + load.seconds
        while time.perf_counter() < until and (load.requests is None or number < load.requests):
            await one()

    async def at(due: float) -> None:
        await asyncio.sleep(started + due - time.perf_counter())
        await one(due)

    if load.due_s is None:
        await asyncio.gather(*(connection(place) for place in range(load.connections)))
    else:
        await asyncio.gather(*(at(due) for due in load.due_s))
    outcome.took_s = time.perf_counter() - started
    return outcome


class _Metadata(msgspec.Struct):
    trace_id: str | None = None


class _Body(msgspec.Struct):
    trace_id: str | None = None
    metadata: _Metadata | None = None


_decoder = msgspec.json.Decoder(_Body)

Bodies = Callable[[int], bytes]
"""Gives the JSON body of the request of that number."""


def clients(session: aiohttp.ClientSession, url: str, bodies: Bodies, answer: bytes) -> Ask:
    """Return what asks over HTTP; an answer is good if its status is 200 and it contains ``answer``."""
    headers = {"content-type": "application/json", "x-mlflow-return-trace-id": "true"}

    async def ask(number: int) -> Answer:
        try:
            async with session.post(url, data=bodies(number), headers=headers) as response:
                body = await response.read()
        except (aiohttp.ClientError, TimeoutError):
            return Answer(ok=False)
        if response.status != 200 or answer not in body:
            return Answer(ok=False)
        decoded = _decoder.decode(body)
        trace_id = decoded.trace_id or (decoded.metadata.trace_id if decoded.metadata else None)
        return Answer(ok=True, trace_id=trace_id)

    return ask


async def over_http(load: Load, url: str, bodies: Bodies, answer: bytes) -> Outcome:
    """Carry out a load against a server, over connections that are kept open."""
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=600)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        return await carry_out(load, clients(session, url, bodies, answer))
