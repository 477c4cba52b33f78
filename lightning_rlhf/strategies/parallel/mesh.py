"""Groups of ranks by axis: those with different data, and those that run one copy of a model together.

All ranks are a grid, data x pipe x sequence x tensor. Ranks that differ in the last axis only are neighbors, and those
of a copy follow each other: they exchange most, so they should share a machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from lightning_rlhf.utils.collectives import Ranks


class Mesh(NamedTuple):
    """This rank's place in the grid of all ranks, as the ranks of each line or plane through it.

    Attributes:
        data: Ranks that do what this one does in the other copies, with other data.
        pipe: Ranks with the other stages of this rank's copy.
        sequence: Ranks with the other stretches of this rank's rows.
        tensor: Ranks with the other slices of this rank's layers.
        copy: Ranks that run this rank's copy of the model with it, on the same data: pipe x sequence x tensor.
        replicas: Ranks that hold the same weights as this one: data x sequence. The plugins act between them.
    """

    data: Ranks
    pipe: Ranks
    sequence: Ranks
    tensor: Ranks
    copy: Ranks
    replicas: Ranks


#: Axes of the grid that each group runs along.
_ALONG: dict[str, tuple[int, ...]] = {
    "data": (0,),
    "pipe": (1,),
    "sequence": (2,),
    "tensor": (3,),
    "copy": (1, 2, 3),
    "replicas": (0, 2),
}


def make_mesh(timeout: timedelta, *, pipe: int = 1, sequence: int = 1, tensor: int = 1) -> Mesh:
    """Makes the process groups. All ranks must call it.

    Args:
        timeout: Maximum time of a collective.
        pipe: Number of stages of a copy.
        sequence: Number of stretches of a row.
        tensor: Number of slices of a layer.
    """
    shape = (dist.get_world_size() // (pipe * sequence * tensor), pipe, sequence, tensor)
    grid = torch.arange(dist.get_world_size()).reshape(shape)
    groups: dict[tuple[int, ...], Any] = {}
    found: dict[str, Ranks] = {}
    for name, along in _ALONG.items():
        across = [axis for axis in range(len(shape)) if axis not in along]
        for line in grid.permute(*across, *along).reshape(-1, math.prod(shape[axis] for axis in along)).tolist():
            members = tuple(line)
            if members not in groups:  # all ranks make all groups, in the same order
                groups[members] = dist.new_group(line, timeout=timeout)
            if dist.get_rank() in members:
                found[name] = Ranks(members, members.index(dist.get_rank()), groups[members])
    return Mesh(**found)


def check_world(sizes: Mapping[str, int], world: int) -> None:
    """Checks that a number of processes is a whole number of copies.

    Args:
        sizes: Number of ranks of a copy along each axis, by the name of its argument.
        world: Number of processes.

    Raises:
        ValueError: It is not; the message has the numbers that would do.
    """
    product = math.prod(sizes.values())
    if world % product:
        given = " x ".join(f"{name}={size}" for name, size in sizes.items() if size > 1)
        fits = [str(k) for k in range(1, world + 1) if world % k == 0]
        raise ValueError(
            f"{given} does not divide the {world} processes of the run (trainer.devices x trainer.num_nodes). Use a "
            f"multiple of {product} processes, or a product of {' or '.join(fits)}."
        )
