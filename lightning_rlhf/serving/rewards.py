"""``POST /v1/rewards``: scores of conversations."""

from __future__ import annotations

from typing import Any, cast

from fastapi import APIRouter, Request
from starlette.responses import Response

from lightning_rlhf.data.formats import Message
from lightning_rlhf.serving.errors import ApiError, json_response
from lightning_rlhf.serving.schema import RewardBody, ScoredConversation
from lightning_rlhf.serving.server import Server
from lightning_rlhf.serving.sse import unless_left


def reward_routes(server: Server) -> APIRouter:
    """Makes the route."""
    router = APIRouter()

    @router.post("/v1/rewards")
    async def rewards(body: RewardBody, http: Request) -> Response:
        scorer = server.scorer
        if scorer is None:
            raise ApiError(400, "This server has no reward: start it with --reward.")
        if body.model not in (None, scorer.name):
            raise ApiError(404, f"There is no reward {body.model!r}; it is {scorer.name}.", "model", "model_not_found")
        prompts: list[list[Message] | str] = []
        answers: list[str] = []
        truncated: list[bool] = []
        for conversation in body.conversations:
            prompt, own = _parts(conversation)
            prompts += [prompt] * len(own)
            answers += own
            truncated += conversation.truncated or [False] * len(own)
        scores, tokens = await unless_left(http, scorer.score(prompts, answers, truncated))
        totals = scores.total.tolist()
        parts = {name: values.tolist() for name, values in scores.parts.items()}
        data: list[dict[str, Any]] = []
        start = 0
        for i, conversation in enumerate(body.conversations):
            end = start + len(conversation.answers or [""])
            found: dict[str, Any] = {"object": "reward", "index": i, "scores": totals[start:end]}
            if parts:
                found["parts"] = {name: values[start:end] for name, values in parts.items()}
            data.append(found)
            start = end
        used = {"prompt_tokens": tokens, "total_tokens": tokens}
        return json_response({"object": "list", "model": scorer.name, "data": data, "usage": used})

    return router


def _parts(conversation: ScoredConversation) -> tuple[list[Message] | str, list[str]]:
    """Returns a conversation's prompt and its answers."""
    if conversation.messages is not None:
        *before, last = [cast(Message, turn.message) for turn in conversation.messages]
        return before, [last["content"]]
    answers, prompt = list(conversation.answers or ()), conversation.prompt
    if isinstance(prompt, str):
        return prompt, answers
    return [cast(Message, turn.message) for turn in prompt or ()], answers
