"""Attention of one token per row that reads each row's own keys and no more, by torch's kernel for CUDA devices.

Shapes: R rows, C columns, H query heads, K key / value heads, E head size.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

varlen_attn: Any
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None


def own_length_attention(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, window: int | None, scale: float | None
) -> Tensor:
    """Attends from the last of each row's tokens.

    Args:
        query: (R, H, 1, E).
        key: (R, K, C, E), where K divides H, contiguous.
        value: (R, K, C, E).
        lengths: (R,) int32 number of the row's keys.
        window: Number of tokens that a query sees, itself included. None: all.
        scale: Factor on the logits. None: ``E ** -0.5``.

    Returns:
        (R, H, 1, E) outputs.
    """
    rows, shared, columns, size = key.shape
    count = rows * shared  # each key head is a sequence of its own, which the query heads that share it ask
    starts = torch.arange(count + 1, dtype=torch.int32, device=key.device)
    out: Tensor = varlen_attn(
        query.reshape(count, -1, size),
        key.reshape(count * columns, 1, size),
        value.reshape(count * columns, 1, size),
        starts,
        starts * columns,
        1,
        columns,
        scale=scale,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        enable_gqa=True,
        seqused_k=lengths.repeat_interleave(shared, output_size=count),
    )
    return out.reshape(query.shape)


@lru_cache(maxsize=8)
def reads_own_lengths(device: torch.device, dtype: torch.dtype, size: int, groups: int) -> bool:
    """Whether :func:`own_length_attention` serves; it is tried once for each kind of heads.

    Args:
        device: The device.
        dtype: Type of the keys.
        size: E.
        groups: Query heads per key head.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and varlen_attn is not None and is_right(device, dtype, size, groups)


def is_right(device: torch.device, dtype: torch.dtype, size: int, groups: int) -> bool:
    """Compares :func:`own_length_attention` with masked attention, on random rows of unlike lengths."""
    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, heads, length, size, generator=draw).to(device, dtype)
        for heads, length in ((2 * groups, 1), (2, 40), (2, 40))
    )
    lengths = torch.tensor([40, 1, 17], dtype=torch.int32, device=device)
    columns = torch.arange(40, device=device)
    for window in (None, 5):
        seen = columns < lengths[:, None]
        if window is not None:
            seen &= columns >= lengths[:, None] - window
        want = F.scaled_dot_product_attention(query, key, value, seen[:, None, None], enable_gqa=True)
        try:
            got = own_length_attention(query, key, value, lengths, window, None)
        except (NotImplementedError, RuntimeError, TypeError, ValueError):  # the kernel's own conditions
            return False
        if not float((got - want).norm() / want.norm()) < 0.02:
            return False
    return True
