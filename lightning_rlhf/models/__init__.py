"""Models: loading, tree attention, the policy, the reward model."""

from lightning_rlhf.models.loading import Load, LoaderOptions, LoRA, load_causal_lm, load_reward_model, load_tokenizer
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.reward import RewardModel

__all__ = [
    "LoRA",
    "Load",
    "LoaderOptions",
    "Policy",
    "RewardModel",
    "load_causal_lm",
    "load_reward_model",
    "load_tokenizer",
]
