"""Contestant: a bare loop around `Runner.run`, no HTTP, tracing off.

It takes one order a line on its standard input, as JSON, and gives one line of latencies back::

    {"seconds": 10, "connections": 16}                               as many tasks, each asks again when it is answered
    {"seconds": 10, "connections": 500, "thinking_ms": 2000, "ramp_s": 4}   the same, begun one after the other
    {"due_s": [0.01, 0.03, ...], "thinking_ms": 300}                 one run at each of these moments
"""

import asyncio
import json
import sys
from typing import Any

import agents as sdk
import uvloop
from agents import Agent, RunConfig, Runner

from ..load import Answer, Ask, Load, carry_out
from .common import ANSWER, load, question


def runs(agent: Agent[Any], config: RunConfig, order: Load) -> Ask:
    """Return what makes one run."""
    asked: Any = [{"role": "user", "content": question(order.thinking_ms)}]

    async def run(_number: int) -> Answer:
        result = await Runner.run(agent, asked, run_config=config)
        return Answer(ok=result.final_output == ANSWER.decode())

    return run


async def main() -> None:
    """Carry out the orders."""
    sdk.set_tracing_disabled(True)
    agent, config = load()
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = Load(**json.loads(line))
        sys.stdout.write(json.dumps((await carry_out(order, runs(agent, config, order))).as_json()) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(main())
