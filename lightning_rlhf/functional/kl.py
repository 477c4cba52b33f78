"""Estimators of KL(policy || reference) from tokens that the policy sampled (Schulman 2020, "Approximating KL").

All take ``log_ratio = logp_policy - logp_reference`` of the sampled tokens. Public code often has the wrong sign: on
the policy's samples ``k3`` is ``exp(-log_ratio) - 1 + log_ratio``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_rlhf.functional.precision import wide


def k1(log_ratio: Tensor) -> Tensor:
    """Returns ``log_ratio``: unbiased, with a high variance, and negative if the reference prefers the token.

    Args:
        log_ratio: (N,) the policy's minus the reference's log-probs.

    Returns:
        (N,) estimates in nats, in at least fp32.
    """
    return wide(log_ratio)


def k2(log_ratio: Tensor) -> Tensor:
    """Returns ``log_ratio ** 2 / 2``: never negative, but biased. It equals the KL to second order in the log-ratio.

    On the policy's own samples its expected gradient is exactly the gradient of the KL.

    Args:
        log_ratio: (N,) the policy's minus the reference's log-probs.

    Returns:
        (N,) estimates in nats, in at least fp32.
    """
    return wide(log_ratio).square() / 2


def k3(log_ratio: Tensor) -> Tensor:
    """Returns ``exp(-log_ratio) - 1 + log_ratio``: unbiased, never negative, usually less noisy than :func:`k1`.

    It has no upper bound, and is infinite in fp32 below a log-ratio of -89: the token is likely under the reference,
    but almost impossible under the policy. The policy hardly ever samples such a token.

    Args:
        log_ratio: (N,) the policy's minus the reference's log-probs.

    Returns:
        (N,) estimates in nats, in at least fp32.

    Example:
        >>> k3(torch.tensor([0.0, 1.0, -1.0]))
        tensor([0.0000, 0.3679, 0.7183])
    """
    log_ratio = wide(log_ratio)
    return torch.expm1(-log_ratio) + log_ratio


def kl_loss(log_ratio: Tensor, estimator: Literal["k2", "k3"]) -> Tensor:
    """Computes a KL penalty for gradient descent.

    ``k2`` has the right gradient: on the policy's own samples its mean gradient is the gradient of
    KL(policy || reference). The mean gradient of ``k3`` is that of the reverse, KL(reference || policy). Both
    statements hold for the weights that sampled the tokens, and only approximately for later updates of an iteration.

    Args:
        log_ratio: (N,) the policy's log-probs, with gradient, minus the reference's.
        estimator: ``k2`` or ``k3``.

    Returns:
        (N,) losses in at least fp32.

    Raises:
        ValueError: ``estimator`` is unknown, or it is ``k1``, whose mean gradient is zero.
    """
    if estimator == "k2":
        return k2(log_ratio)
    if estimator == "k3":
        return k3(log_ratio)
    if estimator == "k1":
        raise ValueError(
            "k1 cannot be a loss: its gradient is the gradient of the log-prob, whose mean over the policy's samples "
            "is zero. Choose k2 or k3, or put k1 into the reward."
        )
    raise ValueError(f"KL estimator {estimator!r} is unknown. Choose k2 or k3.")
