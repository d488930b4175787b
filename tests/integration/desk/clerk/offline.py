"""The clerk's model: it calls the tools that the user names, and otherwise says how many messages it has seen."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

from gateway.runs.offline import Call, OfflineModel, View

from .agent import agent, began, gate, seen

TOOLS = {tool.name for tool in agent.tools} | {"conjure"}


def decide(view: View) -> str | list[Call]:
    """Do as the last message says; "loop" never ends."""
    results = view.tool_results_this_turn
    if results and not view.last_user.startswith("loop"):
        return " and ".join(result.output for result in results)
    told = [command.strip().partition(" ") for command in view.last_user.replace("loop", "note").split(",")]
    calls = [Call(tool, what=what) for tool, _, what in told if tool in TOOLS]
    return calls or f"{len(view.user_texts)}: {view.last_user}"


class Watched(OfflineModel):
    """Notes what it sees. Asked "deaf", it answers although it was cancelled; asked "hang", it waits for the gate."""

    async def get_response(self, instructions: Any, asked: Any, *rest: Any, **options: Any) -> Any:
        """Answer in one piece."""
        await self._look(asked)
        return await super().get_response(instructions, asked, *rest, **options)

    async def stream_response(self, instructions: Any, asked: Any, *rest: Any, **options: Any) -> AsyncIterator[Any]:
        """Answer as a stream."""
        await self._look(asked)
        async for event in super().stream_response(instructions, asked, *rest, **options):
            yield event

    async def _look(self, asked: list[Any]) -> None:
        seen.append(list(asked))
        match asked[-1].get("content"):
            case "deaf":
                began.set()
                with suppress(asyncio.CancelledError):
                    await gate.wait()
            case "hang":
                began.set()
                await gate.wait()


model = Watched(decide)
