"""What ranks tell each other, whatever the strategy."""

from typing import Any, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


def gather_objects(mine: _T) -> list[_T]:
    """An object of each rank, in their order, on all of them; all must call.

    Args:
        mine: What this rank gives; it must pickle.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return [mine]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, mine)
    return every
