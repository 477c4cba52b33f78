"""Whole and sharded checkpoints of boosted children."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_rlhf.strategies.sharded import Boosted, LocalShard, Slot
from lightning_rlhf.utils.collectives import all_ranks, gather_objects
from lightning_rlhf.utils.filesystem import COMPLETE, atomic_directory, sync

#: Name of the Lightning checkpoint in a sharded directory. The ranks' files hold the rest.
META = "meta.ckpt"


def _is_sharded(name: str, value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and name != "step" and value.numel() == size


def group_settings(boosted: Boosted) -> dict[str, Any]:
    """Returns an optimizer's state without its tensors: the settings of its parameter groups."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in boosted.groups]
    numbered = [{**g, "params": indices} for g, indices in zip(groups, boosted.indices, strict=True)]
    return {"state": {}, "param_groups": numbered}


def optimizer_state(boosted: Boosted) -> dict[str, Any]:
    """Gathers the state of a child's optimizer in the format of ``torch.optim``. Only the first rank gets tensors."""
    held = [(slot, boosted.local_shard(slot)) for slot in boosted.slots]
    states = [{} if shard is None else boosted.state(shard.key) for _, shard in held]
    kinds: dict[str, bool] = {}
    mine = {
        name: _is_sharded(name, value, shard.weight.numel())
        for (_, shard), state in zip(held, states, strict=True)
        if shard is not None
        for name, value in state.items()
    }
    for found in gather_objects(mine, boosted.ranks):
        kinds |= found
    # -1: this rank does not have the state
    scalars = torch.full((len(kinds), len(held)), -1.0, dtype=torch.float64)
    for row, name in enumerate(kinds):
        for column, state in enumerate(states):
            if name in state:
                scalars[row, column] = 0.0 if kinds[name] else float(state[name])
    scalars = scalars.to(boosted.device)
    dist.all_reduce(scalars, dist.ReduceOp.MAX, group=boosted.ranks.group)
    whole: dict[int, dict[str, Any]] = {}
    for column, (slot, _) in enumerate(held):
        entry: dict[str, Any] = {}
        for row, (name, sharded) in enumerate(kinds.items()):
            value = scalars[row, column].item()
            if value >= 0:
                part = lambda shard, name=name: boosted.state(shard.key)[name]  # noqa: E731
                entry[name] = boosted.gather(slot, part) if sharded else torch.tensor(value, dtype=torch.float32)
        if entry:
            whole[slot.number] = entry
    gathered: dict[str, Any] = {**group_settings(boosted), "state": whole if boosted.ranks.place == 0 else {}}
    if boosted.cuts is not None:
        gathered = boosted.cuts.whole_optimizer_state(gathered, parameters(boosted))
    return {**gathered, "state": gathered["state"] if dist.get_rank() == 0 else {}}


def parameters(boosted: Boosted) -> list[Tensor]:
    """Returns all parameters of a child's optimizer, in the order of their numbers."""
    return [p for group in boosted.group_parameters for p in group]


def _fill_states(
    boosted: Boosted, saved: Sequence[dict[str, Any]], read: Callable[[Slot, LocalShard], dict[str, Any]]
) -> None:
    """Sets the parameter groups and states of an optimizer.

    Args:
        boosted: The child of the optimizer.
        saved: Settings of its parameter groups.
        read: Returns the states of a shard by name, as (size,) tensors or scalars; empty if there are none.

    Raises:
        ValueError: They belong to a different optimizer.
    """
    sizes = [len(group["params"]) for group in saved]
    if sizes != [len(indices) for indices in boosted.indices]:
        raise ValueError(
            f"The optimizer of {boosted.path!r} has parameter groups of {[len(i) for i in boosted.indices]} "
            f"parameters, but in the checkpoint they have {sizes}. Resume with the model and the optimizer that wrote "
            "the checkpoint."
        )
    for group, former in zip(boosted.groups, saved, strict=True):
        group.update({name: value for name, value in former.items() if name != "params"})
    boosted.wrapped.optim.state.clear()
    for slot in boosted.slots:
        shard = boosted.local_shard(slot)
        state = {} if shard is None else read(slot, shard)
        if shard is None or not state:
            continue
        own = {}
        for name, value in state.items():
            if _is_sharded(name, value, shard.size):
                own[name] = torch.zeros_like(shard.weight)
                own[name][: shard.size] = value
            else:
                own[name] = _scalar(boosted, value)
        boosted.wrapped.optim.state[shard.key] = own


