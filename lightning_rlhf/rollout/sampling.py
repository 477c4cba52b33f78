"""Samples the next token of every row, each from its own logits and its own key.

A token is the arg max of scores minus the log of exponential noise (the Gumbel trick), which samples from their
softmax. The noise of (key, token) comes from a hash and not from a generator, so a row's token does not depend on the
other rows of its batch, and rounding changes a token only if two sums tie. (With one uniform number and an inverse CDF,
rounding would change a token whenever the number falls close to the border of two unlikely tokens.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_rlhf.rollout.sequence import ActiveSequence
from lightning_rlhf.rollout.transfer import take_rows, to_device, to_lists

_CHUNK = 2**18
"""Number of noise elements that a CPU makes at once, so that they stay in its cache."""
NUCLEUS = 1024
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
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)).contiguous()
    if any(s.temperature not in (0, 1) for s in settings):
        scaled = scaled / _column((s.temperature or 1.0 for s in settings), scaled.dtype, scaled.device)
    with _processed(scaled, rows):
        token = _sample(scaled, rows)
    return to_lists(token, scaled.log_softmax(-1).gather(1, token[:, None])[:, 0])


def _sample(scores: Tensor, rows: Sequence[ActiveSequence]) -> Tensor:
    """Samples (S,) tokens from (S, V) scores."""
    device = scores.device
    greedy = [i for i, row in enumerate(rows) if row.sampling.temperature == 0]
    cut = [
        i for i, row in enumerate(rows) if (s := row.sampling).temperature > 0 and (s.top_k or s.top_p < 1 or s.min_p)
    ]
    plain = sorted({*range(len(rows))} - {*greedy, *cut})
    found = []
    if greedy:
        found.append(take_rows(scores, greedy).argmax(-1))
    if plain:
        found.append(draw(take_rows(scores, plain), _keys([rows[i] for i in plain], device)))
    if cut:
        found.append(_sample_likeliest(take_rows(scores, cut), [rows[i] for i in cut]))
    order = [*greedy, *plain, *cut]
    place = sorted(range(len(order)), key=order.__getitem__)
    return take_rows(torch.cat(found), place)


def likeliest_tokens(logits: Tensor, row: ActiveSequence) -> list[tuple[int, float]]:
    """Returns the ``row.alternatives`` likeliest tokens, with the log-probs that :func:`sample_tokens` reports.

    Args:
        logits: (V,), in any float type.
        row: The sequence.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / (row.sampling.temperature or 1.0)
    values, ids = scaled.log_softmax(-1).topk(min(row.alternatives, len(logits)))
    return list(zip(*to_lists(ids, values), strict=True))


@contextmanager
def _processed(scores: Tensor, rows: Sequence[ActiveSequence]) -> Iterator[None]:
    """Within it, (S, V) scores have penalties, biases and minimum length applied, in place.

    They change few columns, which get their scores back afterwards: a copy of all scores would take longer.
    """
    width = scores.shape[1]
    edited = [(i, edits) for i, row in enumerate(rows) if (edits := row.edits) is not None]
    barred = [i * width + token for i, row in enumerate(rows) if row.too_short for token in row.stops]
    if not edited and not barred:
        yield
        return
    columns = np.hstack([*(np.asarray(edits.ids) + i * width for i, edits in edited), np.array(barred, np.int64)])
    tables = [
        np.stack([edits.penalties, edits.shifts, np.full(len(edits.ids), rows[i].sampling.temperature or 1.0)])
        for i, edits in edited
    ]
    penalty, shift, temperature = to_device(np.hstack([np.empty((3, 0)), *tables]), scores.device, scores.dtype)
    at = to_device(columns, scores.device)
    flat = scores.view(-1)
    before = flat[at]
    old = before[: len(penalty)]
    flat.scatter_(0, at[: len(old)], torch.where(old < 0, old * penalty, old / penalty) + shift / temperature)
    flat.index_fill_(0, at[len(old) :], -torch.inf)
    try:
        yield
    finally:
        flat.scatter_(0, at, before)


