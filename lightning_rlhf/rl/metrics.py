"""Statistics of an iteration over all ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_rlhf.functional import k1, k3, merge_moments, moments
from lightning_rlhf.rewards import FAULTS, Scores
from lightning_rlhf.rl.experience import Experience
from lightning_rlhf.utils.collectives import gather_objects, gather_tensors


def moments_over_ranks(values: Tensor, weight: Tensor | None, device: torch.device) -> Tensor:
    """Computes (3,) moments of values over all ranks. All ranks must call it.

    Args:
        values: This rank's.
        weight: How much each counts; None counts all alike. See :func:`~lightning_rlhf.functional.advantages.moments`.
        device: Where ranks exchange tensors.
    """
    return merge_moments(gather_tensors(moments(values, weight), device))


def extra_means(scores: Scores, name: str) -> dict[str, float]:
    """Computes the means of a reward's further numbers over all ranks. All ranks must call it.

    Args:
        scores: This rank's.
        name: Put before the name of a number, unless it is empty.

    Returns:
        Means by ``reward/<name>/<entry>``, without :data:`~lightning_rlhf.rewards.base.FAULTS`; a completion without
        the number does not count.
    """
    mine = {
        f"reward/{name}/{entry}" if name else f"reward/{entry}": (column.nansum().item(), int((~column.isnan()).sum()))
        for entry, column in scores.extras.items()
        if entry.rpartition("/")[2] not in FAULTS
    }
    everyone = gather_objects(mine)
    sums: dict[str, list[float]] = {}
    for key, (total, count) in sorted(item for each in everyone for item in each.items()):
        known = sums.setdefault(key, [0.0, 0.0])
        known[0], known[1] = known[0] + total, known[1] + count
    return {key: total / count for key, (total, count) in sums.items() if count}


def spread_over_ranks(values: Tensor, weight: Tensor, device: torch.device) -> dict[str, float]:
    """Computes ``mean``, ``min`` and ``max`` of the values whose weight is not 0, over all ranks. All must call it."""
    kept = values[weight > 0]
    mean = moments_over_ranks(kept, None, device)[1].item()
    ends = [end for each in gather_objects([kept.min().item(), kept.max().item()] if len(kept) else []) for end in each]
    return {"mean": mean, "min": min(ends, default=math.nan), "max": max(ends, default=math.nan)}


def sample_metrics(experience: Experience) -> dict[str, float]:
    """Computes what is logged about scores and lengths of an iteration, over all ranks. All ranks must call it.

    Args:
        experience: With scores; a dropped completion counts in none of them.

    Returns:
        Means, spreads and extremes by name.
    """
    lengths = torch.tensor(experience.lengths, dtype=torch.float32)
    every = torch.cat(gather_objects(torch.stack([experience.scores, experience.truncated, lengths], 1)))
    scores, truncated, lengths = every.unbind(1)
    kept = scores[scores.isfinite()]
    scores = kept if len(kept) else every[:1, 0] * torch.nan
    found = {
        "score": scores.mean(),
        "score_std": scores.std(correction=0),
        "score_min": scores.min(),
        "score_max": scores.max(),
        "dropped_samples": torch.tensor(float(len(every) - len(kept))),
        "length_mean": lengths.mean(),
        "length_min": lengths.min(),
        "length_max": lengths.max(),
        "length_stopped": (lengths * (1 - truncated)).sum() / (1 - truncated).sum().clamp(min=1),  # 0: there is none
        "length_truncated": (lengths * truncated).sum() / truncated.sum().clamp(min=1),
        "stopped": 1 - truncated.mean(),
        "tokens": lengths.sum(),
    }
    return {name: value.item() for name, value in found.items()}


def rollout_metrics(experience: Experience, rewards: Tensor, logprobs: Tensor) -> dict[str, float]:
    """Computes what is logged about the completions of an iteration, over all ranks. All ranks must call it.

    Args:
        experience: With scores and entropies; a dropped completion counts in neither scores nor rewards. Without
            reference log-probs there is no KL.
        rewards: (N,) rewards of tokens, KL penalty included.
        logprobs: (N,) log-probs of the policy, computed anew.

    Returns:
        Means, spreads and extremes by name.
    """
    sequence, count = experience.sequence, len(experience.scores)
    referred = len(experience.reference_logprobs) == len(logprobs)
    log_ratio = logprobs - experience.reference_logprobs if referred else torch.zeros_like(logprobs)
    by_token = torch.stack([k1(log_ratio), k3(log_ratio), experience.entropies, torch.ones_like(logprobs)], 1)
    by_sequence = torch.zeros(count, 4).to(by_token).index_add(0, sequence, by_token)
    drift = (logprobs - experience.rollout_logprobs.to(logprobs)).abs()
    error = torch.zeros(count).to(drift).scatter_reduce(0, sequence, drift, "amax")
    reward = torch.zeros(count).to(logprobs).index_add(0, sequence, rewards)
    known = torch.stack([experience.scores, reward, error], 1)
    every = torch.cat(gather_objects(torch.cat([known.to(by_token), by_sequence], 1)))
    scores, rewards, errors, kl, kl_k3, entropy, lengths = every.unbind(1)
    kept = rewards[scores.isfinite()]
    reward = kept if len(kept) else every[:1, 1] * torch.nan
    found = {
        "reward_mean": reward.mean(),
        "reward_std": reward.std(correction=0),
        "reward_min": reward.min(),
        "reward_max": reward.max(),
        "kl": kl.mean(),
        "kl_k3": kl_k3.mean(),
        "entropy": entropy.sum() / lengths.sum(),
        "rollout_error": errors.max(),
    }
    return sample_metrics(experience) | {name: value.item() for name, value in found.items()}
