"""Losses for single answers that are known to be good or bad."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_rlhf.functional.precision import wide


def kto_loss(
    ratio: Tensor,
    desirable: Tensor,
    reference_point: Tensor | float,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO (arXiv 2402.01306, eq. 7 and 8).

    Args:
        ratio: (S,) log-probs of the answers, policy minus reference, summed over tokens.
        desirable: (S,) bool: whether an answer is good.
        reference_point: ``z0`` of :func:`kto_reference_point`, without gradient.
        beta: How sharply an answer's value saturates. A larger value keeps the policy closer to the reference.
        desirable_weight: Weight of good answers. The paper advises weights that make up for unequal numbers.
        undesirable_weight: Weight of bad answers.

    Returns:
        (S,) losses.
    """
    x = beta * (wide(ratio) - reference_point)
    good, bad = desirable_weight * torch.sigmoid(-x), undesirable_weight * torch.sigmoid(x)
    return torch.where(desirable, good, bad)


def kto_reference_point(total: Tensor, count: Tensor | float) -> Tensor:
    """KTO's ``z0``: the mean log-ratio of mismatched answers, an estimate of the KL, at least 0, without gradient.

    A mismatched answer belongs to another prompt.

    Args:
        total: Sum of the mismatched answers' log-ratios, over all ranks.
        count: Their number, over all ranks. With 0, the point is 0.

    Returns:
        The scalar ``z0``.
    """
    total = total.detach()
    return (total / torch.as_tensor(count, dtype=total.dtype, device=total.device).clamp(min=1)).clamp(min=0)


def apo_zero_unpaired_loss(
    ratio: Tensor,
    desirable: Tensor,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """APO-zero for single answers (arXiv 2408.06266, eq. 7): good ones up, bad ones down, without a reference point.

    Args:
        ratio: (S,) log-probs of the answers, policy minus reference, summed over tokens.
        desirable: (S,) bool: whether an answer is good.
        beta: See :func:`kto_loss`.
        desirable_weight: See :func:`kto_loss`.
        undesirable_weight: See :func:`kto_loss`.

    Returns:
        (S,) losses.
    """
    return kto_loss(ratio, desirable, 0.0, beta, desirable_weight, undesirable_weight)
