"""Helpers for all packages: atomic files and directories, checkpoints, collectives, random numbers."""

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.utils.checkpoint_io import AtomicCheckpointIO, CheckpointError

_HOMES = dict.fromkeys(("AtomicCheckpointIO", "CheckpointError"), "checkpoint_io")
__all__ = ["AtomicCheckpointIO", "CheckpointError"]

__getattr__ = loader(__name__, _HOMES)
