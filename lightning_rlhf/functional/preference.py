"""Losses for P pairs of a better and a worse completion: of their scores, and of their log-probs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
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


# ------------------------------------------------------------------------------------------ direct alignment


class PairLogprobs(NamedTuple):
    """What losses over P pairs of completions are functions of.

    Attributes:
        better: (P,) log-probs of the better completions under the policy, summed over their tokens.
        worse: (P,) those of the worse ones.
        better_ratio: (P,) log-probs of the better completions, policy minus reference. Without a reference equal to
            ``better``.
        worse_ratio: (P,) those of the worse ones.
        better_length: (P,) scored tokens of the better completions.
        worse_length: (P,) scored tokens of the worse ones.
        offset: (P,) by how much the better completion's implicit reward must exceed the worse one's, outside ``beta``:
            the data's margin (ODPO, arXiv 2402.10571, eq. 5), a length penalty, or 0.
    """

    better: Tensor
    worse: Tensor
    better_ratio: Tensor
    worse_ratio: Tensor
    better_length: Tensor
    worse_length: Tensor
    offset: Tensor

    def difference(self, beta: float) -> Tensor:
        """(P,) implicit reward of the better completion minus that of the worse one, minus the offset."""
        return beta * (self.better_ratio - self.worse_ratio) - self.offset


def pair_logprobs(
    logprobs: Tensor,
    reference: Tensor | None,
    sequence: Tensor,
    num_sequences: int,
    better: Tensor,
    worse: Tensor,
    margin: Tensor | None = None,
    length_alpha: float = 0.0,
    ld_alpha: float = 1.0,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> PairLogprobs:
    """Sums log-probs of tokens over the completions of pairs.

    Ratios are made token by token and summed in fp64: fp32 sums of log-probs over long completions cancel when they
    are subtracted, and cost the gradient two digits. Devices without fp64 (MPS) sum in fp32.

    Args:
        logprobs: (N,) log-probs of scored tokens under the policy. The tokens of a sequence stand side by side.
        reference: (N,) those under the reference, or None.
        sequence: (N,) number of each token's sequence, not decreasing.
        num_sequences: S.
        better: (P,) sequence of each pair's better completion.
        worse: (P,) that of the worse one.
        margin: (P,) or None: by how much better ones should win.
        length_alpha: Weight of the difference of lengths in the offset (R-DPO, arXiv 2403.19159, eq. 9): with a larger
            value, a longer better completion must win by more.
        ld_alpha: Weight of the tokens behind the shorter completion's length, in policy and reference (LD-DPO, arXiv
            2409.06411, eq. 9 and 10). 1 counts all tokens alike; a smaller value attends less to length.
        f_divergence: A key of :data:`F_DIVERGENCES`, which shapes ratios (f-DPO, arXiv 2309.16240).
        f_alpha: Order of the alpha divergence.

    Returns:
        The sums of the pairs.
    """
    own = wide(logprobs)
    ratio = own if reference is None else own - wide(reference)
    lengths = torch.zeros(num_sequences, dtype=torch.long, device=sequence.device)
    lengths.index_add_(0, sequence, torch.ones_like(sequence))
    dtype = _dtype_of_sums(own)
    counts = lengths.to(dtype)

    def summed(values: Tensor) -> list[Tensor]:
        if ld_alpha == 1.0:
            sums = sum_sequences(values, sequence, num_sequences)
            return [sums[better], sums[worse]]
        shorter = torch.minimum(lengths[better], lengths[worse])
        return [_discounted_sums(values.to(dtype), lengths, one, shorter, ld_alpha) for one in (better, worse)]

    shape = F_DIVERGENCES[f_divergence]
    (own_better, own_worse), ratios = summed(own), summed(ratio)
    offset = length_alpha * (counts[better] - counts[worse])
    if margin is not None:
        offset = offset + margin.to(dtype)
    return PairLogprobs(
        own_better,
        own_worse,
        shape(ratios[0], f_alpha),
        shape(ratios[1], f_alpha),
        counts[better],
        counts[worse],
        offset,
    )


def sum_sequences(values: Tensor, sequence: Tensor, num_sequences: int) -> Tensor:
    """Sums values of tokens over their sequences, in fp64; devices without it (MPS) sum in fp32.

    Args:
        values: (N,) one value per scored token, such as log-ratios.
        sequence: (N,) number of each token's sequence.
        num_sequences: S.

    Returns:
        (S,) sums.

    Example:
        >>> sum_sequences(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 2]), 3)
        tensor([3., 0., 4.], dtype=torch.float64)
    """
    dtype = _dtype_of_sums(values)
    return values.new_zeros(num_sequences, dtype=dtype).index_add(0, sequence, values.to(dtype))


def _dtype_of_sums(values: Tensor) -> torch.dtype:
    return torch.float64 if values.device.type != "mps" else values.dtype


def _discounted_sums(values: Tensor, lengths: Tensor, chosen: Tensor, limit: Tensor, discount: float) -> Tensor:
    """(P,) sums over the tokens of the P chosen sequences, where tokens behind (P,) ``limit`` weigh ``discount``."""
    count = lengths[chosen]
    pair = torch.arange(len(chosen), device=chosen.device).repeat_interleave(count)
    place = torch.arange(len(pair), device=chosen.device) - (count.cumsum(0) - count)[pair]
    first = (lengths.cumsum(0) - lengths)[chosen]
    tokens = values[first[pair] + place]
    return values.new_zeros(len(chosen)).index_add(0, pair, torch.where(place < limit[pair], tokens, discount * tokens))


def _bounded_exp(exponent: Tensor) -> Tensor:
    """``exp`` up to 7e12, so that squares and sums of it are finite in fp32 too."""
    return exponent.clamp(max=math.log(torch.finfo(torch.float32).max) / 3).exp()


#: f-divergences as ``f'(exp(ratio))`` without its constant: what takes the ratio's place in a loss. ``reverse_kl`` is
#: DPO's own. Source: f-DPO, arXiv 2309.16240, table 2.
F_DIVERGENCES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "reverse_kl": lambda ratio, alpha: ratio,
    "forward_kl": lambda ratio, alpha: -_bounded_exp(-ratio),
    "js_divergence": lambda ratio, alpha: F.logsigmoid(ratio),
    "alpha_divergence": lambda ratio, alpha: -_bounded_exp(-alpha * ratio) / alpha,
}


def sigmoid_loss(pairs: PairLogprobs, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7); with label smoothing conservative DPO (Mitchell 2023, eq. 3)."""
    x = pairs.difference(beta)
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def robust_loss(pairs: PairLogprobs, beta: float = 0.1, label_smoothing: float = 0.1) -> Tensor:
    """Robust DPO (arXiv 2403.00409, eq. 12): unbiased if a share ``label_smoothing`` of the pairs is swapped."""
    x = pairs.difference(beta)
    loss = -(1 - label_smoothing) * F.logsigmoid(x) + label_smoothing * F.logsigmoid(-x)
    return loss / (1 - 2 * label_smoothing)


