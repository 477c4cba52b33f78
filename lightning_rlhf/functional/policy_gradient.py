"""Losses of the policy for each of N tokens, beside PPO's, and how much each token counts.

N tokens of S sequences lie in one row; ``sequence (N,)`` holds the number of each token's sequence, in ascending order.
A loss of whole sequences, such as GSPO's, stands at each of their tokens: take its ``sequence`` mean, which counts each
sequence once. The caller applies weights and adds up.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_rlhf.functional.ppo import LOG_RATIO, PolicyLoss, policy_loss
from lightning_rlhf.functional.precision import wide

#: Over what losses are averaged.
Mean = Literal["token", "sequence", "prompt", "constant"]
#: How tokens that another policy sampled are weighed.
Correction = Literal["none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def _by_sequence(values: Tensor, sequence: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) sums over each token's sequence, and its number of tokens."""
    size = int(sequence[-1]) + 1 if len(sequence) else 0
    sums = values.new_zeros(size).index_add(0, sequence, values)
    return sums[sequence], torch.bincount(sequence, minlength=size)[sequence].to(values)


def sequence_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    sequence: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    normalize: bool = True,
) -> PolicyLoss:
    """Computes the clipped loss with one ratio per sequence.

    Args:
        logprobs: (N,) log-probs of the sampled tokens, with gradient.
        old_logprobs: (N,) their log-probs when they were sampled.
        advantages: (N,) advantages.
        sequence: (N,) number of each token's sequence, sorted.
        clip_low: Range of the ratio below 1.
        clip_high: Range of the ratio above 1.
        dual_clip: See :func:`~lightning_rlhf.functional.ppo.policy_loss`.
        normalize: The ratio is ``exp`` of the mean of the log-ratios (GSPO, Zheng et al. 2025, eq. 7), whose range of
            3e-4 is far below PPO's. False: of their sum, the ratio of the whole completion, as TRL's RLOO has it; it
            leaves the range after one update where completions are long.

    Returns:
        Losses, ratios and where they were clipped: those of its sequence at each token.
    """
    total, length = _by_sequence(wide(logprobs) - wide(old_logprobs), sequence)
    log_ratio = total / length if normalize else total
    return policy_loss(log_ratio, torch.zeros_like(log_ratio), advantages, clip_low, clip_high, dual_clip)


def reinforce_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> PolicyLoss:
    """Computes ``-A log p``, the plain policy gradient; it holds for the policy that sampled.

    Args:
        logprobs: (N,) log-probs of the sampled tokens, with gradient.
        old_logprobs: (N,) their log-probs when they were sampled, for the ratio that is logged.
        advantages: (N,) advantages.

    Returns:
        Losses and ratios; nothing is clipped.
    """
    logprobs = wide(logprobs)
    ratio = torch.exp(logprobs.detach() - wide(old_logprobs))
    return PolicyLoss(-wide(advantages) * logprobs, ratio, torch.zeros_like(ratio, dtype=torch.bool))


def cispo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float | None, clip_high: float
) -> PolicyLoss:
    """Computes ``-clip(ratio) A log p``: the ratio has no gradient, so every token keeps one (MiniMax 2025, eq. 4, 5).

    Args:
        logprobs: (N,) log-probs of the sampled tokens, with gradient.
        old_logprobs: (N,) their log-probs when they were sampled.
        advantages: (N,) advantages.
        clip_low: The ratio counts as at least ``1 - clip_low``; None sets no bound, as the paper.
        clip_high: It counts as at most ``1 + clip_high``.

    Returns:
        Losses, ratios and where the ratio was bounded.
    """
    plain = reinforce_loss(logprobs, old_logprobs, advantages)
    bounded = plain.ratio.clamp(None if clip_low is None else 1 - clip_low, 1 + clip_high)
    return PolicyLoss(bounded * plain.loss, plain.ratio, bounded != plain.ratio)


def gmpo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence: Tensor, clip_low: float, clip_high: float
) -> PolicyLoss:
    """Computes ``-A`` times the geometric mean of a sequence's clipped ratios (GMPO, Zhao et al. 2025).

    Ratios are clipped on the side that the advantage's sign pushes them to, and in logs: a range of 0.4 is that from
    ``exp(-0.4)`` to ``exp(0.4)``.

    Args:
        logprobs: (N,) log-probs of the sampled tokens, with gradient.
        old_logprobs: (N,) their log-probs when they were sampled.
        advantages: (N,) advantages.
        sequence: (N,) number of each token's sequence, sorted.
        clip_low: Range of the log-ratio below 0.
        clip_high: Range of the log-ratio above 0.

    Returns:
        Losses of its sequence at each token, ratios, and where they were clipped.
    """
    advantages, free = wide(advantages), wide(logprobs) - wide(old_logprobs)
    bounded = torch.where(advantages > 0, free.clamp(max=clip_high), free.clamp(min=-clip_low))
    total, length = _by_sequence(bounded, sequence)
    mean = total / length
    mean = torch.where(advantages < 0, mean, mean.clamp(max=LOG_RATIO))  # 0 times inf would be NaN
    return PolicyLoss(-advantages * torch.exp(mean), free.detach().exp(), (bounded != free).detach())


