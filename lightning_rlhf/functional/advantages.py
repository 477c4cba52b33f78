"""Computes advantages from scores, on packed tokens: rewards, GAE, whitening, and the adaptive KL coefficient.

N tokens lie in one row. ``sequence (N,)`` holds the number of each token's sequence, in ascending order.
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
    """Result of :func:`gae`.

    Attributes:
        advantages: (N,) how much better a token was than the critic's values predicted; not whitened.
        returns: (N,) ``advantages + values``, the targets of the values.
    """

    advantages: Tensor
    returns: Tensor


def token_rewards(kl_penalty: Tensor, scores: Tensor, sequence: Tensor) -> Tensor:
    """Computes each token's reward: minus its KL penalty, plus the score on the last token of a sequence.

    This is eq. 2 of Ziegler et al. 2019 for each token (Stiennon et al. 2020; Ouyang et al. 2022, eq. 2).

    Args:
        kl_penalty: (N,) ``kl_coef * k1``, which is subtracted. Zeros if the KL is part of the loss.
        scores: (S,) scores of whole completions.
        sequence: (N,) number of each token's sequence, sorted.

    Returns:
        (N,) rewards in at least fp32.

    Raises:
        ValueError: A sequence has no tokens, so that its score would be lost; tokens are not sorted; or a tensor has
            another shape, such as (B, T).

    Example:
        >>> token_rewards(torch.tensor([0.5, 0.0, 0.25]), torch.tensor([2.0, -1.0]), torch.tensor([0, 0, 1]))
        tensor([-0.5000,  2.0000, -1.2500])
    """
    _check_packed(sequence, scores, kl_penalty=kl_penalty)
    rewards = -wide(kl_penalty)
    scores = scores.to(rewards.dtype)
    return rewards.index_add(0, _last_tokens(sequence, len(scores)), scores)


def overlong_penalty(lengths: Tensor, max_length: int, cache: int) -> Tensor:
    """Computes a soft penalty for completions that are almost too long (DAPO, Yu et al. 2025, eq. 13).

    Args:
        lengths: (S,) tokens of each completion.
        max_length: Most tokens of a completion.
        cache: The penalty grows over the last ``cache`` tokens below ``max_length``, in a straight line from 0 to 1.

    Returns:
        (S,) penalties from 0 to -1, which are added to scores.

    Raises:
        ValueError: ``cache`` is not between 1 and ``max_length``.

    Example:
        >>> overlong_penalty(torch.tensor([14, 16, 20]), max_length=20, cache=5)
        tensor([ 0.0000, -0.2000, -1.0000])
    """
    if not 1 <= cache <= max_length:
        raise ValueError(f"An overlong cache of {cache} tokens must be at least 1 and at most {max_length}.")
    return 0.0 - ((lengths - (max_length - cache)) / cache).clamp(0, 1)


def gae(rewards: Tensor, values: Tensor, last_values: Tensor, sequence: Tensor, gamma: float, lam: float) -> Advantages:
    """Computes generalized advantage estimates (Schulman et al. 2016, eq. 16).

        delta_t = r_t + gamma V_(t+1) - V_t
        A_t     = delta_t + gamma lam A_(t+1)

    The sums over the rest of a sequence double their length in each of log2(N) rounds. So there is no loop over tokens,
    and sequences do not affect each other.

    Args:
        rewards: (N,) rewards.
        values: (N,) value of the state in which each token was sampled, at the position that predicts it.
        last_values: (S,) value after the last token: 0 if the completion ended by itself.
        sequence: (N,) number of each token's sequence, sorted.
        gamma: Discount factor per token. A larger value counts later rewards more; 1 is usual for completions.
        lam: GAE lambda: 0 trusts the critic, 1 trusts the observed rewards.

    Returns:
        Advantages and returns, in at least fp32.

    Raises:
        ValueError: A sequence has no tokens, tokens are not sorted, or a tensor has another shape, such as (B, T).

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
        # advantages[t] sums delta_t to delta_(t + reach - 1), or to the end of the sequence
        same = sequence[:-reach] == sequence[reach:]
        advantages = advantages + pad(torch.where(same, decay * advantages[reach:], 0), (0, reach))
        reach, decay = 2 * reach, decay * decay
    return Advantages(advantages, advantages + values)


