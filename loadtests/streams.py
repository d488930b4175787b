"""Load test of streams: many clients at once, each with one streamed answer.

How soon do streams begin, how soon are they whole, and how many are not::

    python loadtests/streams.py --clients 500 --url http://127.0.0.1:8000

A key for the API is read from ``GATEWAY_API_KEY``. The exit code is 1 if a stream was not whole.
"""

import asyncio
import os
import resource
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass

import cyclopts
import httpx
from rich.console import Console
from rich.table import Table

TIMEOUT_S = 120.0
"""Silence after which a stream counts as failed."""


@dataclass
class Outcome:
    """What one client saw, in seconds since it sent its request."""

    event_s: float | None = None
    """The first event."""
    word_s: float | None = None
    """The first word of the answer."""
    whole_s: float | None = None
    """The end, if it was a good one."""
    problem: str = "the stream broke off"


async def listen(client: httpx.AsyncClient, body: dict[str, object]) -> Outcome:
    """Have one request streamed."""
    outcome, started = Outcome(), time.perf_counter()
    completed = False
    try:
        async with client.stream("POST", "/invocations", json=body) as answer:
            if answer.status_code != 200:
                outcome.problem = f"status {answer.status_code}"
                return outcome
            async for line in answer.aiter_lines():
                now = time.perf_counter() - started
                kind = line.removeprefix("event: ")
                if line.startswith("event: "):
                    outcome.event_s = outcome.event_s or now
                if kind == "response.output_text.delta":
                    outcome.word_s = outcome.word_s or now
                elif kind == "response.failed":
                    outcome.problem = kind
                elif kind == "response.completed":
                    completed = True
                elif line == "data: [DONE]" and completed:
                    outcome.whole_s = now
    except httpx.HTTPError as error:
        outcome.problem = type(error).__name__
    return outcome


async def crowd(url: str, clients: int, body: dict[str, object]) -> list[Outcome]:
    """Let all clients ask at once."""
    key = os.environ.get("GATEWAY_API_KEY")
    async with httpx.AsyncClient(
        base_url=url,
        headers={"Authorization": f"Bearer {key}"} if key else {},
        limits=httpx.Limits(max_connections=None),
        timeout=TIMEOUT_S,
    ) as client:
        return await asyncio.gather(*(listen(client, body) for _ in range(clients)))


def main(
    *,
    url: str = "http://127.0.0.1:8000",
    clients: int = 500,
    agent: str = "math",
    text: str = "What is 15% of 240?",
) -> None:
    """Stream to many clients at once.

    Args:
        url: Address of the gateway.
        clients: How many.
        agent: Agent that they ask.
        text: What they ask it.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(2 * clients + 100, hard), hard))
    started = time.perf_counter()
    outcomes = asyncio.run(crowd(url, clients, {"agent": agent, "input": text, "stream": True}))
    took_s = time.perf_counter() - started
    problems = Counter(outcome.problem for outcome in outcomes if outcome.whole_s is None)

    table = Table(title="Streams", title_justify="left", show_header=False)
    table.add_row("clients at once", f"{clients}")
    table.add_row("whole streams", f"{clients - problems.total()} in {took_s:.1f} s")
    table.add_row("failures", ", ".join(f"{count} {problem}" for problem, count in problems.items()) or "none")
    table.add_row("first event", spread([each.event_s for each in outcomes]))
    table.add_row("first word", spread([each.word_s for each in outcomes]))
    table.add_row("whole stream", spread([each.whole_s for each in outcomes]))
    Console().print(table)
    sys.exit(1 if problems else 0)


def spread(seconds: list[float | None]) -> str:
    """Return median, 95th percentile and maximum of what there is."""
    known = sorted(value for value in seconds if value is not None)
    if len(known) < 2:
        return "-"
    p50, p95 = statistics.median(known), known[int(len(known) * 0.95)]
    return f"p50 {p50:.2f} s, p95 {p95:.2f} s, at the most {known[-1]:.2f} s"


if __name__ == "__main__":
    cyclopts.run(main)
