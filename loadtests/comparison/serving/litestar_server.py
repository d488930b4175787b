"""Contestant: a bare Litestar handler around `Runner.run`, with tracing off. ``python -m ... PORT``."""

import sys
from typing import Any

import agents as sdk
import uvicorn
from agents import Runner
from litestar import Litestar, post

from .common import load


def main(port: int) -> None:
    """Serve until a signal comes."""
    agent, config = load()
    sdk.set_tracing_disabled(True)

    @post("/invocations", status_code=200)
    async def answer(data: dict[str, Any]) -> dict[str, Any]:
        result = await Runner.run(agent, data["input"], run_config=config)
        return {"output": [item.to_input_item() for item in result.new_items]}

    app = Litestar([answer], openapi_config=None, logging_config=None)
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


if __name__ == "__main__":
    main(int(sys.argv[1]))
