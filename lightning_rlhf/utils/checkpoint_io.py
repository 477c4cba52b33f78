"""Writes checkpoints atomically, and explains files that are not checkpoints."""

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
    """A file is not a checkpoint, or does not fit the run; the message says what to use instead."""


@contextmanager
def explain_bad_checkpoint(path: object) -> Iterator[None]:
    """Within it, an error in reading a local path is replaced by an explanation of what the path is.

    Raises:
        CheckpointError: The path is a directory, an empty file, or a file that torch cannot read.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(path, (str, os.PathLike)) or not os.path.exists(path) or zipfile.is_zipfile(path):
            raise
        raise CheckpointError(f"{os.fspath(path)} {_explain(Path(path))}") from error


def check_is_checkpoint(found: Any, path: object) -> dict[str, Any]:
    """Returns the content of a file if a Trainer wrote it.

    Raises:
        CheckpointError: The file holds something else, such as weights only.
    """
    if isinstance(found, dict) and "pytorch-lightning_version" in found:
        return found
    raise CheckpointError(
        f"{path} is not a Trainer's checkpoint. It may hold only weights, from which fit cannot resume. To start from "
        "a Hugging Face model, set pretrained to its directory."
    )


def _explain(path: Path) -> str:
    if path.is_dir():
        if (path / "config.json").exists() or (path / "adapter_config.json").exists():
            return "is a Hugging Face model, not a checkpoint. Set pretrained to it to start a new run from it."
        if (path / "meta.ckpt").exists():
            return (
                "is a sharded checkpoint, which only fit under ColossalAI's strategy reads. Convert it with "
                "lightning_rlhf.strategies.checkpoints.consolidate(directory, file)."
            )
        inside = sorted(path.glob("**/*.ckpt"), key=os.path.getmtime)
        return f"is a directory, not a checkpoint. Give a file, such as {inside[-1] if inside else path / 'NAME.ckpt'}."
    if not path.stat().st_size:
        return "is an empty file. Give another checkpoint."
    return "is not a checkpoint, or it is damaged: torch cannot read it. Give another one."


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a file beside its target, waits for the disk, and renames the file.

    Lightning's writer moves a file from the system's temporary directory. If that is on another disk, the move is a
    copy, and a crash during it replaces a complete checkpoint by an incomplete one. It also does not wait for the disk,
    and needs a second copy of the checkpoint in memory.

    Each checkpoint is first written to ``.NAME.partial``. If a killed process leaves this file, the next write replaces
    it. Remote paths are written by Lightning's writer. Reading a file that is not a checkpoint raises an error that
    says what the file is.

    Use it as ``Trainer(plugins=[AtomicCheckpointIO()])``, or in YAML::

        trainer:
          plugins:
          - class_path: lightning_rlhf.utils.AtomicCheckpointIO

    :class:`~lightning_rlhf.callbacks.SaveOnInterrupt` replaces Lightning's default writer by it.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Writes the file. When it returns, the complete file is on the disk.

        Args:
            checkpoint: An object for ``torch.save``.
            path: Path of the file.
            storage_options: Must be None, as for Lightning's writer.

        Raises:
            TypeError: ``storage_options`` is not None.
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
            path: Path of the file.
            map_location: See ``torch.load``.
            weights_only: See ``torch.load``.

        Raises:
            CheckpointError: The file is not a checkpoint.
            FileNotFoundError: The file does not exist.
        """
        with explain_bad_checkpoint(path):
            found = super().load_checkpoint(os.fspath(path), map_location, weights_only)
        return check_is_checkpoint(found, path)
