"""Rollouts: a policy completes prompts and returns the completions with their log-probs."""

from lightning_rlhf.rollout.complete import complete, room
from lightning_rlhf.rollout.engine import CachedEngine
from lightning_rlhf.rollout.environment import Environment, Turn, TurnError
from lightning_rlhf.rollout.hf_generate import HFGenerateEngine
from lightning_rlhf.rollout.turns import play_episodes, read_openings
from lightning_rlhf.rollout.types import (
    Completion,
    Episode,
    RemoteEngine,
    Request,
    RolloutEngine,
    Sampling,
    Token,
    as_answers,
)
from lightning_rlhf.rollout.vllm import VLLMEngine, VLLMError
from lightning_rlhf.utils.random import sample_key

__all__ = [
    "CachedEngine",
    "Completion",
    "Environment",
    "Episode",
    "HFGenerateEngine",
    "RemoteEngine",
    "Request",
    "RolloutEngine",
    "Sampling",
    "Token",
    "Turn",
    "TurnError",
    "VLLMEngine",
    "VLLMError",
    "as_answers",
    "complete",
    "play_episodes",
    "read_openings",
    "room",
    "sample_key",
]
