"""Whole and sharded forms of what boosted children hold."""

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
from lightning_rlhf.utils.collectives import gather_objects
from lightning_rlhf.utils.filesystem import COMPLETE, atomic_directory, sync

#: The Lightning checkpoint in a sharded directory, without what the ranks' files hold.
META = "meta.ckpt"


def _is_sharded(name: str, value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and name != "step" and value.numel() == size


def settings(boosted: Boosted) -> dict[str, Any]:
    """An optimizer's state without its tensors: the settings of its groups."""
    groups = [{k: v for k, v in group.items() if k != "params"} for group in boosted.groups]
    numbered = [{**g, "params": indices} for g, indices in zip(groups, boosted.indices, strict=True)]
    return {"state": {}, "param_groups": numbered}


def optimizer_state(boosted: Boosted) -> dict[str, Any]:
    """The whole state of a child's optimizer as ``torch.optim``'s own, on rank 0, elsewhere without tensors."""
    held = [(slot, boosted.piece(slot)) for slot in boosted.slots]
    states = [{} if piece is None else boosted.state(piece.key) for _, piece in held]
    kinds: dict[str, bool] = {}
    mine = {
        name: _is_sharded(name, value, piece.weight.numel())
        for (_, piece), state in zip(held, states, strict=True)
        if piece is not None
        for name, value in state.items()
    }
    for found in gather_objects(mine):
        kinds |= found
    # -1: this rank has no state of it
    scalars = torch.full((len(kinds), len(held)), -1.0, dtype=torch.float64)
    for row, name in enumerate(kinds):
        for column, state in enumerate(states):
            if name in state:
                scalars[row, column] = 0.0 if kinds[name] else float(state[name])
    scalars = scalars.to(boosted.device)
    dist.all_reduce(scalars, dist.ReduceOp.MAX)
    whole: dict[int, dict[str, Any]] = {}
    for column, (slot, _) in enumerate(held):
        entry: dict[str, Any] = {}
        for row, (name, sharded) in enumerate(kinds.items()):
            value = scalars[row, column].item()
            if value >= 0:
                part = lambda piece, name=name: boosted.state(piece.key)[name]  # noqa: E731
                entry[name] = boosted.collect(slot, part) if sharded else torch.tensor(value, dtype=torch.float32)
        if entry:
            whole[slot.number] = entry
    return {**settings(boosted), "state": whole if dist.get_rank() == 0 else {}}


def _fill_states(
    boosted: Boosted, saved: Sequence[dict[str, Any]], read: Callable[[Slot, LocalShard], dict[str, Any]]
) -> None:
    """Sets an optimizer's groups and states.

    Args:
        boosted: Whose.
        saved: Settings of its groups.
        read: The states of a piece by name, (size,) where they are as large as it; empty where there are none.

    Raises:
        ValueError: They are another optimizer's.
    """
    sizes = [len(group["params"]) for group in saved]
    if sizes != [len(indices) for indices in boosted.indices]:
        raise ValueError(
            f"The checkpoint's optimizer of {boosted.place!r} has parameter groups of {sizes} parameters, this one of "
            f"{[len(indices) for indices in boosted.indices]}: it was made by another model or optimizer."
        )
    for group, former in zip(boosted.groups, saved, strict=True):
        group.update({name: value for name, value in former.items() if name != "params"})
    boosted.wrapped.optim.state.clear()
    for slot in boosted.slots:
        piece = boosted.piece(slot)
        state = {} if piece is None else read(slot, piece)
        if piece is None or not state:
            continue
        own = {}
        for name, value in state.items():
            if _is_sharded(name, value, piece.size):
                own[name] = torch.zeros_like(piece.weight)
                own[name][: piece.size] = value
            else:
                own[name] = _scalar(boosted, value)
        boosted.wrapped.optim.state[piece.key] = own


def _scalar(boosted: Boosted, value: Any) -> Any:
    """A step count, as the optimizer counts."""
    if type(boosted.wrapped.optim).__module__.startswith("colossalai"):
        return int(value)
    return value.detach().clone() if isinstance(value, Tensor) else value


def load_optimizer_state(boosted: Boosted, saved: dict[str, Any]) -> None:
    """Takes this rank's pieces of a whole state.

    Raises:
        ValueError: It is another optimizer's.
    """

    def read(slot: Slot, piece: LocalShard) -> dict[str, Any]:
        return {
            name: value.reshape(-1)[piece.start : piece.start + piece.size]
            if _is_sharded(name, value, slot.shape.numel())
            else value
            for name, value in saved["state"].get(slot.number, {}).items()
        }

    _fill_states(boosted, saved["param_groups"], read)


# ------------------------------------------------------------------------------------------------- directories


def save_sharded(boosted: Sequence[Boosted], checkpoint: dict[str, Any], directory: str, write_meta: Any) -> None:
    """Writes a directory of one file a rank; all ranks must call.

    It takes its name when all files are on the disk, and a former one of that name stays whole until then.

    Args:
        boosted: The children.
        checkpoint: All else.
        directory: On a disk that all ranks see.
        write_meta: Writes the checkpoint to a path.

    Raises:
        OSError: A rank could not write, or the name belongs to something else; the same on all ranks.
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
        _agree(error, directory)
        dist.broadcast_object_list(folder, 0)
        try:
            torch.save([_pieces(b) for b in boosted], file := folder[0] / _name(dist.get_rank(), dist.get_world_size()))
            sync(file)
            if first:
                write_meta(checkpoint, folder[0] / META)
        except (OSError, RuntimeError) as problem:  # torch's writer raises the latter where a disk is full
            error = problem
        _agree(error, directory)
    dist.barrier()


def _name(rank: int, ranks: int) -> str:
    return f"rank-{rank:05d}-of-{ranks:05d}.pt"


def _agree(error: Exception | None, target: str) -> None:
    """Raises on all ranks where one met an error, so that none waits for it."""
    every = gather_objects(None if error is None else f"{type(error).__name__}: {error}")
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(every) if text is not None]
    if failed:
        raise OSError(f"{target} was not written ({'; '.join(failed)}). What was there before is whole.") from error


def _pieces(boosted: Boosted) -> dict[str, Any]:
    found = {}
    for slot in boosted.slots:
        piece = boosted.piece(slot)
        if piece is None or (piece.replicated and dist.get_rank() > 0):
            continue
        state = {
            name: value[: piece.size].detach().cpu().clone()
            if _is_sharded(name, value, piece.weight.numel())
            else value
            for name, value in boosted.state(piece.key).items()
        }
        found[slot.name] = {
            "start": piece.start,
            "weight": piece.weight[: piece.size].detach().cpu().clone(),
            "state": state,
        }
    return {"pieces": found, "slots": [(s.name, s.number, tuple(s.shape)) for s in boosted.slots]}


class Shards:
    """A directory that :func:`save_sharded` wrote, by whatever number of ranks under whichever plugin.

    Args:
        directory: The directory.

    Raises:
        FileNotFoundError: It isn't complete.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        if not (self.directory / COMPLETE).exists():
            raise FileNotFoundError(f"{directory} is no complete sharded checkpoint: it has no file {COMPLETE}.")

    @cached_property
    def files(self) -> list[list[dict[str, Any]]]:
        """What each rank wrote; tensors are read from the disk when they are used."""
        names = sorted(self.directory.glob("rank-*.pt"))
        return [torch.load(name, map_location="cpu", mmap=True, weights_only=True) for name in names]

    def read(self, number: int, name: str, start: int, size: int, state: str | None = None) -> Tensor:
        """(size,) part of a flattened parameter, or of one of its states.

        Args:
            number: Which child.
            name: Of the parameter.
            start: Of the part.
            size: Of the part.
            state: Of the optimizer; None: the weights.

        Raises:
            ValueError: It isn't there.
        """
        parts, covered = [], 0
        for piece in self._held(number, name):
            value = piece["weight"] if state is None else piece["state"][state]
            a, b = max(start, piece["start"]), min(start + size, piece["start"] + len(value))
            if a < b:
                parts.append((a - start, value[a - piece["start"] : b - piece["start"]]))
                covered += b - a
        if covered != size:
            raise ValueError(f"{self.directory} lacks {name!r}: it was made by another model.")
        out = torch.empty(size, dtype=parts[0][1].dtype) if parts else torch.empty(0)
        for at, part in parts:
            out[at : at + len(part)] = part
        return out

    def _held(self, number: int, name: str) -> list[dict[str, Any]]:
        files = (file[number]["pieces"] for file in self.files)
        return [pieces[name] for pieces in files if name in pieces]

    def states(self, number: int, name: str) -> dict[str, Any]:
        """The optimizer's states of a parameter: None where they are as large as it, else the value."""
        held = self._held(number, name)
        piece = held[0] if held else {"state": {}, "weight": ()}
        size = len(piece["weight"])
        return {k: None if _is_sharded(k, v, size) else v for k, v in piece["state"].items()}

    def load_weights(self, number: int, boosted: Boosted) -> None:
        """Fills a child's pieces, and what its forward passes read."""
        for slot in boosted.slots:
            boosted.put(slot, partial(self.read, number, slot.name))

    def load_optimizer(self, number: int, boosted: Boosted, settings: Sequence[dict[str, Any]]) -> None:
        """Fills a child's optimizer states."""

        def read(slot: Slot, piece: LocalShard) -> dict[str, Any]:
            return {
                name: self.read(number, slot.name, piece.start, piece.size, name) if value is None else value
                for name, value in self.states(number, slot.name).items()
            }

        _fill_states(boosted, settings, read)


def consolidate(directory: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
    """Makes one ordinary Lightning checkpoint out of a sharded directory.

    Args:
        directory: A sharded checkpoint.
        file: The checkpoint to write.

    Raises:
        FileNotFoundError: The directory isn't complete.
    """
    from lightning_rlhf.utils.checkpoint_io import AtomicCheckpointIO

    shards = Shards(directory)
    checkpoint: dict[str, Any] = torch.load(shards.directory / META, map_location="cpu", weights_only=True)
    for number, (place, aliases) in enumerate(checkpoint.pop("boosted")):
        states: dict[int, dict[str, Any]] = {}
        for name, index, shape in shards.files[0][number]["slots"]:
            size = torch.Size(shape).numel()
            value = shards.read(number, name, 0, size).view(shape)
            for alias in aliases[name]:
                checkpoint["state_dict"][f"{place}.{alias}"] = value
            states[index] = {
                k: shards.read(number, name, 0, size, k).view(shape) if v is None else torch.as_tensor(float(v))
                for k, v in shards.states(number, name).items()
            }
        checkpoint["optimizer_states"][number]["state"] = {i: s for i, s in states.items() if s}
    AtomicCheckpointIO().save_checkpoint(checkpoint, file)


def aliases(boosted: Boosted) -> dict[str, list[str]]:
    """All names of each parameter: tied weights have several."""
    by_id: dict[int, list[str]] = {}
    for name, parameter in boosted.child.named_parameters(remove_duplicate=False):
        by_id.setdefault(id(parameter), []).append(name)
    return {slot.name: by_id[id(slot.parameter)] for slot in boosted.slots}


def whole_weights(boosted: Boosted, exact: bool) -> dict[str, Tensor]:
    """All trained weights of a child by all their names, on rank 0; elsewhere none. All ranks must call.

    Args:
        boosted: The child.
        exact: As the optimizer steps them, to resume from; else in the number type that they came in.
    """
    found: dict[str, Tensor] = {}
    names = aliases(boosted)
    boosted.adopt()
    for slot in boosted.slots:
        value = boosted.collect(slot, lambda piece: piece.weight)
        if value is not None:
            found |= dict.fromkeys(
                names[slot.name], value if exact and boosted.master_weights else value.to(slot.dtype)
            )
    return found
