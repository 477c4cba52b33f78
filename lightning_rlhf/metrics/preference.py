"""Metrics of how well scores agree with preferences, and how well length alone would agree. P pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

#: The lengths of two answers match if they differ by at most this share of the longer one.
MATCHED = 0.1


class Calibration(NamedTuple):
    """How often predicted winners won, by the predicted probability.

    Attributes:
        probability: (bins,) mean predicted probability of the predicted winner, from 0.5 to 1; NaN in empty bins.
        won: (bins,) share of correct predictions.
        pairs: (bins,) number of pairs.
    """

    probability: Tensor
    won: Tensor
    pairs: Tensor


def share_won(margin: Tensor) -> Tensor:
    """Computes the share of pairs with a positive margin. A tie counts half; NaN without pairs.

    Args:
        margin: (P,) score of the better answer minus the score of the worse one.

    Returns:
        A scalar in [0, 1].

    Example:
        >>> share_won(torch.tensor([2.0, -1.0, 0.0, 3.0]))
        tensor(0.6250)
    """
    return _won(margin).mean()


def _won(margin: Tensor) -> Tensor:
    """Returns (P,) 1 for positive margins, 0.5 for zero, 0 for negative ones and NaN for NaN (a diverged model)."""
    return torch.where(margin.isnan(), torch.nan, (margin > 0).float() + 0.5 * (margin == 0).float())


def calibration(margin: Tensor, bins: int = 10) -> Calibration:
    """Compares predicted with observed shares of won pairs.

    The predicted winner is the answer with the higher score, with probability ``sigmoid(|margin|)``. The prediction is
    correct if ``margin > 0``.

    Args:
        margin: (P,) score of the better answer minus the score of the worse one.
        bins: Number of bins between the probabilities 0.5 and 1. A larger value gives a finer, noisier table.

    Returns:
        The table.

    Example:
        >>> calibration(torch.tensor([0.1, -0.1, 9.0]), bins=2).won
        tensor([0.5000, 1.0000])
    """
    probability = margin.abs().sigmoid()
    place = ((probability - 0.5) * 2 * bins).nan_to_num().long().clamp(0, bins - 1)
    count = torch.zeros(bins, device=margin.device).index_add_(0, place, torch.ones_like(probability))
    won = _won(margin)
    sums = torch.zeros(2, bins, device=margin.device).index_add_(1, place, torch.stack([probability, won]))
    return Calibration(sums[0] / count, sums[1] / count, count)


def calibration_error(margin: Tensor, bins: int = 10) -> Tensor:
    """Computes the mean distance between predicted and observed shares, weighted by pairs; NaN without pairs.

    This is the expected calibration error of Naeini et al. 2015.

    Example:
        >>> calibration_error(torch.tensor([9.0, 9.0]))
        tensor(0.0001)
    """
    table = calibration(margin, bins)
    filled = table.pairs > 0
    return ((table.probability - table.won).abs() * table.pairs)[filled].sum() / table.pairs.sum()


class AnswerMeans(Metric):
    """Means over answers that are labeled good or bad, over all updates and ranks.

    ``compute`` returns ``chosen_reward`` and ``rejected_reward`` (of good and of bad answers), ``margin``, their
    difference, ``chosen_logprob`` and ``rejected_logprob``; NaN without such answers.

    Example:
        >>> metric = AnswerMeans()
        >>> rewards, logprobs = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([-3.0, -4.0, -5.0])
        >>> metric.update(rewards, logprobs, torch.tensor([True, False, False]))
        >>> metric.compute()["margin"]
        tensor(1.5000)
    """

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(2, 3, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, reward: Tensor, logprob: Tensor, good: Tensor) -> None:
        """Adds (L,) implicit rewards and summed log-probs, and (L,) whether each answer is good."""
        values = torch.stack([reward, logprob, torch.ones_like(reward)]).detach().to(self.sums.dtype)
        sides = torch.stack([good, ~good]).to(self.sums.dtype)
        self.sums = self.sums + sides @ values.T  # not in place, as in TokenMean

    def compute(self) -> dict[str, Tensor]:
        """Returns the means over all updates and ranks, in fp32."""
        means = (self.sums[:, :2] / self.sums[:, 2:]).float()
        (chosen, chosen_logprob), (rejected, rejected_logprob) = means
        return {
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "margin": chosen - rejected,
            "chosen_logprob": chosen_logprob,
            "rejected_logprob": rejected_logprob,
        }


class PreferenceAccuracy(Metric):
    """Accuracy of a reward model. All pairs are kept, so the result does not depend on batches or padding.

    ``compute`` returns ``accuracy``, ``margin``, ``chosen_score``, ``rejected_score``, ``calibration_error``;
    ``length_accuracy``, the accuracy of the rule "the longer answer wins"; ``matched_accuracy`` and ``matched_pairs``
    of pairs whose lengths differ by at most a tenth; and ``accuracy/NAME`` for each name in :attr:`names`.

    Args:
        what: What scores are called in the result: ``score``, or ``reward`` for implicit rewards.

    Attributes:
        names: Names of each origin, in the order of the origins' numbers, such as a source and a language.

    Example:
        >>> metric = PreferenceAccuracy()
        >>> metric.update(torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([5]), torch.tensor([9]))
        >>> result = metric.compute()
        >>> result["accuracy"], result["length_accuracy"]
        (tensor(1.), tensor(0.))
    """

    full_state_update = False
    chosen: list[Tensor]
    rejected: list[Tensor]
    chosen_length: list[Tensor]
    rejected_length: list[Tensor]
    origin: list[Tensor]
    COLUMNS = ("chosen", "rejected", "chosen_length", "rejected_length", "origin")

    def __init__(self, what: str = "score") -> None:
        super().__init__()
        self.what = what
        self.names: Sequence[Sequence[str]] = ()
        for name in self.COLUMNS:
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(
        self,
        chosen: Tensor,
        rejected: Tensor,
        chosen_length: Tensor,
        rejected_length: Tensor,
        origin: Tensor | None = None,
    ) -> None:
        """Adds (P,) scores, lengths in tokens, and the numbers of the pairs' origins."""
        origin = torch.zeros_like(chosen_length) if origin is None else origin
        values = (chosen, rejected, chosen_length, rejected_length, origin)
        for name, value in zip(self.COLUMNS, values, strict=True):
            # always fp32, because torchmetrics gathers fp32 from a rank without updates
            getattr(self, name).append(value.detach().float())

    def compute(self) -> dict[str, Tensor]:
        """Returns all metrics, over all ranks; NaN without pairs."""
        chosen, rejected, long, short, origin = self._columns()
        margin = chosen - rejected
        by_name = {}
        for name in sorted({name for names in self.names for name in names}):
            numbers = torch.tensor([i for i, names in enumerate(self.names) if name in names], device=origin.device)
            by_name[f"accuracy/{name}"] = share_won(margin[torch.isin(origin, numbers)])
        matched = (long - short).abs() <= MATCHED * torch.maximum(long, short)
        return {
            "accuracy": share_won(margin),
            "margin": margin.mean(),
            f"chosen_{self.what}": chosen.mean(),
            f"rejected_{self.what}": rejected.mean(),
            "calibration_error": calibration_error(margin),
            "length_accuracy": share_won(long - short),
            "matched_accuracy": share_won(margin[matched]),
            "matched_pairs": matched.sum().float(),
            **by_name,
        }

    def calibration(self, bins: int = 10) -> Calibration:
        """Returns the :func:`calibration` of this process's pairs."""
        chosen, rejected, *_ = self._columns()
        return calibration(chosen - rejected, bins)

    def _columns(self) -> list[Tensor]:
        # after a sync the states are tensors, not lists
        empty = torch.empty(0, device=self.device)
        columns = (getattr(self, name) for name in self.COLUMNS)
        return [torch.cat([empty, *v]) if isinstance(v, list) else v for v in columns]