def sapo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, tau_positive: float, tau_negative: float
) -> PolicyLoss:
    """Computes ``-(4 / tau) sigmoid(tau (ratio - 1)) A``: a soft gate in place of clipping (SAPO, Gao et al. 2025).

    At a ratio of 1 its gradient is that of ``-ratio A``; it fades on both sides, faster with a larger tau.

    Args:
        logprobs: (N,) log-probs of the sampled tokens, with gradient.
        old_logprobs: (N,) their log-probs when they were sampled.
        advantages: (N,) advantages.
        tau_positive: Steepness where the advantage is positive; the paper takes 1.
        tau_negative: Steepness elsewhere; the paper takes 1.05.

    Returns:
        Losses and ratios; nothing is clipped.
    """
    advantages = wide(advantages)
    ratio = torch.exp((wide(logprobs) - wide(old_logprobs)).clamp(max=LOG_RATIO))  # the gate is shut far before
    tau = tau_negative + (tau_positive - tau_negative) * (advantages > 0).to(ratio)
    gate = logsigmoid(tau * (ratio - 1)).exp() * 4 / tau
    return PolicyLoss(-gate * advantages, ratio.detach(), torch.zeros_like(ratio, dtype=torch.bool))


def loss_weights(
    mean: Mean, counts: Tensor, sequence: Tensor, group: Tensor, constant: float | None = None
) -> tuple[Tensor, Tensor]:
    """Computes how much each token counts in a mean: ``sum(weight * loss) / sum(share)``.

    Args:
        mean: ``token``: all tokens alike. ``sequence``: the mean over the means of sequences (GRPO). ``prompt``: the
            mean over prompts of the mean over a prompt's tokens (DAPO's eq. 12 as printed). ``constant``: each
            sequence's sum divided by ``constant``, averaged over sequences (Dr. GRPO).
        counts: (N,) 1 for a token that counts, 0 for a token of a completion that is left out.
        sequence: (N,) number of each token's sequence, sorted.
        group: (S,) number of each sequence's prompt, sorted.
        constant: Tokens, such as the longest length of a completion.

    Returns:
        (N,) weights, and (N,) shares in the denominator, which add up over micro-batches and ranks.

    Raises:
        ValueError: ``constant`` is missing.
    """
    if mean == "token":
        return counts, counts
    member = group[sequence] if mean == "prompt" else sequence
    share = counts / _by_sequence(counts, member)[0].clamp(min=1)
    if mean != "constant":
        return share, share
    if constant is None:
        raise ValueError("The mean constant needs the constant: a number of tokens, such as the longest length.")
    return counts / constant, share


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, sequence: Tensor, correction: Correction, maximum: float
) -> Tensor:
    """Computes ``p_old / p_rollout``, where completions come from an engine whose log-probs differ (Yao et al. 2025).

    Args:
        old_logprobs: (N,) log-probs of the policy before the updates.
        rollout_logprobs: (N,) log-probs that the engine kept.
        sequence: (N,) number of each token's sequence, sorted.
        correction: ``token_...`` takes the ratio of each token, ``sequence_...`` that of its whole completion.
            ``..._truncate`` bounds it by ``maximum``; ``..._mask`` sets it to 0 beyond. ``none``: 1.
        maximum: The bound. A larger value has less bias and more variance.

    Returns:
        (N,) factors of losses, without gradient; they do not count in the denominator.
    """
    log_ratio = (wide(old_logprobs) - wide(rollout_logprobs)).detach()
    if correction == "none":
        return torch.ones_like(log_ratio)
    if correction.startswith("sequence"):
        log_ratio = _by_sequence(log_ratio, sequence)[0]
    ratio = log_ratio.exp()
    return ratio.clamp(max=maximum) if correction.endswith("truncate") else torch.where(ratio > maximum, 0.0, ratio)


def off_policy_mask(
    logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, sequence: Tensor, threshold: float
) -> Tensor:
    """Leaves out bad completions that the policy has moved away from (DeepSeek-V3.2 2025, eq. 9).

    Args:
        logprobs: (N,) log-probs of the policy.
        rollout_logprobs: (N,) log-probs when they were sampled.
        advantages: (N,) advantages.
        sequence: (N,) number of each token's sequence, sorted.
        threshold: Mean of ``log p_rollout - log p`` over a completion, in nats per token, beyond which it counts 0 if
            its advantage is negative. A smaller value leaves out more.

    Returns:
        (N,) 1 or 0, a factor of losses; completions that are left out still count in the denominator.
    """
    moved, length = _by_sequence((wide(rollout_logprobs) - wide(logprobs)).detach(), sequence)
    worse = _by_sequence(wide(advantages), sequence)[0] < 0
    return 1 - (worse & (moved / length > threshold)).to(moved)


def top_entropy_threshold(entropies: Tensor, share: float) -> Tensor:
    """Computes the entropy that this share of tokens has or exceeds (Wang et al. 2025, "Beyond the 80/20 rule", eq. 5).

    Args:
        entropies: (N,) entropies of all tokens that count: of the whole minibatch, on all ranks.
        share: Share of tokens to learn from, from 0 to 1.

    Returns:
        A scalar, the quantile ``1 - share``, between two entropies where it falls there; inf without tokens.

    Example:
        >>> top_entropy_threshold(torch.tensor([0.1, 0.4, 3.0, 0.2, 1.0]), 0.4)
        tensor(0.6400)
    """
    if not len(entropies):
        return entropies.new_full((), torch.inf)
    ranked = entropies.sort().values  # torch.quantile takes 16 million values at most
    place = (1 - share) * (len(ranked) - 1)
    low = min(int(place), len(ranked) - 1)
    return torch.lerp(ranked[low], ranked[min(low + 1, len(ranked) - 1)], place - low)
