"""Collectives that work with any strategy."""

from typing import Any, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


def gather_objects(mine: _T) -> list[_T]:
    """Gathers an object from each rank, in the order of ranks, on all ranks. All ranks must call it.

    Args:
        mine: This rank's object, which must be picklable.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every