def _check_packed(sequence: Tensor, by_sequence: Tensor, **by_token: Tensor) -> None:
    """Refuses padded (B, T) tensors, which would give wrong results."""
    for name, tensor in by_token.items():
        if tensor.ndim != 1 or tensor.shape != sequence.shape:
            raise ValueError(
                f"{name} has the shape {tuple(tensor.shape)} and sequence has {tuple(sequence.shape)}, but both must "
                "be (N,): the tokens of all sequences in one row, without padding. For (B, T) tensors and a mask that "
                f"is True for tokens, pass {name}[mask] and sequence=mask.nonzero()[:, 0]."
            )
    if by_sequence.ndim != 1:
        raise ValueError(f"Scores and last values must be (S,), one per sequence; got {tuple(by_sequence.shape)}.")


def _last_tokens(sequence: Tensor, sequences: int) -> Tensor:
    """Returns the (S,) index of each sequence's last token."""
    numbers = torch.arange(sequences, device=sequence.device)
    first, end = (torch.searchsorted(sequence, numbers, right=right) for right in (False, True))
    if (first == end).any() or (sequence[1:] < sequence[:-1]).any() or (end - first).sum() != len(sequence):
        raise ValueError(
            f"sequence must hold the numbers 0 to {sequences - 1} of the {sequences} sequences, each at least once and "
            f"in ascending order; got {sequence.tolist()[:20]}{' ...' if len(sequence) > 20 else ''}"
        )
    return end - 1


# ------------------------------------------------------------------------------------------------- whitening


