"""A relay in front of Postgres: the network between the two, which a test can cut wherever it wants."""

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

from sqlalchemy import make_url


class Relay:
    """Passes connections on to a Postgres, until it is told otherwise."""

    def __init__(self, url: str):
        self._there = make_url(url)
        self._server: asyncio.Server | None = None
        self._port = 0
        self._writers: set[asyncio.StreamWriter] = set()
        self._last_word: bytes | None = None
        self.cuts = 0
        """Connections that were cut at their last word."""

    @property
    def url(self) -> str:
        """URL of the same database by way of the relay."""
        there = self._there.set(host="127.0.0.1", port=self._port)
        return there.render_as_string(hide_password=False)

    async def __aenter__(self) -> Self:
        """Listen."""
        await self.back()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cut everything."""
        await self.away()

    async def back(self) -> None:
        """Take connections, on the port that it had before."""
        self._server = await asyncio.start_server(self._pass_on, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def away(self) -> None:
        """Cut what is there and refuse what comes."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        self._server = None

    def cut_after(self, word: bytes) -> None:
        """Pass the next message that has this word on, and cut the connection before the answer comes back."""
        self._last_word = word

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(self._there.host, self._there.port)
        deaf = asyncio.Event()
        writers = {writer, there[1]}
        self._writers |= writers
        ways = [self._copy(reader, there[1], deaf, asks=True), self._copy(there[0], writer, deaf, asks=False)]
        tasks = {asyncio.create_task(way) for way in ways}
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for each in writers:
            each.transport.abort()
        await asyncio.wait(tasks)
        self._writers -= writers

    async def _copy(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, deaf: asyncio.Event, *, asks: bool
    ) -> None:
        with suppress(OSError):
            while data := await source.read(65_536):
                if asks and self._last_word is not None and self._last_word in data:
                    self._last_word = None
                    deaf.set()
                elif not asks and deaf.is_set():
                    self.cuts += 1
                    return  # it has answered, so it has done what it was asked to
                sink.write(data)
                await sink.drain()
