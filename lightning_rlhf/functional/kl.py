"""Estimates of KL(policy || reference) from tokens that the policy sampled (Schulman 2020, "Approximating KL").

All take ``log_ratio = logp_policy - logp_reference`` of the sampled tokens. The sign is what public code gets wrong: on
the policy's samples ``k3`` is ``exp(-log_ratio) - 1 + log_ratio``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_rlhf.functional.precision import wide


def k1(log_ratio: Tensor) -> Tensor:
    """``log_ratio``: unbiased, of high variance, negative where the reference likes a token better.

    Args:
        log_ratio: (N,) policy's minus reference's log-probs.

    Returns:
        (N,) estimates in nats, in at least fp32.
    """
    return wide(log_ratio)


def k2(log_ratio: Tensor) -> Tensor:
    """``log_ratio ** 2 / 2``: never negative, biased; it agrees with the KL to second order in their distance.

    On the policy's own samples its expected gradient is exactly the KL's.

    Args:
        log_ratio: (N,) policy's minus reference's log-probs.

    Returns:
        (N,) estimates in nats, in at least fp32.
    """
    return wide(log_ratio).square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """``exp(-log_ratio) - 1 + log_ratio``: unbiased, never negative, mostly of lower variance than :func:`k1`.

    It grows without bound, to infinity in fp32 at a log-ratio of -89, where the policy gives a token next to nothing
    that the reference finds likely; the policy hardly ever samples such a token.

    Args:
        log_ratio: (N,) policy's minus reference's log-probs.

    Returns:
        (N,) estimates in nats, in at least fp32.

    Example:
        >>> k3(torch.tensor([0.0, 1.0, -1.0]))
        tensor([0.0000, 0.3679, 0.7183])
    """
    log_ratio = wide(log_ratio)
    return torch.expm1(-log_ratio) + log_ratio


def kl_loss(log_ratio: Tensor, estimator: Literal["k2", "k3"]) -> Tensor:
    """A KL penalty to differentiate.

    ``k2`` is the one whose gradient is right: on the policy's own samples its mean is the gradient of
    KL(policy || reference). ``k3``'s is that of KL(reference || policy), the reverse. Both hold where each sample is
    used by the weights that drew it; later updates of an iteration are off by the change since.

    Args:
        log_ratio: (N,) policy's log-probs, with their gradient, minus the reference's.
        estimator: ``k2`` or ``k3``.

    Returns:
        (N,) losses in at least fp32.

    Raises:
        ValueError: ``k1``, which teaches nothing as a loss, or an unknown name.
    """
    if estimator == "k2":
        return k2(log_ratio)
    if estimator == "k3":
        return k3(log_ratio)
    if estimator == "k1":
        raise ValueError(
            "k1 can't be a loss: its gradient is that of the log-prob alone, whose mean over the policy's samples is "
            "zero. Choose k2 or k3, or put k1 into the reward."
        )
    raise ValueError(f"KL estimator {estimator!r} is unknown. Choose k2 or k3.")
