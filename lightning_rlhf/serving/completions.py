"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from starlette.responses import Response

from lightning_rlhf.rollout import Completion
from lightning_rlhf.rollout.detokenizer import decode
from lightning_rlhf.rollout.types import Token
from lightning_rlhf.serving.errors import ApiError, json_response
from lightning_rlhf.serving.generation import check_load, open_rows, usage
from lightning_rlhf.serving.logprobs import completion_logprobs, prompt_logprobs
from lightning_rlhf.serving.models import Served
from lightning_rlhf.serving.rows import End, Rows, tokens_of
from lightning_rlhf.serving.schema import CompletionBody
from lightning_rlhf.serving.server import Server
from lightning_rlhf.serving.sse import EventStream, event, unless_left

#: OpenAI's maximum number of tokens if a request gives none.
_DEFAULT_TOKENS = 16


def completion_routes(server: Server) -> APIRouter:
    """Makes the route."""
    router = APIRouter()

    @router.post("/v1/completions")
    async def completions(body: CompletionBody, http: Request) -> Response:
        served = server.find(body.model)
        prompts = [await server.in_thread(_encode, served, prompt) for prompt in body.prompts]
        answer = _Answer(server, served, body, [ids for ids, _ in prompts], [text for _, text in prompts])
        if body.echo and body.logprobs is not None:
            await unless_left(http, answer.score_prompts())
        if body.max_tokens == 0:
            check_load(server, served, len(prompts))
            for ids, _ in prompts:
                _check_context(served, ids)
        else:
            answer.rows = open_rows(server, served, body, answer.ids, _DEFAULT_TOKENS, body.logprobs or 0)
        if body.stream:
            return EventStream(answer.events(), answer.cancel)
        try:
            return json_response(await unless_left(http, answer.whole()))
        finally:
            answer.cancel()

    return router


def _encode(served: Served, prompt: str | list[int]) -> tuple[list[int], str]:
    """Returns a prompt's tokens and its text."""
    if isinstance(prompt, str):
        return served.encode(prompt), prompt
    embeddings: Any = served.policy.transformer.get_input_embeddings()
    vocabulary = embeddings.weight.shape[0]
    if strange := [token for token in prompt if token >= vocabulary]:
        raise ApiError(400, f"prompt: {strange[0]} is no token; there are {vocabulary}.", "prompt")
    _check_context(served, prompt)  # before a text is made of millions of tokens
    return prompt, decode(served.tokenizer, prompt)


def _check_context(served: Served, ids: Sequence[int]) -> None:
    """Refuses a prompt that is longer than the model reads; nothing is generated, so it may fill the context."""
    if served.context is not None and len(ids) > served.context:
        message = f"This model's context is {served.context} tokens, but the prompt has {len(ids)}. Shorten it."
        raise ApiError(400, message, "prompt", "context_length_exceeded")


@dataclass
class _Answer:
    """The answer to a completion request, streamed or whole."""

    server: Server
    served: Served
    body: CompletionBody
    ids: list[list[int]]
    texts: list[str]
    rows: Rows | None = None
    scored: list[list[Token]] = field(default_factory=list)
    id: str = field(default_factory=lambda: f"cmpl-{uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def cancel(self) -> None:
        """Ends the rows that have not finished."""
        if self.rows is not None:
            self.rows.cancel()

    async def score_prompts(self) -> None:
        """Computes the log-probs of the prompts' tokens."""
        served, body = self.served, self.body
        for ids in self.ids:
            _check_context(served, ids)
        for ids in self.ids:
            pieces = prompt_logprobs(
                served.policy, served.adapter, ids, body.temperature, body.logprobs or 0, served.piece
            )
            tokens: list[Token] = []
            while piece := await served.worker.call(lambda pieces=pieces: next(pieces, None)):  # type: ignore[misc]
                tokens += piece
            self.scored.append(tokens)

    async def whole(self) -> dict[str, Any]:
        """The completions in one object."""
        count = len(self.ids) * self.body.n
        nothing = Completion([], [], "", "length")
        completions = [nothing] * count if self.rows is None else await self.rows.finish()
        self._finished(completions)
        choices = []
        for i, c in enumerate(completions):
            tokens = [*self._prompt_tokens(i), *tokens_of(c)]
            choices.append(self._choice(i, self._echo(i) + c.text, tokens, 0, c.finish_reason))
        return {**self._head, "choices": choices, "usage": self._usage(completions)}

    async def events(self) -> AsyncIterator[bytes]:
        """The completions in chunks."""
        count = len(self.ids) * self.body.n
        offsets = [len(self._echo(i)) for i in range(count)]
        held: list[list[Token]] = [[] for _ in range(count)]  # tokens whose text is not shown yet
        ended: dict[int, Completion] = {}
        for i in range(count if self.body.echo else 0):
            finish = None if self.rows else "length"
            yield self._chunk(i, self._echo(i), self._prompt_tokens(i), 0, finish)
        async for events in self.rows or _nothing():
            out = b""
            for found in events:
                i, text, finish = found.number, "", None
                if isinstance(found, End):
                    ended[i], finish = found.completion, found.completion.finish_reason
                else:
                    held[i].append(found.token)
                    text = found.token.text
                if text or finish:
                    out += self._chunk(i, text, held[i], offsets[i], finish)
                    offsets[i] += len(text)
                    held[i] = []
            if out:
                yield out
        completions = [ended[i] for i in sorted(ended)]
        self._finished(completions)
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield event({**self._head, "choices": [], "usage": self._usage(completions)})
        yield b"data: [DONE]\n\n"

    @property
    def _head(self) -> dict[str, Any]:
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.served.name}

    def _chunk(self, index: int, text: str, tokens: Sequence[Token], offset: int, finish: str | None) -> bytes:
        return event({**self._head, "choices": [self._choice(index, text, tokens, offset, finish)]})

    def _choice(
        self, index: int, text: str, tokens: Sequence[Token], offset: int, finish: str | None
    ) -> dict[str, Any]:
        wanted = self.body.logprobs
        found = None if wanted is None else completion_logprobs(self.served.tokenizer, tokens, wanted, text, offset)
        return {"index": index, "text": text, "logprobs": found, "finish_reason": finish}

    def _echo(self, index: int) -> str:
        return self.texts[index // self.body.n] if self.body.echo else ""

    def _prompt_tokens(self, index: int) -> list[Token]:
        return self.scored[index // self.body.n] if self.scored else []

    def _usage(self, completions: list[Completion]) -> dict[str, int]:
        return usage(sum(map(len, self.ids)), sum(len(c.input_ids) for c in completions))

    def _finished(self, completions: list[Completion]) -> None:
        self.server.metrics.answers(self.served.name, sum(map(len, self.ids)), completions)
        self.server.note(self.texts, [c.text for c in completions])


async def _nothing() -> AsyncIterator[list[Any]]:
    """The events of a request that generates nothing."""
    nothing: list[list[Any]] = []
    for events in nothing:
        yield events
