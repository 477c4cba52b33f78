"""Rollouts by a vLLM server that runs elsewhere."""

from lightning_rlhf.rollout.vllm.client import VLLMError
from lightning_rlhf.rollout.vllm.engine import VLLMEngine

__all__ = ["VLLMEngine", "VLLMError"]
