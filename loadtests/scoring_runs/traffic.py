"""The traffic: conversations of the support agent's samples, one turn after the other, at random moments."""

import itertools
import json
import random
import time
from collections.abc import Callable, Iterator
from uuid import uuid4

import aiohttp
from comparison.load import Answer, Load, Outcome, carry_out, clients
from comparison.processes import ROOT

AGENT = "support"
_LANES = 20
"""Conversations under way at once: their turns come one at a time."""


def moments(per_s: float, seconds: float, seed: int) -> list[float]:
    """Return random moments in seconds from the start (a Poisson process), so many a second on average."""
    draw, moment, found = random.Random(seed), 0.0, []
    while (moment := moment + draw.expovariate(per_s)) < seconds:
        found.append(moment)
    return found


def bodies(count: int) -> list[bytes]:
    """Return so many requests: turns of conversations that go on beside each other, the same ones each time."""
    samples = [json.loads(line) for line in (ROOT / "agents" / AGENT / "samples.jsonl").read_text().splitlines()]
    talks = itertools.cycle([sample["turns"] for sample in samples])
    lanes = [_conversations(talks) for _ in range(_LANES)]
    return [next(lanes[number % _LANES]) for number in range(count)]


def _conversations(talks: Iterator[list[str]]) -> Iterator[bytes]:
    """Return the turns of one conversation after the other, as requests."""
    while True:
        session = f"load-{uuid4().hex}"
        for text in next(talks):
            yield json.dumps({"input": [{"role": "user", "content": text}], "session_id": session}).encode()


async def ask_all(url: str, due_s: list[float], ended: Callable[[str, float], None]) -> Outcome:
    """Make a request at each of the moments, and return what came of them.

    Args:
        url: of the gateway's ``/invocations``.
        due_s: the moments, in seconds from now.
        ended: is told each trace's id and the monotonic time in seconds at which its response had ended.
    """
    asked = bodies(len(due_s))
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=600)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:
        client = clients(session, url, lambda number: asked[number], b"")

        async def ask(number: int) -> Answer:
            answer = await client(number)
            if answer.ok and answer.trace_id is not None:
                ended(answer.trace_id, time.monotonic())
            return answer

        return await carry_out(Load(due_s=due_s), ask)
