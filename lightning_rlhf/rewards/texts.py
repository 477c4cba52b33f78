"""Texts as samples, for rewards that score what no policy sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.formats import Message
from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.rewards.base import Reward, Samples
from lightning_rlhf.rewards.model import render


def score_texts(
    reward: Reward,
    prompts: Sequence[list[Message] | str],
    answers: Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    truncated: Sequence[bool] | None = None,
    columns: Sequence[Mapping[str, Any]] | None = None,
    device: torch.device | str | None = None,
) -> list[float]:
    """Scores answers to prompts.

    Args:
        reward: The reward.
        prompts: (S,) messages or plain texts.
        answers: (S,) texts.
        tokenizer: Tokenizes texts for rewards that read tokens. Python functions do not need it.
        truncated: (S,) whether a length limit cut the answer. Default: none was cut.
        columns: (S,) further columns of each prompt's row. Default: none.
        device: Device on which the reward works; after the call it is on the CPU. None: the reward is never moved.

    Returns:
        (S,) scores.

    Raises:
        BadScores: Some scores are not finite numbers.
        TokenizeError: The chat template refuses a conversation.
        ValueError: The reward cannot score an answer, or needs a column that the rows lack.
    """
    cut = list(truncated or [False] * len(answers))
    rows = columns or [{}] * len(answers)
    further = {name: [row.get(name) for row in rows] for name in sorted({name for row in rows for name in row})}
    # validation may run in inference mode, but weights moved in inference mode could not be moved back outside it
    with torch.inference_mode(False), torch.no_grad():
        reward.load()
        if device is not None:
            reward.to(device)
        try:
            if tokenizer is None:  # functions read texts only
                trees = [Tree([0], [Branch([0])]) for _ in answers]
            else:
                trees = render(tokenizer, prompts, answers, cut)
            weight = next(reward.parameters(), torch.empty(0))
            samples = Samples(pack(trees).to(weight.device), list(prompts), list(answers), cut, further)
            scores: list[float] = reward(samples).total.tolist()
            return scores
        finally:
            if device is not None:
                reward.to("cpu")
