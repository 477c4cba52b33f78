"""Log-probs of a data set's scored tokens under a reference, computed once and kept in a file by content."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_rlhf.data.errors import DataError
from lightning_rlhf.data.packed import PackedBatch, Size
from lightning_rlhf.data.planner import PlannedLoader
from lightning_rlhf.data.token_cache import SizedRows

#: Raise it when the same tokens would get other log-probs.
_VERSION = 1


class ReferenceLogprobs:
    """Log-probs of all scored tokens of a part of the data, fp32, memory-mapped.

    A file that is being made holds zeros where nothing is known yet, and a log-prob of 0 is written as -0. So a run
    that was killed, or a machine that lost its power, leaves a file that the next run completes.

    Args:
        folder: Where files are kept.
        rows: The part's rows.
        key: What the log-probs depend on besides the rows: the reference's weights, their precision.
    """

    def __init__(self, folder: Path, rows: SizedRows, key: str) -> None:
        digest = hashlib.sha256(f"{_VERSION}\0{rows.key}\0{key}".encode()).hexdigest()[:40]
        self.path, self._partial = folder / f"{digest}.logprobs", folder / f"{digest}.partial"
        counts = rows.sizes[:, Size.NAMES.index("tokens")].astype(np.int64)
        self._ends = np.concatenate([[0], np.cumsum(counts)])
        self._found: NDArray[np.float32] | None = None

    @property
    def complete(self) -> bool:
        """Whether all log-probs are there."""
        return not self._ends[-1] or (self.path.exists() and self.path.stat().st_size == 4 * self._ends[-1])

    def make(
        self, loader: PlannedLoader, score: Callable[[PackedBatch], Tensor], progress: Callable[[int], None]
    ) -> None:
        """Computes what is missing of this rank's share. All ranks write to one file.

        Args:
            loader: Gives each row once, as :meth:`TreeDataModule.every_row` does.
            score: Computes (N,) log-probs of a batch's scored tokens.
            progress: Called with the number of batches that are done.

        Raises:
            DataError: The folder can't be written, or a log-prob is not finite.
        """
        with self._writing():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self._partial, "ab") as file:
                file.truncate(4 * int(self._ends[-1]))  # as long as it was, or longer by zeros
            made = os.open(self._partial, os.O_RDWR)
        try:  # no memory map: where the disk is full, writing to one ends the process without a word
            for done, batch in enumerate(loader, 1):
                spans = [(int(self._ends[row]), int(self._ends[row + 1])) for row in batch.rows]
                if not all(_known(_read(made, *span)) for span in spans):
                    found = score(batch).float().cpu()
                    if not found.isfinite().all():
                        raise DataError(
                            f"The reference's log-probs of the rows {_shown(batch.rows)} are not all finite."
                        )
                    values = np.where(found.numpy() == 0, np.float32(-0.0), found.numpy())
                    places = np.cumsum([0, *(end - start for start, end in spans)])
                    with self._writing():
                        for (start, _), (first, last) in zip(spans, pairwise(places.tolist()), strict=True):
                            _write(made, start, values[first:last])
                progress(done)
            with self._writing():
                os.fsync(made)
        finally:
            os.close(made)

    def finish(self) -> None:
        """Gives the file its name, once all ranks have made their shares.

        Raises:
            DataError: Some are missing: the ranks do not share the folder.
        """
        if self.complete:  # another run was first; its log-probs are the same
            self._partial.unlink(missing_ok=True)
            return
        made = np.memmap(self._partial, np.float32, "r+")
        if not _known(made):
            raise DataError(
                f"{self._partial} lacks the log-probs of other ranks. Set data.cache_dir to a folder that all machines "
                "share."
            )
        with open(self._partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self._partial, self.path)

    def __call__(self, batch: PackedBatch) -> Tensor:
        """(N,) log-probs of a batch's scored tokens, on its device.

        Raises:
            ValueError: The batch does not belong to this part.
        """
        if not batch.rows:  # a planner's filler
            if batch.weight.any():
                raise ValueError("reference: precomputed needs batches of a data module, which know their rows.")
            return torch.zeros(batch.num_scored, device=batch.target.device)
        if self._found is None:
            self._found = np.memmap(self.path, np.float32, "r")
        parts = [self._found[self._ends[row] : self._ends[row + 1]] for row in batch.rows]
        found = torch.from_numpy(np.concatenate(parts))
        if len(found) != batch.num_scored:
            raise ValueError(f"{len(found)} log-probs do not fit a batch of {batch.num_scored} scored tokens.")
        return found.to(batch.target.device)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Says which folder can't be written.

        Raises:
            DataError: It can't.
        """
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self.path.parent} can't be written: {error.strerror or error}. Set data.cache_dir, or "
                "LIGHTNING_RLHF_CACHE in the environment, to a folder that can."
            ) from error


def _read(file: int, start: int, end: int) -> NDArray[np.float32]:
    return np.frombuffer(os.pread(file, 4 * (end - start), 4 * start), np.float32)


def _write(file: int, start: int, values: NDArray[np.float32]) -> None:
    if os.pwrite(file, values.tobytes(), 4 * start) != values.nbytes:  # the next one would raise it
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _known(values: NDArray[np.float32]) -> bool:
    return bool(values.view(np.int32).all())  # -0 has a bit


def _shown(rows: tuple[int, ...]) -> str:
    return ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