def _scalar(boosted: Boosted, value: Any) -> Any:
    """Returns a step count in the type that the optimizer uses."""
    if type(boosted.wrapped.optim).__module__.startswith("colossalai"):
        return int(value)
    return value.detach().clone() if isinstance(value, Tensor) else value


def load_optimizer_state(boosted: Boosted, saved: dict[str, Any]) -> None:
    """Loads this rank's shards of a whole optimizer state.

    Raises:
        ValueError: The state belongs to a different optimizer.
    """
    if boosted.cuts is not None and not saved["state"].keys() - range(len(parameters(boosted))):
        saved = boosted.cuts.part_optimizer_state(saved, parameters(boosted))

    def read(slot: Slot, shard: LocalShard) -> dict[str, Any]:
        return {
            name: value.reshape(-1)[shard.start : shard.start + shard.size]
            if _is_sharded(name, value, slot.shape.numel())
            else value
            for name, value in saved["state"].get(slot.number, {}).items()
        }

    _fill_states(boosted, saved["param_groups"], read)


# ------------------------------------------------------------------------------------------------- directories


def save_sharded(boosted: Sequence[Boosted], checkpoint: dict[str, Any], directory: str, write_meta: Any) -> None:
    """Writes a directory with one file per rank. All ranks must call it.

    The directory gets its name when all files are on the disk. Until then an older directory of that name stays.

    Args:
        boosted: The children.
        checkpoint: The Lightning checkpoint without the children's weights and states.
        directory: The directory, on a disk that all ranks share.
        write_meta: Writes ``checkpoint`` to a path.

    Raises:
        OSError: A rank could not write, or the path is taken by something else. All ranks raise it.
    """
    first = dist.get_rank() == 0
    error: Exception | None = None
    with ExitStack() as stack:
        folder: list[Any] = [None]
        try:
            if first:
                folder = [stack.enter_context(atomic_directory(directory))]
        except OSError as problem:
            error = problem
        _raise_on_all_ranks(error, directory)
        dist.broadcast_object_list(folder, 0)
        try:
            file = folder[0] / f"rank-{dist.get_rank():05d}-of-{dist.get_world_size():05d}.pt"
            torch.save([_local_state(b) for b in boosted], file)
            sync(file)
            if first:
                write_meta(checkpoint, folder[0] / META)
        except (OSError, RuntimeError) as problem:  # torch raises RuntimeError if the disk is full
            error = problem
        _raise_on_all_ranks(error, directory)
    dist.barrier()


def _raise_on_all_ranks(error: Exception | None, target: str) -> None:
    """Raises an error on all ranks if one rank failed, so that no rank waits for it."""
    every = gather_objects(None if error is None else f"{type(error).__name__}: {error}", all_ranks())
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(every) if text is not None]
    if failed:
        raise OSError(f"{target} was not written ({'; '.join(failed)}). An older one is still complete.") from error


def _local_state(boosted: Boosted) -> dict[str, Any]:
    found = {}
    for slot in boosted.slots:
        shard = boosted.local_shard(slot)
        if shard is None or (shard.replicated and dist.get_rank() > 0):
            continue
        state = {
            name: value[: shard.size].detach().cpu().clone()
            if _is_sharded(name, value, shard.weight.numel())
            else value
            for name, value in boosted.state(shard.key).items()
        }
        found[slot.name] = {
            "start": shard.start,
            "weight": shard.weight[: shard.size].detach().cpu().clone(),
            "state": state,
        }
    return {"shards": found, "slots": [(s.name, s.number, tuple(s.shape)) for s in boosted.slots]}


