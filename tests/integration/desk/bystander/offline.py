"""Its model has one answer, which it gives unless it is asked "hang"."""

import asyncio
from typing import Any

from gateway.runs.offline import OfflineModel


class Hanging(OfflineModel):
    """May never answer."""

    async def get_response(self, instructions: Any, asked: Any, *rest: Any, **options: Any) -> Any:
        """Answer in one piece, or not at all."""
        if asked[-1].get("content") == "hang":
            await asyncio.Event().wait()
        return await super().get_response(instructions, asked, *rest, **options)

    async def stream_response(self, instructions: Any, asked: Any, *rest: Any, **options: Any) -> Any:
        """Answer as a stream, or not at all."""
        if asked[-1].get("content") == "hang":
            await asyncio.Event().wait()
        async for event in super().stream_response(instructions, asked, *rest, **options):
            yield event


model = Hanging(lambda _view: "I only stand by.")
