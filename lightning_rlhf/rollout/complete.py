"""One completion per prompt, within the model's context."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.models.backbone import Backbone
from lightning_rlhf.rollout.types import Completion, Request, RolloutEngine, Sampling


def room(policy: Backbone, prompt: Sequence[int], most: int) -> int:
    """Returns the number of tokens that the model's context leaves for an answer, but at most ``most``."""
    context = getattr(policy.transformer.config.get_text_config(), "max_position_embeddings", None)
    return most if context is None else min(most, context - len(prompt))


def complete(
    engine: RolloutEngine,
    policy: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    sampling: Sampling,
    stop_token_ids: Sequence[int],
) -> list[Completion]:
    """Completes each prompt once. A completion ends at the latest at the end of the model's context.

    Args:
        engine: The rollout engine.
        policy: A backbone whose model can generate.
        tokenizer: The model's tokenizer.
        prompts: Token ids of each prompt. Each prompt must leave room for at least one token.
        keys: Seed of each completion; see :class:`~lightning_rlhf.rollout.Request`.
        sampling: Sampling settings.
        stop_token_ids: Tokens that end a completion.

    Returns:
        One completion per prompt, in order.

    Raises:
        ValueError: A prompt fills the context.
    """
    limits = [room(policy, ids, sampling.max_new_tokens) for ids in prompts]
    if (full := next((i for i, limit in enumerate(limits) if limit < 1), None)) is not None:
        raise ValueError(f"Prompt {full} has {len(prompts[full])} tokens and fills the model's context. Shorten it.")
    rows = zip(prompts, keys, limits, strict=True)
    requests = [Request(ids, [key], max_new_tokens=limit) for ids, key, limit in rows]
    return [found for (found,) in engine.generate(policy, tokenizer, requests, sampling, stop_token_ids)]
