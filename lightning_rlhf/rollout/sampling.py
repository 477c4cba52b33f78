"""Samples the next token of every row, each from its own logits and its own key.

A token is the arg max of scores minus the log of exponential noise (the Gumbel trick), which samples from their
softmax. The noise of (key, token) comes from a hash and not from a generator, so a row's token does not depend on the
other rows of its batch, and rounding changes a token only if two sums tie. (With one uniform number and an inverse CDF,
rounding would change a token whenever the number falls close to the border of two unlikely tokens.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from lightning_rlhf.rollout.sequence import ActiveSequence

_CHUNK = 2**18
"""Number of noise elements that a CPU makes at once, so that they stay in its cache."""
_NUCLEUS = 1024
"""Number of likeliest tokens that top-p sorts first: sorting a whole vocabulary takes longer than the model's head."""


def sample_tokens(logits: Tensor, rows: Sequence[ActiveSequence]) -> tuple[list[int], list[float]]:
    """Samples the next token of each row.

    Args:
        logits: (S, V), in any float type.
        rows: S sequences.

    Returns:
        S tokens, and their log-probs at the temperature, before any other processor, in fp32. The log-prob of a row
        whose logits are not finite is NaN, and its token means nothing.
    """
    settings = [row.sampling for row in rows]
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if any(s.temperature not in (0, 1) for s in settings):
        scaled = scaled / scaled.new_tensor([s.temperature or 1.0 for s in settings])[:, None]
    scores = _process_scores(scaled, rows)
    token = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    greedy = [i for i, s in enumerate(settings) if s.temperature == 0]
    cut = [i for i, s in enumerate(settings) if s.temperature > 0 and (s.top_k or s.top_p < 1 or s.min_p)]
    plain = sorted({*range(len(rows))} - {*greedy, *cut})
    if greedy:
        token[greedy] = scores[_span(greedy)].argmax(-1)
    chunk = max(1, _CHUNK // scores.shape[1]) if logits.device.type == "cpu" else len(rows)
    ids = _mixed_ids(scores.shape[1], logits.device)
    for start in range(0, len(plain), chunk):
        part = plain[start : start + chunk]
        token[part] = (scores[_span(part)] - _log_exponential(_keys(rows, part, ids), ids)).argmax(-1)
    if cut:
        token[cut] = _sample_likeliest(scores[_span(cut)], [rows[i] for i in cut], ids)
    logprobs: list[float] = scaled.log_softmax(-1).gather(1, token[:, None])[:, 0].tolist()
    return token.tolist(), logprobs


def likeliest_tokens(logits: Tensor, row: ActiveSequence) -> list[tuple[int, float]]:
    """Returns the ``row.alternatives`` likeliest tokens, with the log-probs that :func:`sample_tokens` reports.

    Args:
        logits: (V,), in any float type.
        row: The sequence.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (row.sampling.temperature or 1.0)
    values, ids = scaled.log_softmax(-1).topk(min(row.alternatives, len(logits)))
    return list(zip(ids.tolist(), values.tolist(), strict=True))


def _span(indices: list[int]) -> slice | list[int]:
    """Returns consecutive indices as a slice, which copies nothing."""
    first, last = indices[0], indices[-1]
    return slice(first, last + 1) if last - first + 1 == len(indices) else indices


def _process_scores(scaled: Tensor, rows: Sequence[ActiveSequence]) -> Tensor:
    """Applies penalties, biases and minimum length; returns ``scaled`` itself if there is nothing to apply."""
    penalized = [i for i, row in enumerate(rows) if row.sampling.repetition_penalty != 1]
    shifted = [(i, shifts) for i, row in enumerate(rows) if (shifts := _shifts(row))]
    short = [i for i, row in enumerate(rows) if row.too_short and row.stops]
    if not penalized and not shifted and not short:
        return scaled
    scores = scaled.clone()
    if penalized:
        longest = max(rows[i].position + 1 for i in penalized)
        seen = [[*rows[i].prompt, *rows[i].ids] for i in penalized]
        columns = torch.tensor([ids + ids[-1:] * (longest - len(ids)) for ids in seen], device=scores.device)
        lines = torch.tensor(penalized, device=scores.device)[:, None]
        penalty = scores.new_tensor([rows[i].sampling.repetition_penalty for i in penalized])[:, None]
        old = scores[lines, columns]
        scores[lines, columns] = torch.where(old < 0, old * penalty, old / penalty)
    for i, shifts in shifted:
        scores[i, list(shifts)] += scores.new_tensor(list(shifts.values())) / (rows[i].sampling.temperature or 1.0)
    for i in short:
        scores[i, list(rows[i].stops)] = -torch.inf
    return scores


def _shifts(row: ActiveSequence) -> dict[int, float]:
    """Returns what to add to the logits of single tokens, by token id."""
    s = row.sampling
    shifts = dict(s.logit_bias)
    if s.presence_penalty or s.frequency_penalty:
        for token, count in Counter(row.ids).items():
            shifts[token] = shifts.get(token, 0.0) - s.presence_penalty - s.frequency_penalty * count
    return shifts


def _sample_likeliest(scores: Tensor, rows: Sequence[ActiveSequence], ids: Tensor, width: int = _NUCLEUS) -> Tensor:
    """Samples (S,) tokens from (S, V) scores under top-k, top-p and min-p, among the ``width`` likeliest tokens."""
    vocabulary = scores.shape[1]
    limits = [row.sampling.top_k or vocabulary for row in rows]
    width = min(vocabulary, max(width, *(k for k in limits if k < vocabulary), 1))
    best, index = scores.topk(width)
    limit = torch.tensor(limits, device=scores.device)[:, None]
    # rounding may bring the sum of probabilities to 1 before the last token
    top_p = scores.new_tensor([p if (p := row.sampling.top_p) < 1 else torch.inf for row in rows])[:, None]
    least = best[:, :1] + scores.new_tensor([row.sampling.min_p for row in rows])[:, None].log()
    best = best.masked_fill(torch.arange(width, device=scores.device) >= limit, -torch.inf)
    whole = torch.where(limit < vocabulary, best.logsumexp(-1, keepdim=True), scores.logsumexp(-1, keepdim=True))
    mass = (best - whole).exp()
    summed = mass.cumsum(-1)
    kept = best.masked_fill((summed - mass >= top_p) | (best < least), -torch.inf)
    noise = _log_exponential(_keys(rows, range(len(rows)), ids), ids[index])
    token = index.gather(1, (kept - noise).argmax(-1, keepdim=True))[:, 0]
    open_ended = (limit >= vocabulary) & (summed[:, -1:] < top_p) & (best[:, -1:] >= least)
    flat = open_ended if width < vocabulary else None
    if flat is not None and flat.any():  # so flat that the nucleus needs more tokens
        wider: list[int] = flat[:, 0].nonzero()[:, 0].tolist()
        token[wider] = _sample_likeliest(scores[wider], [rows[i] for i in wider], ids, vocabulary)
    return token


# ------------------------------------------------------------------------------------------------- noise


def _keys(rows: Sequence[ActiveSequence], which: Sequence[int], ids: Tensor) -> Tensor:
    """Returns (len(which), 1) noise keys of rows."""
    signed = [(key := rows[i].noise_key) - (key >> 31 << 32) for i in which]
    return torch.tensor(signed, dtype=torch.int32, device=ids.device)[:, None]


@lru_cache(maxsize=8)
def _mixed_ids(vocabulary: int, device: torch.device) -> Tensor:
    """Returns (V,) int32 hashes of token ids."""
    return _mix(torch.arange(1, vocabulary + 1, dtype=torch.int32, device=device))


def _mix(x: Tensor) -> Tensor:
    """Hashes int32 in place with the multiply and xor-shift rounds of "lowbias32". Products wrap on all devices."""
    x *= 2146121005
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= -2073254261
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _log_exponential(keys: Tensor, ids: Tensor) -> Tensor:
    """Returns the log of standard exponential noise, which is standard Gumbel noise with the opposite sign.

    Args:
        keys: (S, 1) int32.
        ids: (K,) or (S, K) int32 hashes of tokens.

    Returns:
        (S, K) fp32, a function of each pair of key and token. It is computed from u in (0, 1) with 31 bits. Small u are
        exact, because they decide whether an unlikely token is sampled.
    """
    u = _mix(keys ^ ids).bitwise_and_(0x7FFFFFFF).float().add_(0.5).mul_(-(2.0**-31) * (1 - 2.0**-24))
    return u.log1p_().neg_().log_()
