"""What stands before all routes: who may ask, how large a request may be, and a line in the log."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lightning_rlhf.serving.bodies import BODIES
from lightning_rlhf.serving.errors import ApiError
from lightning_rlhf.serving.limits import Limits
from lightning_rlhf.serving.metrics import Metrics
from lightning_rlhf.serving.page import page_paths

log = logging.getLogger(__name__)
_PAGE = page_paths()
_OPEN = ("/health", *_PAGE)
_PATHS = (*BODIES, "/health", "/metrics", "/v1/models", "/v1/votes", "/")


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        api_key: The key that requests must carry, except for ``/health`` and the chat page. None: anybody may ask.
        hosts: Names by which the server may be called, beside localhost and addresses. A page of another name that
            resolves to this machine (DNS rebinding) gets nothing.
        origins: Origins of other servers' pages that may ask.
    """

    api_key: str | None = None
    hosts: Collection[str] = ()
    origins: Collection[str] = ()

    def check(self, method: str, path: str, headers: Headers) -> None:
        """Refuses a request.

        Raises:
            ApiError: It may not ask, or its body is not JSON.
        """
        host = headers.get("host", "")
        name = _without_port(host)
        if name not in ("localhost", *self.hosts) and not _is_address(name):
            raise ApiError(403, f"This server is not called {host!r}. Start it with --allowed-host for other names.")
        if path not in _OPEN and self.api_key is not None and not self._has_key(headers):
            raise ApiError(401, "The API key is missing or wrong.", code="invalid_api_key")
        if method in ("GET", "HEAD", "OPTIONS"):
            return
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and urlsplit(origin).netloc != host:
            raise ApiError(403, f"Pages of {origin!r} may not ask. Start the server with --allowed-origin.")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "The body must be JSON, with the header content-type: application/json.")

    def _has_key(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # headers come as Latin-1
        right = hmac.compare_digest(given.strip().encode("latin-1"), (self.api_key or "").encode())
        return right and scheme.lower() == "bearer"


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _is_address(host: str) -> bool:
    with suppress(ValueError):
        ip_address(host.removeprefix("[").removesuffix("]"))
        return True
    return False


class Guard:
    """Middleware that checks a request, reads its body within limits, counts it, and logs it without its content.

    Args:
        app: The app behind it.
        access: Who may ask.
        limits: The server's limits.
        metrics: Counts requests.
    """

    def __init__(self, app: ASGIApp, access: Access, limits: Limits, metrics: Metrics) -> None:
        self.app, self.access, self.limits, self.metrics = app, access, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, number = time.perf_counter(), 0, uuid4().hex

        async def counting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        method, path = scope["method"], scope["path"]
        try:
            try:
                self.access.check(method, path, Headers(scope=scope))
                body = await self._read(Headers(scope=scope), receive)
            except ApiError as error:
                await error.response()(scope, receive, counting)
                return
            await self.app(scope, _replayed(body, receive), counting)
        finally:
            seconds = time.perf_counter() - began
            known = path if path in _PATHS else "other"
            self.metrics.request(known, status or 500, seconds)
            log.info("%s %s %s %d %.3f s", number, method, known, status or 500, seconds)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """Reads the whole body.

        Raises:
            ApiError: It is too large, or does not come in time.
        """
        most = self.limits.max_body
        too_large = ApiError(413, f"The body has more than {most} bytes.", code="request_too_large")
        given = headers.get("content-length", "0")
        if given.isdigit() and int(given) > most:
            raise too_large
        body, deadline = bytearray(), asyncio.get_running_loop().time() + self.limits.request_seconds
        while True:
            left = deadline - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), left)
            except asyncio.TimeoutError:
                late = f"The body did not come within {self.limits.request_seconds:g} s."
                raise ApiError(408, late, headers={"connection": "close"}) from None
            if message["type"] == "http.disconnect":
                raise ApiError(400, "The client left before it had sent its request.")
            body += message.get("body", b"")
            if len(body) > most:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Returns the body as one message, and then what comes after it."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
