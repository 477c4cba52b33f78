"""Groups of ranks by axis: those with different data, and those that hold one copy of a model together."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from lightning_rlhf.utils.collectives import Ranks


class Mesh(NamedTuple):
    """This rank's place in the grid of all ranks.

    Attributes:
        data: Ranks that hold the same part of the model as this one, and read other data.
        tensor: Ranks that hold the other slices of this rank's layers, and read the same data.
    """

    data: Ranks
    tensor: Ranks


def make_mesh(tensor: int, timeout: timedelta) -> Mesh:
    """Makes the process groups. All ranks must call it.

    Args:
        tensor: Number of ranks that hold one copy of the model. They follow each other, so that they share a machine.
        timeout: Maximum time of a collective.
    """
    return Mesh(**make_axes({"data": dist.get_world_size() // tensor, "tensor": tensor}, timeout))


def make_axes(sizes: Mapping[str, int], timeout: timedelta) -> dict[str, Ranks]:
    """Arranges all ranks in a grid, and makes a process group of each of its lines. All ranks must call it.

    Args:
        sizes: Length of the grid along each axis, by name. Ranks that differ in the last axis only are neighbors.
        timeout: Maximum time of a collective.

    Returns:
        For each axis, the line through this rank.
    """
    grid = torch.arange(dist.get_world_size()).reshape(*sizes.values())
    found: dict[str, Ranks] = {}
    for axis, (name, size) in enumerate(sizes.items()):
        for line in grid.movedim(axis, -1).reshape(-1, size).tolist():
            group = dist.new_group(line, timeout=timeout)  # also for other ranks' lines
            if dist.get_rank() in line:
                found[name] = Ranks(tuple(line), line.index(dist.get_rank()), group)
    return found
