"""Progress in lines, for files and pipes."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar


class Lines(ProgressBar):
    """A progress bar that prints a line each time another quarter of a run of ``max_steps`` is done."""

    def __init__(self) -> None:
        super().__init__()
        self._began = 0.0
        self._quarter = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._began, self._quarter = time.perf_counter(), 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Prints, where a quarter ended."""
        done, of = trainer.global_step, trainer.max_steps
        if trainer.is_global_zero and of > 0 and 4 * done // of > self._quarter:
            self._quarter = 4 * done // of
            print(f"   step {done} of {of}, {time.perf_counter() - self._began:.0f} s", flush=True)
