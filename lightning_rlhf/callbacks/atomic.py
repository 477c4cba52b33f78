"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_rlhf.models.saving import sync


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, has it reach the disk, and renames it.

    Lightning's own writer makes a temporary file in the system's folder for them and moves it: where that is another
    disk the move is a copy, and a crash during it leaves half a checkpoint in place of a whole one; nor does it wait
    for the disk. This one also needs no second copy of the checkpoint in memory.

    Each write goes to ``.NAME.partial``; one that a killed process left is written over by the next. Remote paths go
    Lightning's way.

    Use it as ``Trainer(plugins=[AtomicCheckpointIO()])``, or in YAML::

        trainer:
          plugins:
          - class_path: lightning_rlhf.callbacks.AtomicCheckpointIO

    :class:`~lightning_rlhf.callbacks.SaveOnInterrupt` puts it in the place of Lightning's default by itself.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes the file; when this returns it is on the disk, whole.

        Args:
            checkpoint: What ``torch.save`` takes.
            path: Where to.
            storage_options: Must be None, as in Lightning's own.

        Raises:
            TypeError: ``storage_options`` was given.
        """
        filesystem, local = url_to_fs(str(path))
        if storage_options is not None or not isinstance(filesystem, LocalFileSystem):
            super().save_checkpoint(checkpoint, os.fspath(path), storage_options)
            return
        target = Path(local)
        partial = target.with_name(f".{target.name}.partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.save(checkpoint, partial)
            sync(partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        sync(target.parent)
