"""Rollouts: prompts and a policy in, completions with their log-probs out."""

from lightning_rlhf.rollout.cached import CachedEngine
from lightning_rlhf.rollout.generate import GenerateEngine
from lightning_rlhf.rollout.interface import Completion, Request, RolloutEngine, Sampling, as_answers, sample_key

__all__ = [
    "CachedEngine",
    "Completion",
    "GenerateEngine",
    "Request",
    "RolloutEngine",
    "Sampling",
    "as_answers",
    "sample_key",
]
