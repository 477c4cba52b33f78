"""Collectives that work with any strategy; with one process each returns what it is given."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")


def world_size() -> int:
    """Number of processes that work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_objects(mine: _T) -> list[_T]:
    """Gathers an object from each rank, in the order of ranks, on all ranks. All ranks must call it.

    Args:
        mine: This rank's object, which must be picklable.
    """
    if world_size() == 1:
        return [mine]
    every: list[Any] = [None] * world_size()
    dist.all_gather_object(every, mine)
    return every


def all_reduce(values: Tensor, device: torch.device, operation: Any = None) -> Tensor:
    """Sums a small tensor over ranks. All ranks must call it.

    Args:
        values: Any shape.
        device: Where ranks exchange tensors.
        operation: Another ``torch.distributed.ReduceOp`` in place of the sum.

    Returns:
        The reduced tensor, on the CPU where there are several ranks.
    """
    if world_size() == 1:
        return values
    values = values.to(device, copy=True)
    dist.all_reduce(values, operation or dist.ReduceOp.SUM)
    return values.cpu()


def gather_tensors(values: Tensor, device: torch.device) -> Tensor:
    """Gathers a small tensor from each of R ranks to (R, ...). All ranks must call it.

    Args:
        values: The same shape on all ranks.
        device: Where ranks exchange tensors.
    """
    if world_size() == 1:
        return values[None]
    values = values.to(device)
    found = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(found, values)
    return torch.stack(found).cpu()