class ShardedCheckpoint:
    """A directory that :func:`save_sharded` wrote, with any number of ranks and any plugin.

    Args:
        directory: The directory.

    Raises:
        FileNotFoundError: The directory is missing or incomplete.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not (self.directory / COMPLETE).exists():
            raise FileNotFoundError(
                f"{directory} is not a complete sharded checkpoint, because it has no file {COMPLETE}. Use another one."
            )

    @cached_property
    def files(self) -> list[list[dict[str, Any]]]:
        """The content of each rank's file. Tensors are read from the disk when they are used."""
        names = sorted(self.directory.glob("rank-*.pt"))
        return [torch.load(name, map_location="cpu", mmap=True, weights_only=True) for name in names]

    def read(self, number: int, name: str, start: int, size: int, state: str | None = None) -> Tensor:
        """Reads a (size,) part of a flattened parameter or of one of its optimizer states.

        Args:
            number: Index of the child.
            name: Name of the parameter.
            start: First element of the part.
            size: Number of elements.
            state: Name of the optimizer state. None: the weights.

        Raises:
            ValueError: The checkpoint does not have the parameter.
        """
        parts, covered = [], 0
        for shard in self._saved_shards(number, name):
            value = shard["weight"] if state is None else shard["state"][state]
            a, b = max(start, shard["start"]), min(start + size, shard["start"] + len(value))
            if a < b:
                parts.append((a - start, value[a - shard["start"] : b - shard["start"]]))
                covered += b - a
        if covered != size:
            raise ValueError(
                f"{self.directory} does not have {name!r}: another model wrote it. Resume with that model."
            )
        out = torch.empty(size, dtype=parts[0][1].dtype) if parts else torch.empty(0)
        for at, part in parts:
            out[at : at + len(part)] = part
        return out

    def _saved_shards(self, number: int, name: str) -> list[dict[str, Any]]:
        files = (file[number]["shards"] for file in self.files)
        return [shards[name] for shards in files if name in shards]

    def states(self, number: int, name: str) -> dict[str, Any]:
        """Returns a parameter's optimizer states: None for a tensor of the parameter's size, otherwise the value."""
        held = self._saved_shards(number, name)
        shard = held[0] if held else {"state": {}, "weight": ()}
        size = len(shard["weight"])
        return {k: None if _is_sharded(k, v, size) else v for k, v in shard["state"].items()}

    def load_weights(self, number: int, boosted: Boosted) -> None:
        """Loads a child's weights on this rank."""
        for slot in boosted.slots:
            boosted.set_value(slot, partial(self.read, number, slot.name))

    def load_optimizer(self, number: int, boosted: Boosted, settings: Sequence[dict[str, Any]]) -> None:
        """Loads a child's optimizer states on this rank."""

        def read(slot: Slot, shard: LocalShard) -> dict[str, Any]:
            return {
                name: self.read(number, slot.name, shard.start, shard.size, name) if value is None else value
                for name, value in self.states(number, slot.name).items()
            }

        _fill_states(boosted, settings, read)


def consolidate(directory: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Converts a sharded directory to an ordinary Lightning checkpoint.

    Args:
        directory: A sharded checkpoint.
        file: The checkpoint to write.

    Raises:
        FileNotFoundError: The directory is missing or incomplete.
    """
    from lightning_rlhf.utils import AtomicCheckpointIO

    source = ShardedCheckpoint(directory)
    checkpoint: dict[str, Any] = torch.load(source.directory / META, map_location="cpu", weights_only=True)
    for number, (path, aliases) in enumerate(checkpoint.pop("boosted")):
        states: dict[int, dict[str, Any]] = {}
        for name, index, shape in source.files[0][number]["slots"]:
            size = torch.Size(shape).numel()
            value = source.read(number, name, 0, size).view(shape)
            for alias in aliases[name]:
                checkpoint["state_dict"][f"{path}.{alias}" if path else alias] = value
            states[index] = {
                k: source.read(number, name, 0, size, k).view(shape) if v is None else torch.as_tensor(float(v))
                for k, v in source.states(number, name).items()
            }
        checkpoint["optimizer_states"][number]["state"] = {i: s for i, s in states.items() if s}
    AtomicCheckpointIO().save_checkpoint(checkpoint, file)


def aliases(boosted: Boosted) -> dict[str, list[str]]:
    """Returns all names of each parameter. Tied weights have several."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in boosted.child.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {slot.name: by_id[id(slot.parameter)] for slot in boosted.slots}


def whole_weights(boosted: Boosted, exact: bool) -> dict[str, Tensor]:
    """Gathers all trained weights of a child by all their names on rank 0. All ranks must call it.

    Args:
        boosted: The child.
        exact: Keep the optimizer's fp32 weights, to resume from. Otherwise weights get their original data type.
    """
    found: dict[str, Tensor] = {}
    names = aliases(boosted)
    boosted.sync_master_weights()
    for slot in boosted.slots:
        value = boosted.gather(slot, lambda shard: shard.weight)
        if value is not None and boosted.cuts is not None:
            value = boosted.cuts.whole_slices(slot.parameter, value)
        if value is not None:
            found |= dict.fromkeys(
                names[slot.name], value if exact and boosted.master_weights else value.to(slot.dtype)
            )
    return found
