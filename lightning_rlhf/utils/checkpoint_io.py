"""Checkpoints that are whole or not there."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lightning_rlhf.utils.filesystem import sync


class CheckpointError(ValueError):
    """A checkpoint that isn't one, or not of what is to go on from it; the message says what to give instead."""


@contextmanager
def naming(path: object) -> Iterator[None]:
    """Says of a local path what it is instead of a checkpoint, where reading it fails.

    Raises:
        CheckpointError: It is a directory, empty, or no file of torch's.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(path, (str, os.PathLike)) or not os.path.exists(path) or zipfile.is_zipfile(path):
            raise
        raise CheckpointError(f"{os.fspath(path)} {_instead(Path(path))}") from error


def check_held(found: Any, path: object) -> dict[str, Any]:
    """What a file held, which torch could read, if a Trainer wrote it.

    Raises:
        CheckpointError: It holds something else, such as weights alone.
    """
    if isinstance(found, dict) and "pytorch-lightning_version" in found:
        return found
    raise CheckpointError(
        f"{path} is no checkpoint of a Trainer's: it may hold weights alone, from which fit can't go on. A model in "
        "Hugging Face form is given by its directory, as pretrained."
    )


def _instead(path: Path) -> str:
    if path.is_dir():
        if (path / "config.json").exists() or (path / "adapter_config.json").exists():
            return "is a Hugging Face directory and no checkpoint: give it as pretrained, to start a new run from it."
        if (path / "meta.ckpt").exists():
            return (
                "is a sharded checkpoint, which only fit under ColossalAI's strategy reads: lightning_rlhf.strategies."
                "checkpoints.consolidate(directory, file) makes an ordinary one of it."
            )
        inside = sorted(path.glob("**/*.ckpt"), key=os.path.getmtime)
        return f"is a directory and no checkpoint: give a file, such as {inside[-1] if inside else path / 'NAME.ckpt'}."
    if not path.stat().st_size:
        return "is empty: no checkpoint was written to it. Give another one."
    return "is no checkpoint, or a damaged one: torch can't read it. Give another one."


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, has it reach the disk, and renames it.

    Lightning's own writer makes a temporary file in the system's folder for them and moves it: where that is another
    disk the move is a copy, and a crash during it leaves half a checkpoint in place of a whole one; nor does it wait
    for the disk. This one also needs no second copy of the checkpoint in memory.

    Each write goes to ``.NAME.partial``; one that a killed process left is written over by the next. Remote paths go
    Lightning's way. What is no checkpoint is named when it is to be read.

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

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads the file.

        Args:
            path: Where from.
            map_location: As of ``torch.load``.
            weights_only: As of ``torch.load``.

        Raises:
            CheckpointError: It is no checkpoint.
            FileNotFoundError: Nothing is there.
        """
        with naming(path):
            found = super().load_checkpoint(os.fspath(path), map_location, weights_only)
        return check_held(found, path)
