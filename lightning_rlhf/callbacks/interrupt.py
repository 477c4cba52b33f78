"""An interrupt costs nothing: the run saves at the end of the step and stops."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_rlhf.callbacks.atomic import AtomicCheckpointIO

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class SaveOnInterrupt(L.Callback):
    """On SIGTERM or Ctrl-C: a checkpoint at the end of the optimizer step, then a stop in good order.

    The signal, on whichever rank, sets a flag and does nothing else. When a step ends, never within an accumulation
    window, ranks agree on it and save ``interrupted.ckpt``. A validation that is due then still runs, and the
    checkpoint is written once more after it, since a resumed run doesn't make up for it; a signal during a validation
    acts at its end. Then the run stops, whatever ``min_steps`` and ``min_epochs`` say; no callback sees the end of an
    epoch that isn't over. A second Ctrl-C raises :class:`KeyboardInterrupt` at once.

    In the Trainer's list this callback moves itself to the end, so that the checkpoint holds what all others noted of
    the step.

    ``fit`` returns as after a run of full length, so a script goes on and its exit status is 0, unless it looks at
    :attr:`interrupted`. While this callback trains, Lightning's own reaction to SIGTERM is off; handlers are put back
    when training ends. Signals reach Python's main thread only: in another thread ``fit`` isn't interruptible.

    Args:
        dirpath: Where ``interrupted.ckpt`` goes; default the Trainer's ``default_root_dir``.

    Attributes:
        interrupted: Path of the checkpoint, once an interrupt was served; None in an undisturbed run.
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.interrupted: str | None = None
        self._asked = False
        self._stopping = False
        self._former: dict[signal.Signals, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Goes last; has checkpoints written atomically where nothing else was asked for."""
        trainer.callbacks = [*self._others(trainer), self]  # type: ignore[attr-defined]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    # ------------------------------------------------------------------------------------------------- signals

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the handlers: the first hook after Lightning's own, which must be replaced."""
        self._install()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the handlers where no sanity check ran."""
        self._install()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts the former handlers back."""
        self._uninstall()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Puts the former handlers back."""
        self._uninstall()

    def _install(self) -> None:
        if self._former or threading.current_thread() is not threading.main_thread():
            return
        self.interrupted, self._asked, self._stopping = None, False, False
        self._former = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def _uninstall(self) -> None:
        for number, handler in self._former.items():
            # unless another took our place; None: not from Python, so Python can't put it back
            if signal.getsignal(number) == self._on_signal and handler is not None:
                signal.signal(number, handler)
        self._former = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._asked = True
        # print is not safe here: the signal may have come in the middle of one
        again = " Press Ctrl-C again to stop at once, without saving." if number == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(number).name}: saving at the end of this step.{again}\n".encode())

    # ------------------------------------------------------------------------------------------------- training

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves, where this batch completed an optimizer step."""
        last = trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
        if last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves after a validation between two steps."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_if_asked(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops before the step after the one that was saved."""
        if self.interrupted is not None:
            self._stopping = True
            # first, or callbacks before this one would take the epoch for a whole one
            trainer.callbacks = [self, *self._others(trainer)]  # type: ignore[attr-defined]
            trainer.should_stop = True
            trainer.state.status = TrainerStatus.INTERRUPTED
            raise StopIteration  # ends the epoch's loop, also where min_steps would hold should_stop back

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves a broken-off epoch before others take it for a whole one: their checkpoint would skip its rest."""
        if self._stopping:
            raise StopIteration

    def _save_if_asked(self, trainer: L.Trainer) -> None:
        if not trainer.strategy.reduce_boolean_decision(self._asked, all=False):
            return
        self.interrupted = os.path.join(self.dirpath or trainer.default_root_dir, "interrupted.ckpt")
        trainer.save_checkpoint(self.interrupted)
        rank_zero_info(
            f"Interrupted at step {trainer.global_step}: all is saved in {self.interrupted}. Go on from there with "
            f"--ckpt_path {self.interrupted}"
        )

    def _others(self, trainer: L.Trainer) -> list[L.Callback]:
        return [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
