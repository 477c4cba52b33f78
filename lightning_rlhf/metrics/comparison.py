"""How often one model's answers are preferred to another's, judged in both orders. P pairs."""

from __future__ import annotations

from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class WinRates(NamedTuple):
    """What the verdicts on P pairs of answers, of A and of B, come to; all are scalars.

    A pair is won where A is preferred in both orders, lost where B is, and a tie else: also where the orders disagree
    (Zheng et al. 2023, sec. 3.4). Pairs without a verdict in one of the orders count nowhere but in ``no_verdict``.

    Attributes:
        win_rate: Wins and half the ties, over all judged pairs; NaN without any.
        low: Lower end of its confidence interval.
        high: Upper end.
        wins: Pairs.
        ties: Pairs.
        losses: Pairs.
        no_verdict: Pairs that a verdict lacks.
        first_place: Share of all verdicts that went to the answer shown first, ties counting half; 0.5 is no bias.
        agreement: Share of judged pairs whose orders agree.
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
    """Win rate of A over B, with an interval that takes prompts, not verdicts, for the independent draws.

    The interval is Wilson's (1927) with the variance of the prompts' scores in the place of ``rate (1 - rate)``, which
    it equals where each prompt has one pair and none is tied. Of m prompts, with z the normal quantile::

        (m rate + z^2 / 2 -+ z sqrt(m variance + z^2 / 4)) / (m + z^2)

    Args:
        a_first: (P,) verdicts where A's answer was shown first: 1 A won, 0.5 tie, 0 B won, NaN no verdict.
        b_first: (P,) verdicts where B's was, also from A's side.
        prompt: (P,) number of each pair's prompt; None, or a negative one: a prompt of its own.
        confidence: Of the interval.

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
    """Both ends; the rate is a ratio of sums over prompts, whose variance is that of its residuals."""
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
    """:func:`win_rate` over all updates and ranks; verdicts are kept, so that no split changes the result.

    ``compute`` returns the fields of :class:`WinRates` by name.

    Args:
        confidence: Of the interval.

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
            # one dtype: torchmetrics gathers fp32 from a rank that never updates
            getattr(self, name).append(value.detach().float())

    def compute(self) -> dict[str, Tensor]:
        """All of it, over all ranks."""
        empty = torch.empty(0, device=self.device)
        columns = (getattr(self, name) for name in self.COLUMNS)  # after a sync the states are tensors already
        a, b, prompt = (torch.cat([empty, *v]) if isinstance(v, list) else v for v in columns)
        return win_rate(a, b, prompt, self.confidence)._asdict()
