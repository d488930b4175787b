"""One client's connection: HTTP/1.1 as uvicorn speaks it, with bounds on what may arrive and how slowly.

By h11, not by the faster httptools: that loses the body of a request which offers to change the protocol, as Java's own
client does by default, and it takes heads of any size.

Who closes only the sending half of a connection counts as gone, since on the wire that cannot be told from leaving.
"""

import asyncio
import uuid
from typing import cast

import h11
import msgspec
from litestar import Litestar
from uvicorn.protocols.http.h11_impl import H11Protocol

from gateway.http.errors import ErrorBody
from gateway.settings import Settings

MAX_HEAD_BYTES = 65_536
"""Of a request's first line and headers: room for large cookies and tokens."""


class Connection(H11Protocol):
    """A connection on which nothing is waited for without end."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Give the first request as much time as uvicorn gives the ones after it."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave no timer behind."""
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._set_deadline(needed=False)

    def handle_events(self) -> None:
        """Take what has arrived, and bound the time for the rest of it."""
        super().handle_events()
        self._set_deadline(needed=self._awaits_rest)

    def on_response_complete(self) -> None:
        """Go on with the next request, and bound the time for the rest of this one."""
        super().on_response_complete()
        self._set_deadline(needed=self._awaits_rest)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; in the middle of another answer there is no place for one."""
        if self.conn.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            error = ErrorBody("BAD_REQUEST", msg, f"req_{uuid.uuid4().hex}")
            body = msgspec.json.encode(error)
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("x-request-id", error.request_id),
                ("connection", "close"),
            ]
            answer = h11.Response(status_code=400, headers=headers, reason="Bad Request")
            for event in (answer, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True  # or the app would answer as well
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: a server may pass over the offer (RFC 9110, 7.8)."""

    @property
    def _awaits_rest(self) -> bool:
        """Whether a head has begun, or a body goes on though it was answered; until then it has its own time limit."""
        if self.transport.is_closing():
            return False
        if self.conn.their_state is h11.IDLE:
            return self.timeout_keep_alive_task is None  # uvicorn's deadline for silence ends with the first byte
        return self.conn.their_state is h11.SEND_BODY and self.cycle.response_complete

    def _set_deadline(self, *, needed: bool) -> None:
        if needed and self._deadline is None:
            settings: Settings = cast("Litestar", self.config.app).state.settings
            self._deadline = self.loop.call_later(settings.body_timeout_s, self.transport.close)
        elif not needed and self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
