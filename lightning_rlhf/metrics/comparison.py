"""Win rates: how often a judge prefers one model's answers to another's, in both orders. P pairs."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class WinRates(NamedTuple):
    """Rates over P pairs of answers by A and B. All fields are scalars.

    A wins a pair if it is preferred in both orders, and loses if B is preferred in both. Otherwise the pair is a tie,
    also if the orders disagree (Zheng et al. 2023, sec. 3.4). A pair without a verdict in one of the orders counts in
    ``no_verdict`` only.

    Attributes:
        win_rate: Wins plus half the ties, divided by the number of judged pairs; NaN without judged pairs.
        low: Lower bound of the win rate's confidence interval.
        high: Upper bound.
        wins: Number of pairs that A won.
        ties: Number of tied pairs.
        losses: Number of pairs that B won.
        no_verdict: Number of pairs without a verdict in one of the orders.
        first_place: Share of all verdicts that prefer the answer shown first; a tie counts half. 0.5 is no bias.
        agreement: Share of judged pairs with the same verdict in both orders.
    """

    win_rate: Tensor
    low: Tensor
    high: Tensor
    wins: Tensor
    ties: Tensor
    losses: Tensor
    no_verdict: Tensor
    first_place: Tensor
    agreement: Tensor


def win_rate(a_first: Tensor, b_first: Tensor, prompt: Tensor | None = None, confidence: float = 0.95) -> WinRates:
    """Computes the win rate of A over B, with an interval in which prompts, not verdicts, are independent samples.

    The interval is Wilson's (1927), with the variance of the prompts' scores instead of ``rate (1 - rate)``. Both are
    equal if each prompt has one pair and no pair is tied. For m prompts and the normal quantile z::

        (m rate + z^2 / 2 -+ z sqrt(m variance + z^2 / 4)) / (m + z^2)

    Args:
        a_first: (P,) verdicts with A's answer shown first: 1 A won, 0.5 tie, 0 B won, NaN no verdict.
        b_first: (P,) verdicts with B's answer shown first, also as scores of A.
        prompt: (P,) number of each pair's prompt. None or a negative number: the pair has a prompt of its own.
        confidence: Confidence level of the interval. A larger value gives a wider interval.

    Returns:
        The rates.

    Example:
        >>> rates = win_rate(torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0]))
        >>> rates.win_rate, rates.ties, rates.first_place
        (tensor(0.6250), tensor(1.), tensor(0.6250))
    """
    a, b = a_first.double(), b_first.double()
    shown_first = torch.cat([a, 1 - b])
    judged = ~(a.isnan() | b.isnan())
    scores = torch.where(a == b, a, 0.5)[judged]
    numbers = -torch.ones_like(a) if prompt is None else prompt.to(a)
    alone = -1 - torch.arange(len(a), dtype=a.dtype, device=a.device)
    low, high = _interval(scores, torch.where(numbers < 0, alone, numbers)[judged], confidence)
    found = (
        scores.mean(),
        low,
        high,
        (scores == 1).sum(),
        (scores == 0.5).sum(),
        (scores == 0).sum(),
        (~judged).sum(),
        shown_first.nanmean(),
        (a == b)[judged].double().mean(),
    )
    return WinRates(*(value.float() for value in found))


def _interval(scores: Tensor, prompt: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Returns both bounds. The rate is a ratio of sums over prompts; its variance is the residuals' variance."""
    _, place = prompt.unique(return_inverse=True)
    pairs = torch.bincount(place).to(scores)
    m, rate = len(pairs), scores.mean()
    residuals = torch.zeros_like(pairs).index_add_(0, place, scores) - rate * pairs
    variance = (residuals / pairs.mean()).square().mean()
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    half = z * (m * variance + z**2 / 4).sqrt()
    ends = ((m * rate + z**2 / 2 + side) / (m + z**2) for side in (-half, half))
    low, high = (end.clamp(0, 1) for end in ends)
    return low, high


class WinRate(Metric):
    """:func:`win_rate` over all updates and ranks. All verdicts are kept, so the result does not depend on batches.

    ``compute`` returns the fields of :class:`WinRates` by name.

    Args:
        confidence: Confidence level of the interval. A larger value gives a wider interval.

    Example:
        >>> metric = WinRate()
        >>> metric.update(torch.tensor([1.0]), torch.tensor([1.0]))
        >>> metric.update(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]))
        >>> metric.compute()["win_rate"]
        tensor(0.5000)
    """

    full_state_update = False
    a_first: list[Tensor]
    b_first: list[Tensor]
    prompt: list[Tensor]
    COLUMNS = ("a_first", "b_first", "prompt")

    def __init__(self, confidence: float = 0.95) -> None:
        super().__init__()
        self.confidence = confidence
        for name in self.COLUMNS:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, a_first: Tensor, b_first: Tensor, prompt: Tensor | None = None) -> None:
        """Adds (P,) verdicts in both orders, and numbers of prompts (below 2**24, the same on all ranks)."""
        prompt = -torch.ones_like(a_first) if prompt is None else prompt
        for name, value in zip(self.COLUMNS, (a_first, b_first, prompt), strict=True):
            # always fp32, because torchmetrics gathers fp32 from a rank without updates
            getattr(self, name).append(value.detach().float())

    def compute(self) -> dict[str, Tensor]:
        """Returns all rates, over all ranks."""
        empty = torch.empty(0, device=self.device)
        columns = (getattr(self, name) for name in self.COLUMNS)  # after a sync the states are tensors, not lists
        a, b, prompt = (torch.cat([empty, *v]) if isinstance(v, list) else v for v in columns)
        return win_rate(a, b, prompt, self.confidence)._asdict()
