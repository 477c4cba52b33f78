"""The losses of PPO, token by token: means and weights are the caller's. N tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.functional.advantages import moments, variance
from lightning_rlhf.functional.precision import wide


class PolicyLoss(NamedTuple):
    """What :func:`policy_loss` finds.

    Attributes:
        loss: (N,) losses.
        ratio: (N,) how much likelier the policy makes a token than it did when it was sampled; no gradient.
        clipped: (N,) where the clip is what counts, so that a token has no gradient.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


class ValueLoss(NamedTuple):
    """What :func:`value_loss` finds.

    Attributes:
        loss: (N,) losses.
        clipped: (N,) where the clip is what counts, so that a value has no gradient.
    """

    loss: Tensor
    clipped: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> PolicyLoss:
    """``-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)`` (Schulman et al. 2017, eq. 7).

    The paper's range is even, 0.2 both ways; DAPO (Yu et al. 2025, sec. 3.1) has a wider upper one.

    Args:
        logprobs: (N,) of the sampled tokens, with their gradient.
        old_logprobs: (N,) when they were sampled.
        advantages: (N,) advantages.
        clip_low: How far the ratio may fall below 1.
        clip_high: How far it may rise above 1.

    Returns:
        Losses in at least fp32, ratios, and where they were clipped.

    Example:
        >>> found = policy_loss(torch.tensor([0.5, 0.0]), torch.zeros(2), torch.tensor([1.0, -2.0]), 0.2, 0.2)
        >>> found.loss, found.clipped
        (tensor([-1.2000,  2.0000]), tensor([ True, False]))
    """
    advantages = wide(advantages)
    ratio = torch.exp(wide(logprobs) - wide(old_logprobs))
    free = -ratio * advantages
    bound = -ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return PolicyLoss(torch.maximum(free, bound), ratio.detach(), bound > free)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> ValueLoss:
    """``0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)``: half the squared error.

    The clip is that of OpenAI's PPO code (Engstrom et al. 2020, sec. 3; Ziegler et al. 2019): a value that moved
    further than c is held by the worse of both errors.

    Args:
        values: (N,) with their gradient.
        old_values: (N,) when the tokens were sampled.
        returns: (N,) what values are trained towards.
        clip: How far values may move in an iteration; None leaves them free.

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
    """``1 - Var(R - V) / Var(R)``: 1 where values foretell returns but for a constant, 0 where they say nothing.

    Over ranks it is :func:`variance_explained` of the merged ``moments`` of ``R - V`` and of ``R``.

    Args:
        values: (N,) values.
        returns: (N,) returns.
        weight: (N,) how much each token counts; default 1.

    Returns:
        A number, negative where values mislead, NaN where all returns are equal.

    Example:
        >>> explained_variance(torch.tensor([1.0, 2.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))
        tensor(0.6667)
    """
    values, returns = wide(values), wide(returns)
    return variance_explained(moments(returns - values, weight), moments(returns, weight))


def variance_explained(left: Tensor, whole: Tensor) -> Tensor:
    """As :func:`explained_variance`, from moments.

    Args:
        left: (3,) of returns less values.
        whole: (3,) of returns.

    Returns:
        A number; NaN where all returns are equal.
    """
    spread = variance(whole)
    return torch.where(spread > 0, 1 - variance(left) / spread, torch.nan)
