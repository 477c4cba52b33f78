"""Writes files and directories atomically: they are complete, or they do not exist."""

from __future__ import annotations

import ctypes
import errno
import gzip
import itertools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

COMPLETE = ".complete"
"""Name of the empty file that is written last and marks a complete directory."""


@contextmanager
def atomic_directory(directory: str | os.PathLike[str]) -> Iterator[Path]:
    """Makes a new directory that gets its name when the context ends without an error.

    First its files reach the disk, then the marker :data:`COMPLETE`, then the name. Until then an older directory of
    that name is unchanged. If the system cannot swap two names at once (all systems except Linux), a crash between two
    renames leaves the older directory as ``.NAME.old``, and the next call restores it.

    Args:
        directory: Path that the directory gets.

    Yields:
        The directory to write to.

    Raises:
        FileExistsError: The path is taken by a file, or by a directory that this function did not write.
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
        shutil.rmtree(partial, ignore_errors=True)  # a failed write, or the replaced directory


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[str]]:
    """Makes a UTF-8 text file that gets its name when the context ends without an error.

    Until then an older file of that name is unchanged.

    Args:
        path: Path that the file gets; ``.gz`` at its end compresses it.

    Yields:
        The file to write to.

    Raises:
        OSError: The file can't be written; a full disk is told with its path.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    try:
        with (
            gzip.open(partial, "wt", encoding="utf-8")
            if target.suffix == ".gz"
            else partial.open("w", encoding="utf-8", newline="\n") as file
        ):
            yield file
        sync(partial)
        os.replace(partial, target)
        sync(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and error.filename is None:
            error.filename = os.fspath(target)  # a write names no file
        raise
    finally:
        partial.unlink(missing_ok=True)


def check_replaceable(directory: str | os.PathLike[str]) -> None:
    """Checks that a path does not exist, or is an empty directory or one with the marker :data:`COMPLETE`.

    Raises:
        FileExistsError: The path is a file, or another directory, whose content would be lost.
    """
    target = Path(directory)
    if target.is_dir() and ((target / COMPLETE).exists() or not any(target.iterdir())):
        return
    if target.exists():
        raise FileExistsError(
            f"{target} exists and is not an export or a checkpoint (it has no file {COMPLETE}). Choose another "
            "directory, or move it away."
        )


def check_writable(path: str | os.PathLike[str], who: str, setting: str) -> None:
    """Checks that a file can be written, before time is spent on its content. Nothing is left on the disk.

    Args:
        path: Path of the file. Folders that do not exist yet are made when it is written.
        who: What will write it, for the message.
        setting: The setting that holds the path, for the message.

    Raises:
        OSError: The path is a directory, or no file can be made in its folder.
    """
    target = Path(path).absolute()
    folder = next(parent for parent in target.parents if parent.exists())
    try:
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"{folder} is a file" if not folder.is_dir() else error.strerror
        raise type(error)(f"{who}: {path} can't be written: {reason}. Set {setting} to another path.") from None


def free_name(path: str | os.PathLike[str]) -> Path:
    """Returns the first of ``NAME.1.SUFFIX``, ``NAME.2.SUFFIX`` and so on, beside a path, that does not exist."""
    target = Path(path).resolve()
    names = (target.with_name(f"{target.stem}.{number}{target.suffix}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


def move_aside(path: str | os.PathLike[str]) -> Path | None:
    """Renames a file of an earlier run, if there is one, so that a new run does not replace it.

    Returns:
        Its new path, by :func:`free_name`; None if there is no file.
    """
    if not Path(path).exists():
        return None
    old = free_name(path)
    os.replace(path, old)
    return old


def sync(path: str | os.PathLike[str]) -> None:
    """Waits until a file, or a directory's list of names, is on the disk."""
    if os.name == "nt" and os.path.isdir(path):  # Windows cannot open directories
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names atomically. Returns False if the system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
