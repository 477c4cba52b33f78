"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response

from lightning_rlhf.data.formats import Message
from lightning_rlhf.rollout import Completion
from lightning_rlhf.rollout.types import Token
from lightning_rlhf.serving.errors import ApiError, json_response
from lightning_rlhf.serving.generation import open_rows, usage
from lightning_rlhf.serving.logprobs import chat_logprobs
from lightning_rlhf.serving.models import Served
from lightning_rlhf.serving.rows import End, Rows, tokens_of
from lightning_rlhf.serving.schema import ChatBody
from lightning_rlhf.serving.server import Server
from lightning_rlhf.serving.sse import EventStream, event, unless_left
from lightning_rlhf.serving.truncation import fit


def chat_routes(server: Server) -> APIRouter:
    """Makes the route."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def chat(body: ChatBody, http: Request) -> Response:
        served = server.find(body.model)
        if body.reward and server.scorer is None:
            raise ApiError(400, "This server has no reward: start it with --reward.", "reward")
        messages = [cast(Message, turn.message) for turn in body.messages]
        if body.truncation == "auto":
            messages, ids, dropped = await server.in_thread(fit, served, messages, body.limit)
        else:
            ids, dropped = await server.in_thread(served.encode, messages), None
        rows = open_rows(server, served, body, [ids], None, body.top_logprobs or 0)
        answer = _Chat(server, served, body, messages, ids, dropped, rows)
        if body.stream:
            return EventStream(answer.events(), rows.cancel)
        async with rows:
            return json_response(await unless_left(http, answer.whole()))

    return router


@dataclass
class _Chat:
    """The answer to a chat request, streamed or whole."""

    server: Server
    served: Served
    body: ChatBody
    messages: list[Message]
    ids: list[int]
    dropped: int | None
    rows: Rows
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> dict[str, Any]:
        """The answers in one object."""
        completions = await self.rows.finish()
        scores = await self._finished(completions)
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": self._content(c), "refusal": None},
                "logprobs": self._logprobs(tokens_of(c)),
                "finish_reason": c.finish_reason,
                **({} if scores is None else {"reward": scores[i]}),
            }
            for i, c in enumerate(completions)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage(completions)}

    async def events(self) -> AsyncIterator[bytes]:
        """The answers in chunks: the role, texts as they come, what ended them, and the usage if it is asked for."""
        shown = [Shown(self.served.lead) for _ in range(self.body.n)]
        held: list[list[Token]] = [[] for _ in range(self.body.n)]  # tokens whose text is not shown yet
        ended: dict[int, Completion] = {}
        for i in range(self.body.n):
            yield self._chunk(i, {"role": "assistant", "content": "", "refusal": None})
        async for events in self.rows:
            out = b""
            for found in events:
                i, is_end = found.number, isinstance(found, End)
                if isinstance(found, End):
                    ended[i], text = found.completion, shown[i].rest()
                else:
                    held[i].append(found.token)
                    text = shown[i].add(found.token.text)
                if text or (is_end and held[i] and self.body.logprobs):
                    out += self._chunk(i, {"content": text}, held[i])
                    held[i] = []
                if is_end and not self.body.reward:
                    out += self._chunk(i, {}, finish=ended[i].finish_reason)
            if out:
                yield out
        completions = [ended[i] for i in range(self.body.n)]
        scores = await self._finished(completions)
        if scores is not None:
            for i, c in enumerate(completions):
                yield self._chunk(i, {}, finish=c.finish_reason, reward=scores[i])
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield event({**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage(completions)})
        yield b"data: [DONE]\n\n"

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        tokens: Sequence[Token] = (),
        finish: str | None = None,
        reward: float | None = None,
    ) -> bytes:
        logprobs = self._logprobs(tokens) if tokens else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        if reward is not None:
            choice["reward"] = reward
        return event({**self._head("chat.completion.chunk"), "choices": [choice]})

    def _head(self, kind: str) -> dict[str, Any]:
        dropped = {} if self.dropped is None else {"dropped_messages": self.dropped}
        return {"id": self.id, "object": kind, "created": self.created, "model": self.served.name, **dropped}

    def _content(self, completion: Completion) -> str:
        return completion.text.removeprefix(self.served.lead)

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self.body.logprobs:
            return None
        return {"content": chat_logprobs(self.served.tokenizer, tokens), "refusal": None}

    def _usage(self, completions: list[Completion]) -> dict[str, int]:
        return usage(len(self.ids), sum(len(c.input_ids) for c in completions))

    async def _finished(self, completions: list[Completion]) -> list[float] | None:
        """Counts finished answers, and returns their scores if they are asked for."""
        self.server.metrics.answers(self.served.name, len(self.ids), completions)
        self.server.note(self.messages, [c.text for c in completions])
        if not self.body.reward or self.server.scorer is None:
            return None
        answers = [c._replace(text=self._content(c)) for c in completions]
        scores = await self.server.scorer.score_completions(
            self.served.tokenizer, self.served.stops, self.messages, self.ids, answers
        )
        found: list[float] = scores.total.tolist()
        return found


class Shown:
    """The text of an answer while it comes, without the blank that the chat template writes before it.

    Args:
        lead: The blank.
    """

    def __init__(self, lead: str) -> None:
        self._lead, self._held = lead, ""

    def add(self, text: str) -> str:
        """Returns what new text shows."""
        if not self._lead:
            return text
        self._held += text
        if self._held != self._lead and self._lead.startswith(self._held):
            return ""
        return self.rest()

    def rest(self) -> str:
        """Returns what is held back; nothing is held back any more."""
        text, self._held, self._lead = self._held.removeprefix(self._lead), "", ""
        return text
