"""How much a server takes on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        max_rows: Answers that are generated together.
        max_queue: Answers that wait. Beyond it requests get status 429.
        max_body: Bytes of a request's body.
        max_connections: Open connections.
        request_seconds: Time to send a whole request.
        write_seconds: Time for which a client may take nothing of its answer.
        drain_seconds: Time that answers get to finish after SIGTERM.
    """

    max_rows: int = 64
    max_queue: int = 256
    max_body: int = 4 * 2**20
    max_connections: int = 1024
    request_seconds: float = 30.0
    write_seconds: float = 30.0
    drain_seconds: float = 20.0
