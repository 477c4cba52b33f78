"""Collectives that work with any strategy; with one process each returns what it is given.

Where several ranks run one copy of a model together (tensor, pipeline or sequence parallelism), they read the same
data. Data parallelism is then between the copies, and so are these functions: a rank exchanges with the ranks that have
its place in the other copies. The strategy says so with :func:`set_copies`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

_T = TypeVar("_T")


class Ranks(NamedTuple):
    """Ranks that exchange with each other.

    Attributes:
        members: Their numbers in the world, in order.
        place: Place of this process among them.
        group: Their process group. None: all processes.
    """

    members: tuple[int, ...]
    place: int
    group: Any = None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.members)


_data: Ranks | None = None
_copy: Ranks | None = None
_replicas: Ranks | None = None


def set_copies(data: Ranks | None, copy: Ranks | None, replicas: Ranks | None = None) -> None:
    """Says which ranks have different data, and which run one copy of a model together.

    Args:
        data: This rank, and those at its place in the other copies. None: all ranks have different data.
        copy: This rank, and those that run its copy of the model with it. None: each rank runs its own.
        replicas: This rank, and those that hold the same weights. None: those of ``data``.
    """
    global _data, _copy, _replicas
    _data, _copy, _replicas = data, copy, replicas


def all_ranks() -> Ranks:
    """All processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks((0,), 0)
    return Ranks(tuple(range(dist.get_world_size())), dist.get_rank())


def data_ranks() -> Ranks:
    """Ranks that have different data, with this one: all, unless several run one copy of a model."""
    return all_ranks() if _data is None else _data


def replica_ranks() -> Ranks:
    """Ranks that hold the same weights as this one, whose gradients are averaged.

    Under sequence parallelism several ranks of a copy do. Each computes a part of the gradient, and multiplies it by
    their number, so that averages are right.
    """
    return data_ranks() if _replicas is None else _replicas


def holds_part() -> bool:
    """Whether this rank runs a copy of a model together with others."""
    return _copy is not None


def data_size() -> int:
    """Number of ranks with different data."""
    return data_ranks().size


def data_rank() -> int:
    """Place of this process among the ranks with different data."""
    return data_ranks().place


def gather_objects(mine: _T, ranks: Ranks | None = None) -> list[_T]:
    """Gathers an object from each rank, in the order of ranks, on all ranks. All ranks must call it.

    Args:
        mine: This rank's object, which must be picklable.
        ranks: The ranks. Default: :func:`data_ranks`.
    """
    ranks = ranks or data_ranks()
    if ranks.size == 1:
        return [mine]
    every: list[Any] = [None] * ranks.size
    dist.all_gather_object(every, mine, group=ranks.group)
    return every


def all_reduce(values: Tensor, device: torch.device, operation: Any = None) -> Tensor:
    """Sums a small tensor over ranks with different data. All ranks must call it.

    Args:
        values: Any shape.
        device: Where ranks exchange tensors.
        operation: Another ``torch.distributed.ReduceOp`` in place of the sum.

    Returns:
        The reduced tensor, on the CPU where there are several ranks.
    """
    if data_size() == 1:
        return values
    values = values.to(device, copy=True)
    dist.all_reduce(values, operation or dist.ReduceOp.SUM, group=data_ranks().group)
    return values.cpu()


def gather_tensors(values: Tensor, device: torch.device) -> Tensor:
    """Gathers a small tensor from each of R ranks with different data to (R, ...). All ranks must call it.

    Args:
        values: The same shape on all ranks.
        device: Where ranks exchange tensors.
    """
    if data_size() == 1:
        return values[None]
    values = values.to(device)
    found = [torch.empty_like(values) for _ in range(data_size())]
    dist.all_gather(found, values, group=data_ranks().group)
    return torch.stack(found).cpu()


def once_per_copy(compute: Callable[[], _T], together: bool = False) -> _T:
    """Computes what the ranks that run one copy of a model must agree on, such as the verdict of a judge.

    Args:
        compute: Returns a picklable object without tensors on a GPU. The first rank of each copy calls it.
        together: All ranks of the copy call it, because it runs a model that they hold together. The first one's result
            counts all the same.

    Returns:
        The first rank's result, on all ranks of the copy.

    Raises:
        RuntimeError: The first rank failed. That rank raises its own error.
    """
    return compute() if _copy is None else _by_first(compute, _copy, together)


def once_for_all(compute: Callable[[], _T]) -> _T:
    """Computes what all ranks must agree on. All ranks must call it.

    Args:
        compute: Returns a picklable object without tensors on a GPU. The first rank calls it.

    Returns:
        The first rank's result, on all ranks.

    Raises:
        RuntimeError: The first rank failed. That rank raises its own error.
    """
    ranks = all_ranks()
    return compute() if ranks.size == 1 else _by_first(compute, ranks)


def _by_first(compute: Callable[[], _T], ranks: Ranks, together: bool = False) -> _T:
    result: Any = None
    error: Exception | None = None
    if together or ranks.place == 0:
        try:
            result = compute()
        except Exception as problem:  # the other ranks wait for the result
            error = problem
    said = [(result, None if error is None else f"{type(error).__name__}: {error}")] if ranks.place == 0 else [None]
    dist.broadcast_object_list(said, ranks.members[0], group=ranks.group)
    if error is not None:
        raise error
    result, failure = cast(Any, said[0])
    if failure is not None:
        raise RuntimeError(f"Rank {ranks.members[0]} failed. {failure}")
    return cast(_T, result)
