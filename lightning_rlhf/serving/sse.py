"""Answers to clients that may leave: streams of server-sent events, and plain responses."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lightning_rlhf.serving.errors import ApiError, ClientLeft, dumps

log = logging.getLogger(__name__)
Made = TypeVar("Made")


def event(content: Any) -> bytes:
    """Writes an object as an event."""
    return b"data: " + dumps(content) + b"\n\n"


async def unless_left(request: Request, work: Coroutine[Any, Any, Made]) -> Made:
    """Awaits work, and cancels it when the client closes its connection.

    Raises:
        ClientLeft: The client has left.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientLeft
    finally:
        await _cancel(working, leaving)


class EventStream(Response):
    """A response of events. An error on the way becomes the last event.

    Args:
        events: The events; it is closed when the client leaves.
        close: Called at the end in any case.
        on_error: Writes an error as an event.
    """

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        on_error: Callable[[ApiError], bytes] = lambda error: event(error.body),
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._close, self._on_error = events, close, on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        writing, leaving = asyncio.ensure_future(self._write(send)), asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({writing, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self._close()
            await _cancel(writing, leaving)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except ApiError as error:
            await send({"type": "http.response.body", "body": self._on_error(error), "more_body": True})
        except Exception as error:  # the status has been sent already
            log.exception("A stream failed.")
            failed = ApiError(500, f"The server failed ({type(error).__name__}). Its log says more.")
            await send({"type": "http.response.body", "body": self._on_error(failed), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _left(receive: Receive) -> None:
    """Waits until the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(*tasks: asyncio.Future[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
