"""Computes advantages of completions from the rewards of their group, which are the completions of one prompt.

S completions have ``rewards (S,)``, and ``group (S,)`` holds the number of each one's group, from 0 to B - 1. A reward
of NaN does not apply: it counts nowhere, and the advantage of its completion is 0.

A group is *flat* if its rewards are equal, or if it has one. This is decided by comparing rewards, before any
arithmetic: eight rewards of 0.95 in fp32 have a mean that is not 0.95, and dividing that difference by a standard
deviation of about 0 makes large advantages out of rounding.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.functional.advantages import moments, variance
from lightning_rlhf.functional.precision import wide

#: What is subtracted from a reward.
Baseline = Literal["mean", "leave_one_out", "length_weighted", "none"]
#: What the difference is divided by.
Scale = Literal["group", "batch", "mean", "none"]
#: Added to standard deviations, as in DeepSeek's and TRL's code.
EPSILON = 1e-4


class _Groups(NamedTuple):
    """What the formulas read, in float64: (S,) known or not, rewards minus their group's smallest; (B,) the others."""

    known: Tensor
    shifted: Tensor
    low: Tensor
    sizes: Tensor
    flat: Tensor


def _groups(rewards: Tensor, group: Tensor) -> _Groups:
    if rewards.ndim != 1 or rewards.shape != group.shape:
        raise ValueError(
            f"rewards and group must be (S,), one entry per completion; got {tuple(rewards.shape)} and "
            f"{tuple(group.shape)}."
        )
    values, known = rewards.double(), ~rewards.isnan()
    size = int(group.max()) + 1 if len(group) else 0
    # a group whose rewards are all unknown has a low of inf and a high of -inf: it is flat too
    low, high = (
        values.new_full((size,), start).scatter_reduce(0, group, torch.where(known, values, start), how)
        for start, how in ((torch.inf, "amin"), (-torch.inf, "amax"))
    )
    shifted = torch.where(known, values - low[group], 0.0)  # exact sums also of rewards such as 1e6 + 1e-6
    return _Groups(known, shifted, low, _sums(known.double(), group, size), high <= low)


def _sums(values: Tensor, group: Tensor, size: int) -> Tensor:
    return values.new_zeros(size).index_add(0, group, values)


def flat_groups(rewards: Tensor, group: Tensor) -> Tensor:
    """Finds the groups that teach nothing by comparison: all known rewards are equal, or there is at most one.

    Args:
        rewards: (S,) rewards; NaN does not apply.
        group: (S,) number of each completion's group.

    Returns:
        (B,) bool.

    Example:
        >>> flat_groups(torch.tensor([0.95, 0.95, 0.0, 1.0, 7.0]), torch.tensor([0, 0, 1, 1, 2]))
        tensor([ True, False,  True])
    """
    return _groups(rewards, group).flat


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    baseline: Baseline = "mean",
    scale: Scale = "group",
    lengths: Tensor | None = None,
    whole: Tensor | None = None,
) -> Tensor:
    """Computes ``(reward - baseline) / scale`` of each completion, in float64 inside; 0 in a flat group.

    Args:
        rewards: (S,) rewards; NaN does not apply.
        group: (S,) number of each completion's group.
        baseline: ``mean`` of the group (GRPO, Shao et al. 2024); ``leave_one_out``, the mean of the others (RLOO,
            Ahmadian et al. 2024); ``length_weighted``, the mean over the group's tokens (OPO, Hao et al. 2025);
            ``none`` returns rewards, scaled by nothing.
        scale: The sample standard deviation of the ``group`` or of the ``batch``, plus 1e-4; the group's ``mean``, and
            0 where that is not positive (MaxRL, Tajwar et al. 2026); or ``none`` (Dr. GRPO, Liu et al. 2025).
        lengths: (S,) tokens of each completion, for ``length_weighted``.
        whole: (3,) moments of the rewards of all ranks, for ``batch``. Default: those of ``rewards``.

    Returns:
        (S,) advantages in at least fp32.

    Raises:
        ValueError: A tensor has another shape, or ``lengths`` are missing.

    Example:
        >>> group_advantages(torch.tensor([1.0, 0.0, 0.0, 3.0]), torch.tensor([0, 0, 0, 1]), "leave_one_out", "none")
        tensor([ 1.0000, -0.5000, -0.5000,  0.0000])
    """
    known, shifted, low, count, flat = _groups(rewards, group)
    dtype = wide(rewards).dtype
    if baseline == "none":
        return torch.where(known, rewards, 0.0).to(dtype)
    size = len(count)
    mean = _sums(shifted, group, size) / count.clamp(min=1)
    if baseline == "length_weighted":
        if lengths is None:
            raise ValueError("The baseline length_weighted needs lengths, the number of tokens of each completion.")
        tokens = torch.where(known, lengths.double(), 0.0)
        center = _sums(tokens * shifted, group, size) / _sums(tokens, group, size).clamp(min=1)
    else:
        center = mean
    found = shifted - center[group]
    if baseline == "leave_one_out":
        found = found * (count / (count - 1).clamp(min=1))[group]
    if scale == "group":
        squares = _sums(torch.where(known, shifted - mean[group], 0.0).square(), group, size)
        found = found / ((squares / (count - 1).clamp(min=1)).sqrt() + EPSILON)[group]
    elif scale == "batch":
        whole = moments(rewards.double(), known.double()) if whole is None else whole
        found = found / (sample_std(whole) + EPSILON)
    elif scale == "mean":
        level = (low + mean)[group]
        found = torch.where(level > 0, found / level, 0.0)
    return torch.where(known & ~flat[group], found, 0.0).to(dtype)


def sample_std(whole: Tensor) -> Tensor:
    """Computes the standard deviation that divides by the count minus one, in float64.

    Args:
        whole: (3,) moments, such as those of all ranks.

    Returns:
        A scalar; 0 for one value, and for values that differ only by rounding.
    """
    count = whole[0].double()
    return (variance(whole.double()) * count / (count - 1).clamp(min=1)).sqrt()


def standardize(values: Tensor, whole: Tensor | None = None) -> Tensor:
    """Computes ``(values - mean) / (std + 1e-4)`` with the sample standard deviation.

    Args:
        values: (S,) values; NaN does not apply.
        whole: (3,) moments of the values of all ranks. Default: those of ``values``.

    Returns:
        (S,) in at least fp32; 0 where a value does not apply, and everywhere if all are equal.
    """
    known = ~values.isnan()
    whole = moments(values.double(), known.double()) if whole is None else whole.double()
    spread = sample_std(whole)
    found = (values.double() - whole[1]) / (spread + EPSILON)
    return torch.where(known & (spread > 0), found, 0.0).to(wide(values).dtype)


def normalized_sum(parts: Tensor, weights: Tensor, group: Tensor) -> Tensor:
    """Normalizes each of K rewards within its groups, then adds them up (GDPO, Liu et al. 2026).

    A sum of raw rewards is ruled by the reward with the largest spread; here each has the influence of its weight. The
    paper then standardizes the result over the batch: :func:`standardize`.

    Args:
        parts: (S, K) rewards; NaN does not apply.
        weights: (K,) their weights.
        group: (S,) number of each completion's group.

    Returns:
        (S,) sums in at least fp32; NaN where no reward applies.
    """
    columns = [weight * group_advantages(part, group) for part, weight in zip(parts.unbind(1), weights, strict=True)]
    return torch.stack(columns, 1).sum(1).masked_fill(parts.isnan().all(1), torch.nan)
