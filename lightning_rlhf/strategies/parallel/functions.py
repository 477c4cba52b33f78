"""Exchanges within a forward and a backward pass, and the parts of a dimension that is cut over ranks."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rlhf.utils.collectives import Ranks


def part_of(size: int, ranks: Ranks, index: int | None = None) -> tuple[int, int]:
    """Returns start and length of a rank's part of a dimension. Parts may differ by one.

    Args:
        size: Length of the whole dimension.
        ranks: The ranks that it is cut over.
        index: Place of the rank. Default: this one's.

    Example:
        >>> [part_of(5, Ranks((0, 1), i)) for i in (0, 1)]
        [(0, 3), (3, 2)]
    """
    index = ranks.place if index is None else index
    start, end = (-(-size * i // ranks.size) for i in (index, index + 1))
    return start, end - start


def join(part: Tensor, dim: int, size: int, ranks: Ranks) -> Tensor:
    """Gathers the parts of a tensor on all ranks.

    Args:
        part: This rank's.
        dim: The dimension that is cut.
        size: Its whole length.
        ranks: The ranks that it is cut over.
    """
    parts = [part_of(size, ranks, i) for i in range(ranks.size)]
    widest = max(length for _, length in parts)
    held = part.movedim(dim, 0)
    padded = held.new_zeros(widest, *held.shape[1:])  # collectives want equal sizes
    padded[: len(held)] = held
    found = [torch.empty_like(padded) for _ in parts]
    dist.all_gather(found, padded, group=ranks.group)
    whole = torch.cat([piece[:length] for piece, (_, length) in zip(found, parts, strict=True)])
    return whole.movedim(0, dim).contiguous()


def sum_gradients(x: Tensor, ranks: Ranks) -> Tensor:
    """Returns ``x``; its gradient is summed over ranks, each of which goes on with a part of the layers that read it.

    It is *f* of Shoeybi et al. 2019 (Megatron-LM), section 3.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return cast(Tensor, _SumGradients.apply(x, ranks))  # type: ignore[no-untyped-call]


def sum_outputs(x: Tensor, ranks: Ranks) -> Tensor:
    """Sums ``x`` over ranks, each of which has a part of the sum; the gradient passes. It is *g* of Megatron-LM."""
    return cast(Tensor, _SumOutputs.apply(x, ranks))  # type: ignore[no-untyped-call]


def join_outputs(x: Tensor, size: int, ranks: Ranks) -> Tensor:
    """Gathers parts of the last dimension; the gradient is cut again."""
    return cast(Tensor, _JoinOutputs.apply(x, size, ranks))  # type: ignore[no-untyped-call]


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may use it elsewhere
        dist.all_reduce(gradient, group=ctx.ranks.group)
        return gradient, None


class _SumOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ranks: Ranks) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=ranks.group)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _JoinOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, ranks: Ranks) -> Tensor:
        ctx.part = part_of(size, ranks)
        return join(x, -1, size, ranks)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.narrow(-1, *ctx.part), None, None
