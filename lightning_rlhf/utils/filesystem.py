"""Directories that are complete or not there at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMPLETE = ".complete"
"""Name of the empty file that is written last into a directory."""


@contextmanager
def atomic_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """A new directory to write to, that takes its name when the block ends well.

    Files reach the disk, then the marker :data:`COMPLETE`, then the name. Until then a directory of that name keeps
    what it holds, whatever happens; where the system can't swap two names at once (other than Linux), a crash in the
    instant between two renames leaves it as ``.NAME.old``, and the next call puts it back.

    Args:
        directory: The name to take.

    Yields:
        The directory to write to, beside it.

    Raises:
        FileExistsError: The name belongs to a file, or to a directory that was not written by this function.
    """
    target = Path(directory)
    partial, old = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "old"))
    if old.exists() and not target.exists():
        old.rename(target)
    check_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    partial.mkdir()
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        (partial / COMPLETE).touch()
        sync(partial / COMPLETE)
        sync(partial)
        if not target.exists():
            partial.rename(target)
        elif not _exchange(partial, target):
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        sync(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # what failed, or what was replaced


def check_replaceable(directory: str | os.PathLike[str]) -> None:
    """Refuses names under which something else would be lost.

    Raises:
        FileExistsError: A file, or a directory with content and without the marker :data:`COMPLETE`.
    """
    target = Path(directory)
    if target.is_dir() and ((target / COMPLETE).exists() or not any(target.iterdir())):
        return
    if target.exists():
        raise FileExistsError(
            f"{target} exists and was not written here (it has no file {COMPLETE}): choose another directory, or "
            "move it away."
        )


def sync(path: str | os.PathLike[str]) -> None:
    """Has the system write a file, or a directory's list of names, to the disk."""
    if os.name == "nt" and os.path.isdir(path):  # Windows opens no directories
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step; False where that can't be done."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
