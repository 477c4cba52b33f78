"""From scores to advantages, on packed tokens: rewards, GAE, whitening, and what adapts between iterations.

N tokens lie in one row; ``sequence (N,)`` says whose each is, in rising order: a sequence's tokens are neighbors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_rlhf.functional.precision import wide


class Advantages(NamedTuple):
    """What :func:`gae` finds.

    Attributes:
        advantages: (N,) how much better a token was than the values said, not whitened.
        returns: (N,) ``advantages + values``: what values are trained towards.
    """

    advantages: Tensor
    returns: Tensor


def token_rewards(kl_penalty: Tensor, scores: Tensor, sequence: Tensor) -> Tensor:
    """A token's reward: minus its KL penalty, and on a sequence's last token alone, plus the score.

    Ziegler et al. 2019, eq. 2, token by token (Stiennon et al. 2020; Ouyang et al. 2022, eq. 2).

    Args:
        kl_penalty: (N,) ``kl_coef * k1``: a cost, which is subtracted; zeros where the KL is a loss.
        scores: (S,) of whole completions.
        sequence: (N,) each token's sequence, sorted.

    Returns:
        (N,) rewards in at least fp32.

    Raises:
        ValueError: A sequence without tokens, whose score would be lost, tokens that are not sorted, or tensors of
            other shapes, such as (B, T).

    Example:
        >>> token_rewards(torch.tensor([0.5, 0.0, 0.25]), torch.tensor([2.0, -1.0]), torch.tensor([0, 0, 1]))
        tensor([-0.5000,  2.0000, -1.2500])
    """
    _check_packed(sequence, scores, kl_penalty=kl_penalty)
    rewards = -wide(kl_penalty)
    scores = scores.to(rewards.dtype)
    return rewards.index_add(0, _last_tokens(sequence, len(scores)), scores)


def gae(rewards: Tensor, values: Tensor, last_values: Tensor, sequence: Tensor, gamma: float, lam: float) -> Advantages:
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16).

        delta_t = r_t + gamma V_(t+1) - V_t
        A_t     = delta_t + gamma lam A_(t+1)

    The sums over a sequence's rest double their reach in each of log2(N) rounds, so no loop runs over tokens, and no
    sequence hears of its neighbors.

    Args:
        rewards: (N,) rewards.
        values: (N,) value of the state that each token was chosen in: at the position that predicts it.
        last_values: (S,) value behind the last token: 0 where the completion ended by itself.
        sequence: (N,) each token's sequence, sorted.
        gamma: Discount; 1 is usual for completions.
        lam: Weight of later evidence: 0 trusts values, 1 trusts rewards.

    Returns:
        Advantages and returns, in at least fp32.

    Raises:
        ValueError: A sequence without tokens, tokens that are not sorted, or tensors of other shapes, such as (B, T).

    Example:
        >>> gae(
        ...     torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.5]), torch.zeros(1),
        ...     torch.tensor([0, 0, 0]), gamma=1.0, lam=0.5,
        ... ).advantages
        tensor([0.1250, 0.2500, 0.5000])
    """
    _check_packed(sequence, last_values, rewards=rewards, values=values)
    rewards, values = wide(rewards), wide(values)
    last = _last_tokens(sequence, len(last_values))
    after = values.roll(-1).index_copy(0, last, last_values.to(values.dtype))
    advantages = rewards + gamma * after - values
    reach, decay = 1, gamma * lam
    while reach < len(sequence):
        # advantages[t] holds delta_t ... delta_(t + reach - 1), or up to the sequence's end
        same = sequence[:-reach] == sequence[reach:]
        advantages = advantages + pad(torch.where(same, decay * advantages[reach:], 0), (0, reach))
        reach, decay = 2 * reach, decay * decay
    return Advantages(advantages, advantages + values)


def _check_packed(sequence: Tensor, by_sequence: Tensor, **by_token: Tensor) -> None:
    """Refuses padded rectangles, which would be taken for something else."""
    for name, tensor in by_token.items():
        if tensor.ndim != 1 or tensor.shape != sequence.shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)} and sequence {tuple(sequence.shape)}: both must be (N,), "
                "the tokens of all sequences in one row, without padding. Of (B, T) tensors with a mask of what is no "
                f"padding, give {name}[mask] and sequence=mask.nonzero()[:, 0]."
            )
    if by_sequence.ndim != 1:
        raise ValueError(f"Scores and last values must be (S,), one a sequence; got {tuple(by_sequence.shape)}.")


def _last_tokens(sequence: Tensor, sequences: int) -> Tensor:
    """(S,) index of each sequence's last token."""
    numbers = torch.arange(sequences, device=sequence.device)
    first, end = (torch.searchsorted(sequence, numbers, right=right) for right in (False, True))
    if (first == end).any() or (sequence[1:] < sequence[:-1]).any() or (end - first).sum() != len(sequence):
        raise ValueError(
            f"sequence must number the {sequences} sequences of the batch from 0, each with a token, in rising order; "
            f"got {sequence.tolist()[:20]}{' ...' if len(sequence) > 20 else ''}"
        )
    return end - 1


# ------------------------------------------------------------------------------------------------- whitening