def moments(values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Computes count, mean, and sum of squared deviations from the mean, in two passes for accuracy.

    To combine ranks exactly, gather the moments of each rank and pass them to :func:`merge_moments`.

    Args:
        values: Values of any shape.
        weight: Weight of each value. Values with weight 0, such as filler rows of a batch, may be NaN. Default: 1.

    Returns:
        (3,) in at least fp32; zeros if all weights are 0.
    """
    values = wide(values)
    weight = torch.ones_like(values) if weight is None else weight.to(values.dtype)
    values = torch.where(weight > 0, values, 0.0)
    count = weight.sum()
    mean = (weight * values).sum() / count.clamp(min=torch.finfo(values.dtype).tiny)
    return torch.stack([count, mean, (weight * (values - mean).square()).sum()])


def merge_moments(moments_by_rank: Tensor) -> Tensor:
    """Merges the moments of several sets of values (Chan, Golub and LeVeque 1983).

    Args:
        moments_by_rank: (R, 3), where each row comes from :func:`moments`.

    Returns:
        (3,) moments of all values together.

    Example:
        >>> merge_moments(torch.stack([moments(torch.tensor([1.0, 2.0])), moments(torch.tensor([6.0]))]))
        tensor([ 3.,  3., 14.])
    """
    count, mean, squares = moments_by_rank.reshape(-1, 3).unbind(1)
    total = count.sum()
    joint = (count * mean).sum() / total.clamp(min=torch.finfo(mean.dtype).tiny)
    return torch.stack([total, joint, (squares + count * (mean - joint).square()).sum()])


def variance(whole: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Computes the population variance from moments: it divides by the count, not by the count minus one.

    Args:
        whole: (3,) moments from :func:`moments` or :func:`merge_moments`.
        dtype: Data type in which the values were summed. Default: that of ``whole``.

    Returns:
        A scalar. It is 0 if the count is 0, and if values differ from their mean only by rounding, because whitening
        would turn these differences into large numbers.

    Example:
        >>> variance(moments(torch.tensor([1.0, 3.0]))), variance(moments(torch.full((3,), 0.1)))
        (tensor(1.), tensor(0.))
    """
    count, mean, squares = whole.unbind()
    found = squares / count.clamp(min=torch.finfo(whole.dtype).tiny)
    rounding = 8 * torch.finfo(dtype or whole.dtype).eps
    return torch.where(found > (rounding * mean).square(), found, 0.0)


def whiten(values: Tensor, whole: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """Scales values to mean 0 and variance 1: ``(values - mean) / sqrt(variance + 1e-8)`` (Ziegler et al. 2019).

    Args:
        values: Values of any shape.
        whole: (3,) moments of a larger set that contains ``values``, such as the rollout of all ranks. Default: the
            moments of ``values``.
        shift_mean: Subtract the mean. False keeps it, as for rewards, whose mean shows how good answers are.

    Returns:
        Whitened values in at least fp32. If all values are equal, they become 0, or the mean with ``shift_mean=False``.

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
    """Running mean and standard deviation of all scores, which scales them.

    Attributes:
        count: Number of scores, or the sum of their weights.
        mean: Mean of the scores; 0 before the first score.
        squares: Sum of squared deviations from the mean.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0.0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 0 if there are no scores or all are equal."""
        own = torch.tensor([self.count, self.mean, self.squares], dtype=torch.float64)
        return math.sqrt(variance(own, torch.float32))  # scores are fp32

    @property
    def scale(self) -> float:
        """Divisor for scores: :attr:`std`, or 1 while it is 0."""
        return self.std or 1.0

    def update(self, new: Tensor) -> None:
        """Adds the scores of an iteration.

        Args:
            new: (3,) :func:`moments` of the scores, merged over ranks, so that all ranks have the same.

        Raises:
            ValueError: A score is not finite. It would stay in the mean forever.
        """
        own = torch.tensor([self.count, self.mean, self.squares], dtype=torch.float64)
        merged = merge_moments(torch.stack([own, new.detach().to("cpu", torch.float64)]))
        if not merged.isfinite().all():
            raise ValueError(
                f"Scores must be finite, but their count, mean and squares are {new.tolist()}. Check the reward."
            )
        self.count, self.mean, self.squares = merged.tolist()

    def state_dict(self) -> dict[str, float]:
        """Returns the state for a checkpoint."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restores the state."""
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]


def adapt_kl_coef(coef: float, kl: float, target: float, horizon: float, samples: int) -> float:
    """Computes the next iteration's KL coefficient with a proportional controller (Ziegler et al. 2019, sec. 2.2).

        error = clip(kl / target - 1, -0.2, 0.2)
        coef' = coef (1 + error samples / horizon)

    Args:
        coef: The coefficient of this iteration.
        kl: Mean KL per completion of this iteration: ``k1`` summed over tokens, averaged over completions of all ranks.
        target: The KL per completion to reach, in nats. A larger value lets the policy move further.
        horizon: Number of samples over which the coefficient reacts: a constant error of 1 % changes it by about 1 %
            per ``horizon`` samples. A larger value reacts more slowly; the paper uses 10000.
        samples: Number of completions of the iteration, on all ranks.

    Returns:
        The new coefficient.

    Raises:
        ValueError: The target or the horizon is not positive, the horizon is so short that the coefficient could become
            negative, or the KL is not finite.

    Example:
        >>> round(adapt_kl_coef(0.2, kl=9.0, target=6.0, horizon=10_000, samples=512), 6)
        0.202048
    """
    if target <= 0 or horizon <= 0:
        raise ValueError(f"KL target and horizon must be above 0, got {target} and {horizon}.")
    if 0.2 * samples >= horizon:
        raise ValueError(
            f"A KL horizon of {horizon} is too short for {samples} samples per iteration: one iteration could set the "
            f"coefficient to zero. Use at least {samples}."
        )
    if not math.isfinite(kl):
        raise ValueError(f"The KL is {kl}, so the KL coefficient cannot adapt. Check the policy's log-probs.")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * samples / horizon)
