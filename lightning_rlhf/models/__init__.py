"""Models: loading, tree attention, the policy."""

from lightning_rlhf.models.loading import LoRA, load_causal_lm, load_tokenizer
from lightning_rlhf.models.policy import Policy

__all__ = ["LoRA", "Policy", "load_causal_lm", "load_tokenizer"]
