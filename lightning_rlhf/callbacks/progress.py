"""Progress bars that show the whole run, in a terminal, a notebook or a file."""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, TextIO

import lightning.pytorch as L
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

_KINDS = ("train", "val", "test", "predict")
#: Number of progress lines per run in a file.
_LINES = 20


class _WholeRun(ProgressBar):
    """Counts the steps of the run instead of the batches of an epoch.

    A run with ``max_steps`` has no fixed number of epochs, and an epoch of PPO is only a few iterations. So a bar per
    epoch would show neither the length of the run nor the time left.
    """

    _total: int | None = None
    _begun = False

    @property
    def total_train_batches(self) -> int | float:
        """Steps of the run, or batches of an epoch if the run has no end."""
        return super().total_train_batches if self._total is None else self._total

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Computes the number of steps."""
        steps = trainer.estimated_stepping_batches
        self._total, self._begun = int(steps) if math.isfinite(steps) and steps > 0 else None, False
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Starts the bar in the first epoch, and keeps it in later ones."""
        if self._total is None:
            super().on_train_epoch_start(trainer, pl_module)
        self._begin_once(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Starts the bar if the run is resumed within an epoch: Lightning then does not call on_train_epoch_start."""
        self._begin_once(trainer, pl_module)

    def _begin_once(self, trainer: Any, pl_module: Any) -> None:
        if self._total is not None and not self._begun:
            self.begin(trainer.global_step, self._total, step_name(pl_module))
        self._begun = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Shows the finished step."""
        done = batch_idx if self._total is None else trainer.global_step - 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done)

    def begin(self, step: int, total: int, what: str) -> None:
        """Draws the bar at the start: a resumed run starts at ``step``, and its speed counts new steps only."""


class RunTQDMProgressBar(_WholeRun, TQDMProgressBar):
    """tqdm's bar for the whole run."""

    def begin(self, step: int, total: int, what: str) -> None:
        """Resets the bar."""
        bar = self.train_progress_bar
        bar.reset(total)
        bar.initial = bar.n = step
        bar.set_description(what)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Keeps the bar open, because it covers all epochs."""
        if self._total is None:
            super().on_train_epoch_end(trainer, pl_module)


class RunRichProgressBar(_WholeRun, RichProgressBar):
    """rich's bar for the whole run."""

    def begin(self, step: int, total: int, what: str) -> None:
        """Adds the bar."""
        if self.progress is not None:
            # rich forgets steps older than 30 s: with longer iterations it could not estimate the time left
            self.progress.speed_estimate_period = math.inf
            self.train_progress_bar_id = self.progress.add_task(what, total=total, completed=step)


class LineProgressBar(_WholeRun):
    """Prints a line at intervals, for outputs where a line cannot be overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self._from, self._since, self._shown = 0, 0.0, -1

    def disable(self) -> None:
        """Stops printing."""
        self.enabled = False

    def enable(self) -> None:
        """Resumes printing."""
        self.enabled = True

    def begin(self, step: int, total: int, what: str) -> None:
        """Starts the clock."""
        self._from, self._since, self._shown, self._what = step, time.perf_counter(), step, what

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Prints a line after each twentieth of the run."""
        step, total = trainer.global_step, self._total
        if not self.enabled or total is None or step * _LINES // total == self._shown * _LINES // total:
            return
        self._shown = step
        passed = time.perf_counter() - self._since
        left = passed / max(1, step - self._from) * (total - step)
        metrics = self.get_metrics(trainer, pl_module).items()
        shown = ", ".join(f"{k}={f'{v:.4g}' if isinstance(v, float) else v}" for k, v in metrics)
        times = "<".join(str(timedelta(seconds=round(seconds))) for seconds in (passed, left))
        print(f"{self._what} {step}/{total} [{times}] {shown}".rstrip(), flush=True)


def step_name(module: Any) -> str:
    """Returns the word for a module's steps."""
    return "Steps" if module.automatic_optimization else "Iterations"


def whole_run_bar(bar: L.Callback) -> L.Callback:
    """Replaces a progress bar of Lightning by one that shows the whole run and fits the output.

    In Jupyter tqdm takes the place of rich, because printing beside a rich bar fails there: each display flushes the
    streams that rich has redirected, and this displays again. In a file rich would show nothing, so lines are printed.

    Args:
        bar: Any callback. A callback that is not exactly a bar of Lightning is returned unchanged.
    """
    if type(bar) is TQDMProgressBar:
        return _with_settings_of(bar, RunTQDMProgressBar())
    if type(bar) is not RichProgressBar:
        return bar
    from rich import get_console

    console = get_console()
    if console.is_terminal:
        return _with_settings_of(bar, RunRichProgressBar())
    other: ProgressBar = RunTQDMProgressBar() if console.is_jupyter else LineProgressBar()
    if bar.is_disabled:
        other.disable()
    return other


def _with_settings_of(bar: ProgressBar, other: ProgressBar) -> ProgressBar:
    vars(other).update(vars(bar))
    return other


# ------------------------------------------------------------------------------------------------- printing beside it


def _open_bars(trainer: L.Trainer) -> list[Any]:
    found, bar = [], trainer.progress_bar_callback
    for name in _KINDS if isinstance(bar, TQDMProgressBar) else ():
        with suppress(TypeError):  # this bar does not exist
            found.append(getattr(bar, f"{name}_progress_bar"))
    return [one for one in found if not one.disable]


def print_above_bar(trainer: L.Trainer, text: str, file: TextIO | None = None) -> None:
    """Prints text above the progress bar.

    Args:
        trainer: The Trainer that has the bar.
        text: One or more lines.
        file: Where to print. Default: standard output.
    """
    bars, file = _open_bars(trainer), file or sys.stdout
    if bars:
        bars[0].write(text, file=file)
    else:
        file.write(f"{text}\n")  # at once: another thread may print too
    file.flush()


def close_bars(trainer: L.Trainer) -> None:
    """Closes tqdm's bars, which stay open if training stops early."""
    for bar in _open_bars(trainer):
        bar.close()
