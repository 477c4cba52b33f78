"""Progress of a whole run, on what draws it: a terminal, a notebook or a file."""

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
#: Lines that a file gets of a run.
_LINES = 20


class _WholeRun(ProgressBar):
    """Counts the steps of the run rather than the batches of an epoch.

    One that stops by ``max_steps`` has no number of epochs, and PPO's epochs are a few iterations each: a bar of an
    epoch would show neither how much there is nor how long it takes.
    """

    _total: int | None = None
    _begun = False

    @property
    def total_train_batches(self) -> int | float:
        """Steps of the run; batches of an epoch where it has no end."""
        return super().total_train_batches if self._total is None else self._total

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Knows how many there are."""
        steps = trainer.estimated_stepping_batches
        self._total, self._begun = int(steps) if math.isfinite(steps) and steps > 0 else None, False
        super().on_train_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Begins with the first epoch, and goes on through the others."""
        if self._total is None:
            super().on_train_epoch_start(trainer, pl_module)
        self._begin_once(trainer, pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begins here where a run is resumed inside an epoch, whose start nothing sees."""
        self._begin_once(trainer, pl_module)

    def _begin_once(self, trainer: Any, pl_module: Any) -> None:
        if self._total is not None and not self._begun:
            self.begin(trainer.global_step, self._total, words(pl_module))
        self._begun = True

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Shows the step."""
        done = batch_idx if self._total is None else trainer.global_step - 1
        super().on_train_batch_end(trainer, pl_module, outputs, batch, done)

    def begin(self, step: int, total: int, what: str) -> None:
        """Draws the first state: a resumed one is not at 0, and its speed not that of what was done before."""


class RunTQDMProgressBar(_WholeRun, TQDMProgressBar):
    """tqdm's bar, over the whole run."""

    def begin(self, step: int, total: int, what: str) -> None:
        """Sets the bar."""
        bar = self.train_progress_bar
        bar.reset(total)
        bar.initial = bar.n = step
        bar.set_description(what)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Not the end of this bar, also where bars are to be left."""
        if self._total is None:
            super().on_train_epoch_end(trainer, pl_module)


class RunRichProgressBar(_WholeRun, RichProgressBar):
    """rich's bar, over the whole run."""

    def begin(self, step: int, total: int, what: str) -> None:
        """Adds the bar."""
        if self.progress is not None:
            # rich forgets what is older than half a minute, which one iteration may take: then no time is left
            self.progress.speed_estimate_period = math.inf
            self.train_progress_bar_id = self.progress.add_task(what, total=total, completed=step)


class LineProgressBar(_WholeRun):
    """A line now and then, where no terminal takes one back."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self._from, self._since, self._shown = 0, 0.0, -1

    def disable(self) -> None:
        """Prints nothing from here on."""
        self.enabled = False

    def enable(self) -> None:
        """Prints again."""
        self.enabled = True

    def begin(self, step: int, total: int, what: str) -> None:
        """Starts the clock."""
        self._from, self._since, self._shown, self._what = step, time.perf_counter(), step, what

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Prints at each twentieth of the run."""
        step, total = trainer.global_step, self._total
        if not self.enabled or total is None or step * _LINES // total == self._shown * _LINES // total:
            return
        self._shown = step
        passed = time.perf_counter() - self._since
        left = passed / max(1, step - self._from) * (total - step)
        figures = ", ".join(f"{k}={_figure(v)}" for k, v in self.get_metrics(trainer, pl_module).items())
        times = "<".join(str(timedelta(seconds=round(seconds))) for seconds in (passed, left))
        print(f"{self._what} {step}/{total} [{times}] {figures}".rstrip(), flush=True)


def words(module: Any) -> str:
    """What a module's steps are called."""
    return "Steps" if module.automatic_optimization else "Iterations"


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def suited(bar: L.Callback) -> L.Callback:
    """Lightning's own bar, for a whole run and for what it is drawn on; any other as it is.

    rich can't be printed beside in Jupyter: each display flushes the streams that rich has redirected, which displays.
    In a file it shows nothing.

    Args:
        bar: Any callback.
    """
    if type(bar) is TQDMProgressBar:
        return _changed(bar, RunTQDMProgressBar())
    if type(bar) is not RichProgressBar:
        return bar
    from rich import get_console

    console = get_console()
    if console.is_terminal:
        return _changed(bar, RunRichProgressBar())
    other: ProgressBar = RunTQDMProgressBar() if console.is_jupyter else LineProgressBar()
    if bar.is_disabled:
        other.disable()
    return other


def _changed(bar: ProgressBar, other: ProgressBar) -> ProgressBar:
    vars(other).update(vars(bar))
    return other


# ------------------------------------------------------------------------------------------------- printing beside it


def _open_bars(trainer: L.Trainer) -> list[Any]:
    found, bar = [], trainer.progress_bar_callback
    for name in _KINDS if isinstance(bar, TQDMProgressBar) else ():
        with suppress(TypeError):  # there is none
            found.append(getattr(bar, f"{name}_progress_bar"))
    return [one for one in found if not one.disable]


def say(trainer: L.Trainer, text: str, file: TextIO | None = None) -> None:
    """Prints above the bar, whichever there is.

    Args:
        trainer: Whose bar.
        text: Lines.
        file: Default standard output.
    """
    bars, file = _open_bars(trainer), file or sys.stdout
    if bars:
        bars[0].write(text, file=file)
    else:
        print(text, file=file)
    file.flush()


def close_bars(trainer: L.Trainer) -> None:
    """Ends the lines of tqdm's bars, which stay open where training doesn't come to its end."""
    for bar in _open_bars(trainer):
        bar.close()