def _sample_likeliest(scores: Tensor, rows: Sequence[ActiveSequence]) -> Tensor:
    """Samples (S,) tokens from (S, V) scores under top-k, top-p and min-p."""
    vocabulary = scores.shape[1]
    limits = [row.sampling.top_k or vocabulary for row in rows]
    cut = Cut(
        _column(limits, torch.long, scores.device),
        _column((row.sampling.top_p for row in rows), scores.dtype, scores.device),
        _column((row.sampling.min_p for row in rows), scores.dtype, scores.device),
    )
    width = min(vocabulary, max(NUCLEUS, *(k for k in limits if k < vocabulary), 1))
    keys = _keys(rows, scores.device)
    token, open_ended = draw_likeliest(scores, keys, cut, width)
    # so flat that the nucleus needs more tokens
    wider = [i for i, f in enumerate(open_ended.tolist()) if f] if width < vocabulary <= max(limits) else []
    if wider:
        at = to_device(wider, token.device)
        these = Cut(*(limit[at] for limit in cut))
        token.index_copy_(0, at, draw_likeliest(scores[at], keys[at], these, vocabulary)[0])
    return token


class Cut(NamedTuple):
    """Limits of what is sampled from, each (S, 1).

    Attributes:
        top_k: Number of likeliest tokens; V for all.
        top_p: Sum of probabilities; 1 for all.
        min_p: Least share of the likeliest token's probability; 0 for all.
    """

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


def draw(scores: Tensor, keys: Tensor) -> Tensor:
    """Samples (S,) tokens from (S, V) scores, by (S, 1) noise keys. No device is waited for."""
    ids = _mixed_ids(scores.shape[1], scores.device)
    chunk = max(1, _CHUNK // scores.shape[1]) if scores.device.type == "cpu" else max(1, len(scores))
    parts = zip(scores.split(chunk), keys.split(chunk), strict=True)
    return torch.cat([(part - _log_exponential(own, ids)).argmax(-1) for part, own in parts])


def draw_likeliest(scores: Tensor, keys: Tensor, cut: Cut, width: int) -> tuple[Tensor, Tensor]:
    """Samples tokens among the ``width`` likeliest. No device is waited for.

    Args:
        scores: (S, V).
        keys: (S, 1) noise keys.
        cut: The limits.
        width: Number of tokens that are sorted. At least the largest ``top_k`` below V.

    Returns:
        (S,) tokens, and (S,) whether a token beyond the sorted ones may belong to those to sample from.
    """
    vocabulary = scores.shape[1]
    best, index = scores.topk(width)
    # rounding may bring the sum of probabilities to 1 before the last token
    top_p = cut.top_p.masked_fill(cut.top_p >= 1, torch.inf)
    least = best[:, :1] + cut.min_p.log()
    best = best.masked_fill(torch.arange(width, device=scores.device) >= cut.top_k, -torch.inf)
    all_count = cut.top_k >= vocabulary
    whole = torch.where(all_count, scores.logsumexp(-1, keepdim=True), best.logsumexp(-1, keepdim=True))
    mass = (best - whole).exp()
    summed = mass.cumsum(-1)
    kept = best.masked_fill((summed - mass >= top_p) | (best < least), -torch.inf)
    noise = _log_exponential(keys, _mixed_ids(vocabulary, scores.device)[index])
    token = index.gather(1, (kept - noise).argmax(-1, keepdim=True))[:, 0]
    return token, (all_count & (summed[:, -1:] < top_p) & (best[:, -1:] >= least))[:, 0]


def _column(values: Iterable[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns (S, 1) settings of rows."""
    return _kept_column(tuple(values), dtype, device)


@lru_cache(maxsize=8)
def _kept_column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return to_device(values, device, dtype)[:, None]


# ------------------------------------------------------------------------------------------------- noise


def _keys(rows: Sequence[ActiveSequence], device: torch.device) -> Tensor:
    """Returns (S, 1) noise keys of rows."""
    signed = [(key := row.noise_key) - (key >> 31 << 32) for row in rows]
    return to_device(signed, device, torch.int32)[:, None]


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
