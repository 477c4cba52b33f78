"""Means over tokens. Sums and counts are kept, so the result does not depend on how tokens are batched."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


def token_mean(values: Tensor, weight: Tensor) -> Tensor:
    """Computes the weighted mean over tokens; NaN if the weights sum to 0.

    Args:
        values: (N,) one value per token.
        weight: (N,) weights.

    Returns:
        A scalar.

    Example:
        >>> token_mean(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0]))
        tensor(2.)
    """
    return (values * weight).sum() / weight.sum()


def perplexity(logprobs: Tensor, weight: Tensor) -> Tensor:
    """Computes ``exp`` of the mean negative log-prob per token.

    Args:
        logprobs: (N,) natural log-probs.
        weight: (N,) weights.

    Returns:
        A scalar, at least 1.

    Example:
        >>> perplexity(torch.log(torch.tensor([0.25, 0.25])), torch.ones(2))
        tensor(4.)
    """
    return token_mean(-logprobs, weight).exp()


class TokenMean(Metric):
    """:func:`token_mean` over all updates and ranks.

    Example:
        >>> metric = TokenMean()
        >>> metric.update(torch.tensor([1.0]), torch.tensor([3.0]))
        >>> metric.update(torch.tensor([5.0]), torch.tensor([1.0]))
        >>> metric.compute()
        tensor(2.)
    """

    full_state_update = False
    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, weight: Tensor) -> None:
        """Adds (N,) values with (N,) weights."""
        weight = weight.to(self.weight.dtype)  # a sum of 513 weights in bf16 would be 512
        # not in place, because a reset in trainer.validate leaves inference tensors, which fit cannot write to
        self.total = self.total + (values.detach().to(self.total.dtype) * weight).sum()
        self.weight = self.weight + weight.sum()

    def compute(self) -> Tensor:
        """Returns the mean over all updates and ranks, in fp32."""
        return (self.total / self.weight).float()


class Perplexity(TokenMean):
    """:func:`perplexity` over all updates and ranks. ``update`` takes (N,) log-probs and weights.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.log(torch.tensor([0.25, 0.25])), torch.ones(2))
        >>> metric.compute()
        tensor(4.)
    """

    def compute(self) -> Tensor:
        """Returns ``exp`` of the mean negative log-prob, in fp32."""
        return (-self.total / self.weight).exp().float()
