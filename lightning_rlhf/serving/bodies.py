"""What the body of each route holds."""

from __future__ import annotations

from lightning_rlhf.serving.schema import Body, ChatBody, CoatiBody, CompletionBody, RewardBody
from lightning_rlhf.serving.vote_schema import UndoBody, VoteBody

BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/rewards": RewardBody,
    "/v1/votes": VoteBody,
    "/v1/votes/undo": UndoBody,
    "/generate": CoatiBody,
    "/generate/stream": CoatiBody,
}