def ipo_loss(pairs: PairLogprobs, beta: float = 0.1, average: bool = True) -> Tensor:
    """IPO (arXiv 2310.12036, eq. 17), of mean log-ratios per token; with ``average`` false of sums, as printed."""
    better, worse = pairs.better_ratio, pairs.worse_ratio
    if average:
        better, worse = better / pairs.better_length, worse / pairs.worse_length
    return (better - worse - 1 / (2 * beta)) ** 2


def hinge_loss(pairs: PairLogprobs, beta: float = 0.1) -> Tensor:
    """The hinge loss of SLiC on log-ratios (RSO, arXiv 2309.06657, eq. 11)."""
    return F.relu(1 - pairs.difference(beta))


def sigmoid_norm_loss(pairs: PairLogprobs, beta: float = 2.0) -> Tensor:
    """Length-normalized DPO (Tulu 3, arXiv 2411.15124, eq. 6): log-ratios are means per token."""
    better, worse = pairs.better_ratio / pairs.better_length, pairs.worse_ratio / pairs.worse_length
    return -F.logsigmoid(beta * (better - worse) - pairs.offset)


def simpo_loss(pairs: PairLogprobs, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO (arXiv 2405.14734, eq. 6): mean log-probs per token, a target margin ``gamma``, no reference."""
    return alphapo_loss(pairs, beta, gamma, 0.0)


def alphapo_loss(pairs: PairLogprobs, beta: float = 2.0, gamma: float = 1.0, alpha: float = 0.25) -> Tensor:
    """AlphaPO (arXiv 2501.03884, eq. 7): SimPO with the reward ``(1 - p ** -alpha) / alpha``; SimPO if alpha is 0."""
    better, worse = pairs.better / pairs.better_length, pairs.worse / pairs.worse_length
    if alpha:
        better, worse = (1 - _bounded_exp(-alpha * better)) / alpha, (1 - _bounded_exp(-alpha * worse)) / alpha
    return -F.logsigmoid(beta * (better - worse) - gamma - pairs.offset)


def orpo_loss(pairs: PairLogprobs, odds_weight: float = 0.1) -> Tensor:
    """ORPO (arXiv 2403.07691, eq. 6 and 7): SFT on the better completion, plus the log-odds ratio's log-sigmoid."""
    better, worse = pairs.better / pairs.better_length, pairs.worse / pairs.worse_length
    return -better - odds_weight * F.logsigmoid(_log_odds(better) - _log_odds(worse))


def _log_odds(logprob: Tensor) -> Tensor:
    """``log(p / (1 - p))``, exact for log-probs near 0."""
    logprob = logprob.clamp(max=-torch.finfo(logprob.dtype).tiny)
    near = logprob > -math.log(2)
    # each branch gets values that it can differentiate
    log1mexp = torch.where(
        near,
        (-torch.expm1(torch.where(near, logprob, -1.0))).log(),
        torch.log1p(-torch.exp(torch.where(near, -1.0, logprob))),
    )
    return logprob - log1mexp


def cpo_loss(pairs: PairLogprobs, beta: float = 0.1, sft_weight: float = 1.0) -> Tensor:
    """CPO (arXiv 2401.08417, eq. 3 to 5): DPO without a reference, plus SFT on the better completion."""
    contrast = -F.logsigmoid(beta * (pairs.better - pairs.worse) - pairs.offset)
    return contrast + sft_weight * sft_loss(pairs)


def dpop_loss(pairs: PairLogprobs, beta: float = 0.1, drop_weight: float = 5.0) -> Tensor:
    """DPO-positive (Smaug, arXiv 2402.13228, eq. 3): punishes a better completion that became less likely."""
    dropped = F.relu(-pairs.better_ratio)
    return -F.logsigmoid(pairs.difference(beta) - beta * drop_weight * dropped)


def apo_zero_loss(pairs: PairLogprobs, beta: float = 0.1) -> Tensor:
    """APO-zero (arXiv 2408.06266, eq. 7): the better completion up, the worse one down; for answers above the model."""
    return torch.sigmoid(-beta * pairs.better_ratio) + torch.sigmoid(beta * pairs.worse_ratio)


def apo_down_loss(pairs: PairLogprobs, beta: float = 0.1) -> Tensor:
    """APO-down (arXiv 2408.06266, eq. 8): both down, the worse one more; for answers below the model."""
    return torch.sigmoid(beta * pairs.better_ratio) + torch.sigmoid(-pairs.difference(beta))


def sppo_loss(pairs: PairLogprobs, beta: float = 0.1) -> Tensor:
    """SPPO with hard preferences (arXiv 2405.00675, eq. 4.7 with P = 1 and 0, eta = 1 / beta)."""
    return (pairs.better_ratio - 1 / (2 * beta)) ** 2 + (pairs.worse_ratio + 1 / (2 * beta)) ** 2


def nca_loss(pairs: PairLogprobs, beta: float = 0.1) -> Tensor:
    """NCA for pairs (arXiv 2402.05369, eq. 11): absolute likelihoods, so that the better one does not fall too."""
    better, worse = beta * pairs.better_ratio, beta * pairs.worse_ratio
    return -F.logsigmoid(better) - 0.5 * F.logsigmoid(-better) - 0.5 * F.logsigmoid(-worse)


def exo_loss(pairs: PairLogprobs, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """EXO for pairs (arXiv 2402.00856, eq. 16): reverse KL from the policy's preference to the smoothed label."""
    x = pairs.difference(beta)
    log_wins, log_loses = F.logsigmoid(x), F.logsigmoid(-x)
    wins = log_wins.exp() * (log_wins - math.log1p(-label_smoothing))
    return wins + log_loses.exp() * (log_loses - math.log(label_smoothing))


def bco_loss(pairs: PairLogprobs, beta: float = 0.1, delta: float | Tensor = 0.0) -> Tensor:
    """BCO (arXiv 2404.04656, eq. 10): a classifier of single rewards; ``delta`` is their running mean."""
    return -F.logsigmoid(beta * pairs.better_ratio - delta) - F.logsigmoid(delta - beta * pairs.worse_ratio)


def discopop_loss(pairs: PairLogprobs, beta: float = 0.1, tau: float = 0.05) -> Tensor:
    """DiscoPOP (arXiv 2406.08414, eq. 5): a blend of logistic and exponential loss, found by search."""
    x = pairs.difference(beta)
    exponential = (F.logsigmoid(x / tau) - x).exp()  # sigmoid(x / tau) * exp(-x), which may overflow by itself
    return torch.sigmoid(-x / tau) * -F.logsigmoid(x) + exponential


def sft_loss(pairs: PairLogprobs) -> Tensor:
    """The better completion's mean negative log-prob per token (RPO, arXiv 2404.19733, eq. 1, adds it to DPO)."""
    return -pairs.better / pairs.better_length


class PairLoss(NamedTuple):
    """A line of :data:`LOSSES`.

    Attributes:
        function: Takes :class:`PairLogprobs` and its settings by name, and returns (P,) losses.
        reference: Whether it reads log-ratios, so that a reference is needed.
        offset: Whether it reads the offset: margins and length penalties.
        per_token: Whether it compares means per token; otherwise sums.
    """

    function: Callable[..., Tensor]
    reference: bool = True
    offset: bool = True
    per_token: bool = False


#: All losses over pairs of log-probs, by name.
LOSSES: dict[str, PairLoss] = {
    "sigmoid": PairLoss(sigmoid_loss),
    "robust": PairLoss(robust_loss),
    "ipo": PairLoss(ipo_loss, offset=False, per_token=True),
    "hinge": PairLoss(hinge_loss),
    "sigmoid_norm": PairLoss(sigmoid_norm_loss, per_token=True),
    "simpo": PairLoss(simpo_loss, reference=False, per_token=True),
    "alphapo": PairLoss(alphapo_loss, reference=False, per_token=True),
    "orpo": PairLoss(orpo_loss, reference=False, offset=False, per_token=True),
    "cpo": PairLoss(cpo_loss, reference=False),
    "dpop": PairLoss(dpop_loss),
    "apo_zero": PairLoss(apo_zero_loss, offset=False),
    "apo_down": PairLoss(apo_down_loss),
    "sppo": PairLoss(sppo_loss, offset=False),
    "nca": PairLoss(nca_loss, offset=False),
    "exo": PairLoss(exo_loss),
    "bco": PairLoss(bco_loss, offset=False),
    "discopop": PairLoss(discopop_loss),
    "sft": PairLoss(sft_loss, reference=False, offset=False, per_token=True),
}
