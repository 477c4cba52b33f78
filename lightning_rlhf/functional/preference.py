"""Losses over pairs of a better and a worse completion. P pairs."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_rlhf.functional.precision import wide


def bradley_terry_loss(better: Tensor, worse: Tensor, margin: Tensor | float = 0.0) -> Tensor:
    """``-log sigmoid(better - worse - margin)``: a pair's negative log-likelihood (Bradley and Terry 1952).

    What ColossalChat calls the log-sig and the log-exp loss is this one function, here finite at any difference. With
    all pairs of a ranking of K answers it is InstructGPT's equation 1; a margin is Llama 2's, equation 2.

    Args:
        better: (P,) scores of the better completions.
        worse: (P,) scores of the worse ones.
        margin: By how much the better should win; (P,) or one for all.

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
    """``(better + worse) ** 2``: holds scores near zero, which pairs alone leave free (Eisenstein et al. 2023, sec. 4).

    Args:
        better: (P,) scores of the better completions.
        worse: (P,) scores of the worse ones.

    Returns:
        (P,) penalties, in at least fp32.
    """
    return (wide(better) + wide(worse)) ** 2
