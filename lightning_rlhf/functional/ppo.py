"""The losses of PPO for each of N tokens. The caller applies weights and takes the mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.functional.advantages import moments, variance
from lightning_rlhf.functional.precision import wide

#: Log-ratios beyond this are taken for it where the loss is clipped anyway: their ratios are no numbers of fp32.
LOG_RATIO = 80.0


class PolicyLoss(NamedTuple):
    """Result of :func:`policy_loss`.

    Attributes:
        loss: (N,) losses.
        ratio: (N,) probability of the token under the policy, divided by its probability when it was sampled; no
            gradient.
        clipped: (N,) whether the loss is clipped, so that the token has no gradient.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


class ValueLoss(NamedTuple):
    """Result of :func:`value_loss`.

    Attributes:
        loss: (N,) losses.
        clipped: (N,) whether the loss is clipped, so that the value has no gradient.
    """

    loss: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> PolicyLoss:
    """Computes ``-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)`` (Schulman et al. 2017, eq. 7).

    The paper uses 0.2 for both ranges. DAPO (Yu et al. 2025, sec. 3.1) uses a larger ``clip_high``. A token with a
    negative advantage has a loss without bound if its ratio rises; ``dual_clip`` bounds it (Ye et al. 2020, eq. 5).

    Args:
        logprobs: (N,) log-probs of the sampled tokens, with gradient.
        old_logprobs: (N,) their log-probs when they were sampled.
        advantages: (N,) advantages.
        clip_low: Range of the ratio below 1. A larger value allows larger updates.
        clip_high: Range of the ratio above 1. A larger value allows larger updates.
        dual_clip: The ratio counts as at most this where the advantage is negative. Default: no such bound.

    Returns:
        Losses in at least fp32, ratios, and where they were clipped.

    Example:
        >>> found = policy_loss(torch.tensor([0.5, 0.0]), torch.zeros(2), torch.tensor([1.0, -2.0]), 0.2, 0.2)
        >>> found.loss, found.clipped
        (tensor([-1.2000,  2.0000]), tensor([ True, False]))
    """
    advantages = wide(advantages)
    log_ratio = wide(logprobs) - wide(old_logprobs)
    # where the loss is clipped or 0 it has no gradient, and exp of a larger one is inf, whose gradient would be NaN
    bounded = advantages >= 0 if dual_clip is None else torch.ones_like(advantages, dtype=torch.bool)
    ratio = torch.exp(torch.where(bounded, log_ratio.clamp(max=LOG_RATIO), log_ratio))
    free = -ratio * advantages
    bound = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss, clipped = torch.maximum(free, bound), bound > free
    if dual_clip is not None:
        most = -dual_clip * advantages
        far = (advantages < 0) & (loss > most)
        loss, clipped = torch.where(far, most, loss), clipped | far
    return PolicyLoss(loss, ratio.detach(), clipped)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> ValueLoss:
    """Computes ``0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)``: half the squared error, clipped.

    OpenAI's PPO code clips in this way (Engstrom et al. 2020, sec. 3; Ziegler et al. 2019): for a value that moved
    further than c, the larger of both errors counts.

    Args:
        values: (N,) values, with gradient.
        old_values: (N,) values when the tokens were sampled.
        returns: (N,) targets of the values.
        clip: Range c in which values may move per iteration. A larger value allows larger updates. None: no clipping.

    Returns:
        Losses in at least fp32, and where they were clipped.

    Example:
        >>> value_loss(torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([2.0, -1.0]), clip=0.5)
        ValueLoss(loss=tensor([1.1250, 2.0000]), clipped=tensor([ True, False]))
    """
    values, old_values, returns = wide(values), wide(old_values), wide(returns)
    free = (values - returns).square() / 2
    if clip is None:
        return ValueLoss(free, torch.zeros_like(free, dtype=torch.bool))
    bound = (torch.clamp(values, old_values - clip, old_values + clip) - returns).square() / 2
    return ValueLoss(torch.maximum(free, bound), bound > free)


def explained_variance(values: Tensor, returns: Tensor, weight: Tensor | None = None) -> Tensor:
    """Computes ``1 - Var(R - V) / Var(R)``: 1 if values predict returns up to a constant, 0 if they predict nothing.

    Over several ranks, use :func:`variance_explained` with the merged ``moments`` of ``R - V`` and of ``R``.

    Args:
        values: (N,) values.
        returns: (N,) returns.
        weight: (N,) weight of each token. Default: 1.

    Returns:
        A scalar. It is negative if values are worse than a constant, and NaN if all returns are equal.

    Example:
        >>> explained_variance(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor(0.6667)
    """
    values, returns = wide(values), wide(returns)
    return variance_explained(moments(returns - values, weight), moments(returns, weight))


def variance_explained(residuals: Tensor, returns: Tensor) -> Tensor:
    """Computes :func:`explained_variance` from moments.

    Args:
        residuals: (3,) moments of returns minus values.
        returns: (3,) moments of returns.

    Returns:
        A scalar; NaN if all returns are equal.
    """
    spread = variance(returns)
    return torch.where(spread > 0, 1 - variance(residuals) / spread, torch.nan)
