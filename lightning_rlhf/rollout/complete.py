"""One completion per prompt, within the model's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

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
    by_limit: dict[int, list[int]] = {}
    for i, ids in enumerate(prompts):
        by_limit.setdefault(room(policy, ids, sampling.max_new_tokens), []).append(i)
    found: dict[int, Completion] = {}
    for limit, rows in by_limit.items():
        if limit < 1:
            raise ValueError(
                f"Prompt {rows[0]} has {len(prompts[rows[0]])} tokens and fills the model's context. Shorten it."
            )
        requests = [Request(prompts[i], [keys[i]]) for i in rows]
        limited = replace(sampling, max_new_tokens=limit)
        groups = engine.generate(policy, tokenizer, requests, limited, stop_token_ids)
        found |= {i: completion for i, [completion] in zip(rows, groups, strict=True)}
    return [found[i] for i in range(len(prompts))]