def moments(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Count, mean and sum of squared deviations from it, in two passes: no large squares are subtracted.

    Those of all ranks, gathered, become the whole's by :func:`merge_moments`: one small collective, and exact.

    Args:
        values: Any shape.
        weight: How much each of them counts, 0 for what fills up a batch, which may then be no number; default 1.

    Returns:
        (3,) in at least fp32; zeros where nothing counts.
    """
    values = wide(values)
    weight = torch.ones_like(values) if weight is None else weight.to(values.dtype)
    values = torch.where(weight > 0, values, 0.0)
    count = weight.sum()
    mean = (weight * values).sum() / count.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.stack([count, mean, (weight * (values - mean).square()).sum()])


def merge_moments(parts: Tensor) -> Tensor:
    """The moments of several sets together (Chan, Golub and LeVeque 1983).

    Args:
        parts: (R, 3) each row by :func:`moments`.

    Returns:
        (3,) of their union.

    Example:
        >>> merge_moments(torch.stack([moments(torch.tensor([1.0, 2.0])), moments(torch.tensor([6.0]))]))
        tensor([ 3.,  3., 14.])
    """
    count, mean, squares = parts.reshape(-1, 3).unbind(1)
    total = count.sum()
    joint = (count * mean).sum() / total.clamp(min=torch.finfo(parts.dtype).tiny)
    return torch.stack([total, joint, (squares + count * (mean - joint).square()).sum()])


def variance(whole: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The population's variance of what has these moments: squares over the count, not the count less one.

    Args:
        whole: (3,) by :func:`moments` or :func:`merge_moments`.
        dtype: In which the values were summed; default that of ``whole``.

    Returns:
        A scalar; 0 where nothing counts, and where values differ from their mean by rounding alone, since a division
        by that makes large numbers of equal values.

    Example:
        >>> variance(moments(torch.tensor([1.0, 3.0]))), variance(moments(torch.full((3,), 0.1)))
        (tensor(1.), tensor(0.))
    """
    count, mean, squares = whole.unbind()
    found = squares / count.clamp(min=torch.finfo(whole.dtype).tiny)
    rounding = 8 * torch.finfo(dtype or whole.dtype).eps
    return torch.where(found > (rounding * mean).square(), found, 0.0)


def whiten(values: Tensor, whole: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """Values at mean 0 and variance 1: ``(values - mean) / sqrt(variance + 1e-8)``, as by Ziegler et al. 2019.

    Args:
        values: Any shape.
        whole: (3,) moments of all that ``values`` are a part of, such as the rollout of all ranks; default their own.
        shift_mean: Whether the mean goes; kept for rewards, where it says whether answers are good.

    Returns:
        Whitened values in at least fp32; where all are equal, their distance from the mean is 0.

    Example:
        >>> whiten(torch.tensor([1.0, 2.0, 3.0]))
        tensor([-1.2247,  0.0000,  1.2247])
    """
    values = wide(values)
    whole = moments(values) if whole is None else whole.to(values)
    spread, mean = variance(whole), whole[1]
    whitened = torch.where(spread > 0, (values - mean) * torch.rsqrt(spread + 1e-8), 0.0)
    return whitened if shift_mean else whitened + mean


class RunningMoments:
    """Mean and standard deviation of all scores so far, to scale them by.

    Attributes:
        count: Scores so far, by weight.
        mean: Their mean; 0 before the first.
        squares: Sum of their squared deviations from it.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    @property
    def std(self) -> float:
        """The population's standard deviation; 0 where there are no scores, or equal ones."""
        own = torch.tensor([self.count, self.mean, self.squares], dtype=torch.float64)
        return math.sqrt(variance(own, torch.float32))  # scores are fp32

    @property
    def scale(self) -> float:
        """What to divide scores by: :attr:`std`, or 1 while there is none to divide by."""
        return self.std or 1.0

    def update(self, new: Tensor) -> None:
        """Takes in an iteration's scores.

        Args:
            new: (3,) their :func:`moments`, merged over ranks, so that all ranks go on with the same.

        Raises:
            ValueError: Scores that are not finite, which would never leave the mean again.
        """
        own = torch.tensor([self.count, self.mean, self.squares], dtype=torch.float64)
        merged = merge_moments(torch.stack([own, new.detach().to("cpu", torch.float64)]))
        if not merged.isfinite().all():
            raise ValueError(f"Scores must be finite; their count, mean and squares are {new.tolist()}.")
        self.count, self.mean, self.squares = merged.tolist()

    def state_dict(self) -> dict[str, float]:
        """For the checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Takes it back."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


def adapt_kl_coef(coef: float, kl: float, target: float, horizon: float, samples: int) -> float:
    """The next iteration's KL coefficient, by a proportional controller (Ziegler et al. 2019, sec. 2.2).

        error = clip(kl / target - 1, -0.2, 0.2)
        coef' = coef (1 + error samples / horizon)

    A fixed coefficient is one that is never passed here.

    Args:
        coef: The coefficient of this iteration.
        kl: Its mean KL a completion: over sequences of ``k1`` summed over tokens, on all ranks.
        target: The KL to hold, in nats.
        horizon: Samples in which a steady error of 1 % changes the coefficient by about 1 %; 10000 there.
        samples: Completions of the iteration, on all ranks.

    Returns:
        The coefficient.

    Raises:
        ValueError: A target or horizon that is not positive, a horizon so short that the coefficient could turn
            negative, or a KL that is not finite.

    Example:
        >>> round(adapt_kl_coef(0.2, kl=9.0, target=6.0, horizon=10_000, samples=512), 6)
        0.202048
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"KL target and horizon must be above 0, got {target} and {horizon}.")
    if 0.2 * samples >= horizon:
        raise ValueError(
            f"A KL horizon of {horizon} is too short for {samples} samples an iteration: one error could take the "
            f"coefficient to zero. Use at least {samples}."
        )
    if not math.isfinite(kl):
        raise ValueError(f"The KL is {kl}: no coefficient follows from it. Look at the log-probs.")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * samples / horizon)
