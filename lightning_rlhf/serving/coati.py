"""``POST /generate`` and ``/generate/stream``, as Coati's chat server had them, for its clients."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from lightning_rlhf.data.formats import Message
from lightning_rlhf.serving.errors import json_response
from lightning_rlhf.serving.generation import open_rows
from lightning_rlhf.serving.models import Served
from lightning_rlhf.serving.rows import End, Rows
from lightning_rlhf.serving.schema import CoatiBody, SamplingBody
from lightning_rlhf.serving.server import Server
from lightning_rlhf.serving.sse import EventStream, unless_left
from lightning_rlhf.serving.truncation import fit


def coati_routes(server: Server) -> APIRouter:
    """Makes the routes."""
    router = APIRouter()

    async def start(body: CoatiBody) -> tuple[Served, Rows, int]:
        served = server.find(None)
        messages: list[Message] = []
        for dialogue in body.history:
            messages.append(Message(role="user", content=dialogue.instruction))
            messages.append(Message(role="assistant", content=dialogue.response))
        # like Coati, without the oldest dialogues that do not fit
        _, ids, _ = await server.in_thread(fit, served, messages[:-1], body.max_new_tokens)
        given: dict[str, Any] = body.model_dump(include={"top_k", "top_p", "temperature"}, exclude_none=True)
        return (
            served,
            open_rows(server, served, SamplingBody(max_tokens=body.max_new_tokens, **given), [ids], None),
            len(ids),
        )

    @router.post("/generate")
    async def generate(body: CoatiBody, http: Request) -> Response:
        served, rows, length = await start(body)
        async with rows:
            found = await unless_left(http, rows.finish())
        server.metrics.answers(served.name, length, found)
        return json_response(found[0].text.lstrip())

    @router.post("/generate/stream")
    async def stream(body: CoatiBody) -> Response:
        served, rows, length = await start(body)

        async def events() -> AsyncIterator[bytes]:
            begun = False
            async for found in rows:
                for one in found:
                    if isinstance(one, End):
                        server.metrics.answers(served.name, length, [one.completion])
                        continue
                    text = one.token.text if begun else one.token.text.lstrip()
                    begun = begun or bool(text)
                    if text:
                        yield _event("generate", text)
            yield _event("end", "")

        return EventStream(events(), rows.cancel, lambda error: _event("error", error.message))

    return router


def _event(name: str, text: str) -> bytes:
    """Writes an event; its text is one ``data`` line per line."""
    lines = "".join(f"data: {line}\n" for line in text.replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    return f"event: {name}\n{lines}\n".encode("utf-8", "backslashreplace")
