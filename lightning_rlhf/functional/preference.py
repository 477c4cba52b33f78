"""Losses for P pairs of a better and a worse completion."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.functional.precision import wide


def bradley_terry_loss(better: Tensor, worse: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """Computes ``-log sigmoid(better - worse - margin)``, a pair's negative log-likelihood (Bradley and Terry 1952).

    ColossalChat's log-sig and log-exp losses are both this function; here it is finite for any difference. For all
    pairs of a ranking of K answers it is equation 1 of InstructGPT. The margin is that of Llama 2, equation 2.

    Args:
        better: (P,) scores of the better completions.
        worse: (P,) scores of the worse ones.
        margin: (P,) or a scalar: the difference to reach. A larger value separates scores further.

    Returns:
        (P,) losses, in nats, in at least fp32.

    Example:
        >>> import torch
        >>> bradley_terry_loss(torch.tensor([0.0, -500.0]), torch.zeros(2))
        tensor([  0.6931, 500.0000])
    """
    return -F.logsigmoid(wide(better) - wide(worse) - margin)


#: ColossalChat's names for the same loss.
log_sig_loss = bradley_terry_loss
log_exp_loss = bradley_terry_loss


def centering_penalty(better: Tensor, worse: Tensor) -> Tensor:
    """Computes ``(better + worse) ** 2``, which keeps scores near zero (Eisenstein et al. 2023, sec. 4).

    Pairs alone only determine differences of scores.

    Args:
        better: (P,) scores of the better completions.
        worse: (P,) scores of the worse ones.

    Returns:
        (P,) penalties, in at least fp32.
    """
    return (wide(better) + wide(worse)) ** 2
