"""Attention over a packed row without forks on a GPU: torch's ``varlen_attn``, which is flash attention.

Where no prompt of a row has two branches, as in fine-tuning, each tree is one causal sequence. Flash attention needs no
mask for these, and wastes nothing on blocks that two sequences share.

What is around the kernel is tested on a CPU with a stand-in. **It has not been run on a GPU.** Therefore, as for
:mod:`~lightning_rlhf.models.flex`, its output and gradients are compared with the loop's before it is used.

Shapes: T packed tokens, H query heads, K key / value heads, E head size.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.data.packed import Forest
from lightning_rlhf.models.kernels import compute_dtype
from lightning_rlhf.utils.transfer import send

#: Data types that flash attention has.
HALVES = (torch.float16, torch.bfloat16)


class Sequences(NamedTuple):
    """Where the sequences of a row are.

    Attributes:
        bounds: (S + 1,) int32, the first token of each, and the row's length.
        longest: Tokens of the longest one.
    """

    bounds: Tensor
    longest: int


def usable(
    query: Tensor, key: Tensor, value: Tensor, forest: Forest, softcap: float | None, dtype: torch.dtype
) -> bool:
    """Whether the kernel can compute this: a row without forks in 16 bits, on an Ampere card or a later one.

    Args:
        query: (1, H, T, E).
        key: (1, K, T, E).
        value: (1, K, T, E).
        forest: Positions of the trees.
        softcap: Bound of soft-capped logits, which the kernel does not have.
        dtype: Data type of the computation.
    """
    size = query.shape[3]
    fits = size == value.shape[3] and size % 8 == 0 and size <= 256
    return query.is_cuda and dtype in HALVES and softcap is None and fits and not _forks(forest) and _on(query.device)


def _forks(forest: Forest) -> bool:
    return any(len(branches) > 1 for _, branches in forest.trees)


@functools.cache
def _on(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0) and _kernel() is not None


@functools.cache
def _kernel() -> Callable[..., Any] | None:
    """The kernel, if this version of torch has it with windows and grouped heads."""
    try:
        kernel: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return kernel if {"window_size", "enable_gqa", "scale"} <= inspect.signature(kernel).parameters.keys() else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    forest: Forest,
    scaling: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Computes attention over a packed row in one call.

    Args:
        query: (1, H, T, E).
        key: (1, K, T, E), where K divides H.
        value: (1, K, T, E).
        forest: Positions of the trees. None forks.
        scaling: Factor on the logits. Default: ``E ** -0.5``.
        window: Number of tokens that a query sees, itself included. None: all.
        softcap: None.

    Returns:
        (1, T, H, E).
    """
    kernel = _kernel()
    assert kernel is not None
    assert softcap is None
    query, key, value = (t.to(compute_dtype(t)) for t in (query, key, value))
    bounds, longest = sequences(forest, query.device)
    out: Tensor = kernel(
        *(t[0].transpose(0, 1).contiguous() for t in (query, key, value)),
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None]


def sequences(forest: Forest, device: torch.device) -> Sequences:
    """Returns where the trees are. It is stored on the forest, so that all layers share it.

    Args:
        forest: Positions of the trees. None forks.
        device: Where the kernel runs.
    """
    name = ("sequences", device)
    if name not in forest.masks:
        lengths: Sequence[int] = [root.length + sum(b.length for b in branches) for root, branches in forest.trees]
        bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        forest.masks[name] = Sequences(send(bounds, device), max(lengths))
    found: Sequences = forest.masks[name]
    return found
