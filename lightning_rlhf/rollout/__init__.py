"""Rollouts: a policy completes prompts and returns the completions with their log-probs."""

from lightning_rlhf.rollout.complete import complete, room
from lightning_rlhf.rollout.engine import CachedEngine
from lightning_rlhf.rollout.hf_generate import HFGenerateEngine
from lightning_rlhf.rollout.types import Completion, Request, RolloutEngine, Sampling, Token, as_answers
from lightning_rlhf.utils.random import sample_key

__all__ = [
    "CachedEngine",
    "Completion",
    "HFGenerateEngine",
    "Request",
    "RolloutEngine",
    "Sampling",
    "Token",
    "as_answers",
    "complete",
    "room",
    "sample_key",
]
