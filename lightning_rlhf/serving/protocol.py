"""Connections that are bounded in number, in the time to send a request, and in the time to take an answer.

uvicorn's HTTP/1.1 protocol has no such limits, and its own errors are plain text. This class overrides methods of it
that are not documented; ``tests/serving/test_abuse.py`` fails if a new version calls them differently.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from lightning_rlhf.serving.errors import ApiError, dumps
from lightning_rlhf.serving.limits import Limits

log = logging.getLogger(__name__)


def bounded_protocol(limits: Limits) -> type[H11Protocol]:
    """Makes the class of connections with these limits."""

    class BoundedProtocol(H11Protocol):
        _idle: asyncio.TimerHandle | None = None
        _stuck: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                self._refuse(503, f"The server has {limits.max_connections} connections, which is the limit.")
            self._expect_request()

        def data_received(self, data: bytes) -> None:
            if self._idle is None and self._is_idle():
                self._expect_request()
            super().data_received(data)

        def connection_lost(self, exc: Exception | None) -> None:
            for timer in (self._idle, self._stuck):
                if timer is not None:
                    timer.cancel()
            super().connection_lost(exc)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stuck = self.loop.call_later(limits.write_seconds, self._cut)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stuck is not None:
                self._stuck.cancel()

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, msg)

        def _is_idle(self) -> bool:
            """Whether no request is being answered: none has come, or only its beginning."""
            return self.cycle is None or self.cycle.response_complete

        def _expect_request(self) -> None:
            """Closes the connection if no request has come in time."""
            self._idle = self.loop.call_later(limits.request_seconds, self._close_if_idle)

        def _close_if_idle(self) -> None:
            self._idle = None
            if self._is_idle():
                self.transport.close()

        def _cut(self) -> None:
            log.warning("A client took nothing of its answer for %g s and was cut off.", limits.write_seconds)
            self.transport.abort()

        def _refuse(self, status: int, message: str) -> None:
            body = dumps(ApiError(status, message).body)
            headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            events: tuple[Any, ...] = (
                h11.Response(status_code=status, headers=[*headers, (b"connection", b"close")]),
                h11.Data(data=body),
                h11.EndOfMessage(),
            )
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # no response has begun
                self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
            self.transport.close()

    return BoundedProtocol
