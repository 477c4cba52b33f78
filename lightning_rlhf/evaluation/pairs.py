"""The win rate of judged pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch

from lightning_rlhf.metrics import WinRates, win_rate
from lightning_rlhf.rewards.judges import JudgedPair


def rates(judged: Sequence[JudgedPair], confidence: float = 0.95) -> WinRates:
    """Computes the win rate of A over B and related rates.

    Args:
        judged: Any number of judged pairs. Pairs with equal prompts count as one prompt in the interval.
        confidence: Confidence level of the interval. A larger value gives a wider interval.

    Returns:
        The rates; see :func:`~lightning_rlhf.metrics.win_rate`.
    """
    numbers: dict[str, int] = {}
    prompts = [numbers.setdefault(json.dumps(j.pair.prompt), len(numbers)) for j in judged]
    scores = torch.tensor([j.scores for j in judged], dtype=torch.float64).reshape(-1, 2)
    return win_rate(scores[:, 0], scores[:, 1], torch.tensor(prompts), confidence)
