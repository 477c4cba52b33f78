"""How well scores agree with preferences, beside what length alone would say. P pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

#: Answers are of matched length when the longer one has at most this share of tokens more.
MATCHED = 0.1


class Calibration(NamedTuple):
    """How often the answer that was predicted to win did, by how sure the prediction was.

    Attributes:
        probability: (bins,) mean predicted probability of the predicted winner, from 0.5 to 1; NaN in empty bins.
        won: (bins,) share of these predictions that came true.
        pairs: (bins,) pairs.
    """

    probability: Tensor
    won: Tensor
    pairs: Tensor


def share_won(margin: Tensor) -> Tensor:
    """Share of pairs with a positive margin, ties counting half; NaN without pairs.

    Args:
        margin: (P,) of the better over the worse.

    Returns:
        A scalar in [0, 1].

    Example:
        >>> share_won(torch.tensor([2.0, -1.0, 0.0, 3.0]))
        tensor(0.6250)
    """
    return _won(margin).mean()


def _won(margin: Tensor) -> Tensor:
    """(P,) 1 where it is positive, 0.5 where it is zero, NaN where it is NaN: a model that diverged has not lost."""
    return torch.where(margin.isnan(), torch.nan, (margin > 0).float() + 0.5 * (margin == 0).float())


def calibration(margin: Tensor, bins: int = 10) -> Calibration:
    """Predicted against observed shares of won pairs.

    The model says the answer of higher score wins with probability ``sigmoid(|margin|)``; it does where ``margin > 0``.

    Args:
        margin: (P,) score of the better answer minus that of the worse.
        bins: Between probabilities 0.5 and 1.

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
    """Mean distance between predicted and observed shares, weighted by pairs (Naeini et al. 2015); NaN without pairs.

    Example:
        >>> calibration_error(torch.tensor([9.0, 9.0]))
        tensor(0.0001)
    """
    table = calibration(margin, bins)
    filled = table.pairs > 0
    return ((table.probability - table.won).abs() * table.pairs)[filled].sum() / table.pairs.sum()


class PreferenceAccuracy(Metric):
    """What a reward model gets right, kept pair by pair, so that no split or padding changes it.

    ``compute`` returns ``accuracy``, ``margin``, ``chosen_score``, ``rejected_score``, ``calibration_error``;
    ``length_accuracy``, that of "the longer answer wins"; ``matched_accuracy`` and ``matched_pairs``, on pairs whose
    lengths differ by at most a tenth; and ``accuracy/NAME`` for each name that :attr:`names` gives an origin.

    Attributes:
        names: For each number of an origin its names, such as its source and its language.

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

    def __init__(self) -> None:
        super().__init__()
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
        """Adds (P,) scores, lengths in tokens, and numbers of origins."""
        origin = torch.zeros_like(chosen_length) if origin is None else origin
        values = (chosen, rejected, chosen_length, rejected_length, origin)
        for name, value in zip(self.COLUMNS, values, strict=True):
            # one dtype: torchmetrics gathers fp32 from a rank that never updates
            getattr(self, name).append(value.detach().float())

    def compute(self) -> dict[str, Tensor]:
        """All of it, over all ranks; NaN where there are no pairs."""
        chosen, rejected, long, short, origin = self._columns()
        margin = chosen - rejected
        apart = {}
        for name in sorted({name for names in self.names for name in names}):
            numbers = torch.tensor([i for i, names in enumerate(self.names) if name in names], device=origin.device)
            apart[f"accuracy/{name}"] = share_won(margin[torch.isin(origin, numbers)])
        matched = (long - short).abs() <= MATCHED * torch.maximum(long, short)
        return {
            "accuracy": share_won(margin),
            "margin": margin.mean(),
            "chosen_score": chosen.mean(),
            "rejected_score": rejected.mean(),
            "calibration_error": calibration_error(margin),
            "length_accuracy": share_won(long - short),
            "matched_accuracy": share_won(margin[matched]),
            "matched_pairs": matched.sum().float(),
            **apart,
        }

    def calibration(self, bins: int = 10) -> Calibration:
        """:func:`calibration` of this process's pairs."""
        chosen, rejected, *_ = self._columns()
        return calibration(chosen - rejected, bins)

    def _columns(self) -> list[Tensor]:
        # after a sync the states are tensors already
        empty = torch.empty(0, device=self.device)
        columns = (getattr(self, name) for name in self.COLUMNS)
        return [torch.cat([empty, *v]) if isinstance(v, list) else v for v in columns]
