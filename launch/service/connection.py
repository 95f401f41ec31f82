"""A uvicorn connection that does not wait for ever for a client that is slow on purpose."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 15.0
STALL_SECONDS = 60.0


class BoundedConnection(H11Protocol):
    """Closes a connection whose request headers take too long, or whose client stops reading.

    uvicorn bounds only the pause between two requests. Bodies are bounded by `guard.Guard`.
    """

    header_seconds = HEADER_SECONDS
    stall_seconds = STALL_SECONDS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """As uvicorn makes it."""
        super().__init__(*arguments, **options)
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._wait("headers", self.header_seconds)

    def data_received(self, data: bytes) -> None:
        """Take some bytes: they may complete a request's headers, or be a drop of them."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop("headers")
        else:
            self._wait("headers", self.header_seconds)

    def on_response_complete(self) -> None:
        """After an answer uvicorn's own timer runs, until the first byte of the next request."""
        super().on_response_complete()
        self._stop("headers")

    def pause_writing(self) -> None:
        """More is to be sent than the client takes."""
        super().pause_writing()
        self._wait("reader", self.stall_seconds)

    def resume_writing(self) -> None:
        """It has taken some."""
        super().resume_writing()
        self._stop("reader")

    def connection_lost(self, exc: Exception | None) -> None:
        """There is nothing to wait for any more."""
        self._stop("headers")
        self._stop("reader")
        super().connection_lost(exc)

    def _wait(self, what: str, seconds: float) -> None:
        """Close the connection when `what` has not come in time; a timer that runs already goes on."""
        if what not in self._timers:
            self._timers[what] = self.loop.call_later(seconds, self.transport.abort)

    def _stop(self, what: str) -> None:
        timer = self._timers.pop(what, None)
        if timer is not None:
            timer.cancel()
