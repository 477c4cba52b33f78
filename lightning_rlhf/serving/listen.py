"""Listens on an address until SIGTERM or Ctrl-C; then answers may finish for a while."""

from __future__ import annotations

import asyncio
import socket
import sys
from types import FrameType

import uvicorn

from lightning_rlhf.serving.app import make_app
from lightning_rlhf.serving.guard import Access
from lightning_rlhf.serving.protocol import bounded_protocol
from lightning_rlhf.serving.server import Server

#: Time for the clients of cancelled answers to get the error.
_GRACE = 3
_BACKLOG = 2048
#: Bytes that the system holds for a client that does not read; by itself it would hold megabytes.
_SEND_BUFFER = 128 * 1024


def run(server: Server, access: Access, host: str, port: int) -> None:
    """Serves until SIGTERM or Ctrl-C.

    Args:
        server: What is served.
        access: Who may ask.
        host: Address to listen on.
        port: Port to listen on; 0 takes a free one.

    Raises:
        OSError: The address cannot be taken.
    """
    config = uvicorn.Config(
        make_app(server, access),
        http=bounded_protocol(server.limits),
        ws="none",
        access_log=False,
        server_header=False,
        log_level="warning",
        timeout_graceful_shutdown=int(server.limits.drain_seconds) + _GRACE,
    )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        try:
            listener.bind((host, port))
            listener.listen(_BACKLOG)  # from now on connections wait instead of being refused
        except OSError as error:
            raise OSError(f"{host}:{port} cannot be listened on: {error.strerror}. Choose another --port.") from error
        address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        print(_greeting(server, address), file=sys.stderr, flush=True)
        _Drained(config, server).run([listener])


class _Drained(uvicorn.Server):
    """Cancels the answers that have not finished in time, so that their clients get an error and not half an answer."""

    def __init__(self, config: uvicorn.Config, server: Server) -> None:
        super().__init__(config)
        self._server = server

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends the server."""
        timer = asyncio.get_running_loop().call_later(self._server.limits.drain_seconds, self._cancel)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Says what happens, because answers may take a while to finish."""
        count = sum(worker.unfinished for worker in self._server.workers)
        if count and not self.should_exit:
            print(
                f"Stopping: {count} answers may finish within {self._server.limits.drain_seconds:g} s.",
                file=sys.stderr,
                flush=True,
            )
        super().handle_exit(sig, frame)

    def _cancel(self) -> None:
        for worker in self._server.workers:
            worker.cancel_all()


def _greeting(server: Server, address: str) -> str:
    lines = [f"{name}: {served.engine}" for name, served in server.models.items()]
    if server.scorer is not None:
        lines.append("a reward for POST /v1/rewards")
    return f"Serving {', '.join(lines)}\nListening on {address} (Ctrl-C stops)"
