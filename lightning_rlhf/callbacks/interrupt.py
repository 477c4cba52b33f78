"""An interrupt costs nothing: the run saves at the end of the step, and the work ends."""

from __future__ import annotations

import multiprocessing
import multiprocessing.process
import os
import select
import shlex
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from torch.multiprocessing import ProcessExitedException

from lightning_rlhf.callbacks.progress import close_bars, say
from lightning_rlhf.utils.checkpoint_io import AtomicCheckpointIO

SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Seconds that the main thread has to clean up after it was told to stop at once.
GRACE = 5.0


class Interrupted(SystemExit):
    """Ctrl-C or SIGTERM ended the work.

    Where nothing catches it the process ends with status 130 or 143, without a traceback, so that no further stage of
    a script starts. It is no :class:`Exception`: ``except Exception`` lets it pass.

    Attributes:
        signal: ``SIGINT`` or ``SIGTERM``.
        checkpoint: Where to go on from; None where the run was complete, or nothing was ever saved.
        code: The exit status: 130 or 143. Of a rank that Lightning started beside the script it is 0: with any other
            Lightning would kill the script.
    """

    def __init__(self, number: int, text: str, checkpoint: str | None = None) -> None:
        super().__init__(128 + number)
        self.signal, self.text, self.checkpoint = signal.Signals(number), text, checkpoint
        self.said = False

    def __str__(self) -> str:
        return self.text


class SaveOnInterrupt(L.Callback):
    """On SIGTERM or Ctrl-C: a checkpoint at the end of the optimizer step, then an end of the work.

    The signal, on whichever rank, sets a flag and does nothing else. When a step ends, never within an accumulation
    window, ranks agree on it and save ``interrupted.ckpt``. A validation that is due then still runs, and the
    checkpoint is written once more after it, since a resumed run doesn't make up for it; a signal during a validation
    acts at its end. Then ``fit`` raises :class:`Interrupted` on all ranks. No callback sees the end of an epoch or of a
    training that isn't over, so nothing is exported that looks finished. Where it was the last step, the run ends as it
    does undisturbed, and ``Interrupted`` is raised after that.

    A second signal stops at once, without saving; so does the first one while nothing trains (sanity check, dry run,
    validate, test, predict), and SIGTERM when its step has not ended within ``time_limit``: a reward that never
    answers, a rank that waits for a dead one. If this process can't even do that, it is ended ``GRACE`` seconds later.

    In the Trainer's list this callback moves itself to the end, so that the checkpoint holds what all others noted of
    the step. While it is at work, Lightning's own reaction to SIGTERM is off; handlers are put back afterwards. Signals
    reach Python's main thread only: in another thread ``fit`` isn't interruptible.

    Args:
        dirpath: Where ``interrupted.ckpt`` goes; default the Trainer's ``default_root_dir``.
        time_limit: Seconds that a step may still take after SIGTERM; None: as long as it takes. Clusters usually kill
            30 to 90 seconds after it.
        advice: What the last line says of how to go on; None names ``ckpt_path``.

    Attributes:
        interrupted: Path of the checkpoint, once an interrupt was served; None in an undisturbed run.
    """

    def __init__(self, dirpath: str | None = None, time_limit: float | None = 60.0, advice: str | None = None) -> None:
        self.dirpath, self.time_limit, self.advice = dirpath, time_limit, advice
        self.interrupted: str | None = None
        self._signal = 0  # what came
        self._saving = False
        self._leaving = False
        self._former: dict[signal.Signals, Any] = {}
        self._trainer: Any = None
        self._watch: _Watch | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Goes last; has checkpoints written atomically where nothing else was asked for."""
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == TrainerFn.FITTING:
            self.interrupted, self._signal = None, 0

    # ------------------------------------------------------------------------------------------------- signals

    # The first hooks after Lightning installed its own handlers, which must be replaced.

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the handlers."""
        self._install(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the handlers where no sanity check ran."""
        self._install(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the handlers in ``validate``."""
        self._install(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the handlers."""
        self._install(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the handlers."""
        self._install(trainer)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Puts the former handlers back after ``validate``, ``test`` and ``predict``."""
        self._uninstall()

    def _install(self, trainer: L.Trainer) -> None:
        global _installed
        if self._former or threading.current_thread() is not threading.main_thread():
            return
        self._saving, self._leaving, self._trainer = False, False, trainer
        self._watch = _Watch(self)
        self._former = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        _installed = self

    def _uninstall(self) -> None:
        global _installed
        for number, handler in self._former.items():
            # unless another took our place; None: not from Python, so Python can't put it back
            if signal.getsignal(number) == self._on_signal and handler is not None:
                signal.signal(number, handler)
        if self._watch is not None:
            self._watch.close()
        self._former, self._watch, self._trainer, _installed = {}, None, None, None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        trainer = self._trainer
        trains = trainer.state.fn == TrainerFn.FITTING and not (trainer.sanity_checking or trainer.fast_dev_run)
        if trains and not self._signal:
            self._signal = number
        elif not self._leaving:  # else it is on its way out
            self._leaving = True
            raise self._told(trainer, self._error(trainer, number, self._watch.why if self._watch else ""))

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: spawned ranks get a copy."""
        return {**vars(self), "_former": {}, "_trainer": None, "_watch": None}

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
        """Stops before the step after the one that was saved.

        Raises:
            Interrupted: A signal was served.
        """
        if self.interrupted is not None:
            raise self._of_all(trainer, self._error(trainer, self._signal))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts the former handlers back."""
        self._agree(trainer)
        self._uninstall()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the work, where the signal came in the last step.

        Raises:
            Interrupted: It did.
        """
        if self._signal:
            name = signal.Signals(self._signal).name
            text = f"{name} in the last step: the run is complete. {self.advice or ''}".rstrip()
            raise self._of_all(trainer, Interrupted(self._signal, text))

    def _of_all(self, trainer: L.Trainer, error: Interrupted) -> Interrupted:
        """As ranks raise it together: those beside the script's own process end with 0."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0:
            error.code = 0
        return self._told(trainer, error)

    def _told(self, trainer: L.Trainer, error: Interrupted) -> Interrupted:
        """Calls the hooks that Lightning calls in no spawned or forked rank, only in the process that started it."""
        if multiprocessing.parent_process() is not None and trainer.strategy.launcher is not None:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_exception(trainer, trainer.lightning_module, error)
        return error

    def _agree(self, trainer: L.Trainer) -> int:
        """The signal that any rank got; all must ask."""
        own = torch.tensor(self._signal, device=trainer.strategy.root_device)
        if found := int(trainer.strategy.reduce(own, reduce_op="max")):
            self._signal = found
        return found

    def _save_if_asked(self, trainer: L.Trainer) -> None:
        if self._agree(trainer):
            path = os.path.join(self.dirpath or trainer.default_root_dir, "interrupted.ckpt")
            self._saving = True
            trainer.save_checkpoint(path, weights_only=False)
            self.interrupted, self._saving = path, False

    # ------------------------------------------------------------------------------------------------- the end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Puts the former handlers back, and says how to go on, under whatever a progress bar left.

        Raises:
            Interrupted: In place of what an interrupt is called elsewhere: Lightning would end with status 1.
        """
        error = exception if isinstance(exception, Interrupted) else None
        if isinstance(exception, KeyboardInterrupt):  # of a moment without our handlers, while all is set up
            error = self._error(trainer, signal.SIGINT)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning has it ignored by now
        elif isinstance(exception, ProcessExitedException) and exception.exit_code - 128 in SIGNALS:
            error = Interrupted(exception.exit_code - 128, "")  # in a spawned or forked rank, which has said it
        if error is None:
            self._uninstall()
            return
        alone = self._leaving or error is not exception
        if alone:  # the other ranks don't know of it
            self._end_ranks(trainer)
        if alone and trainer.world_size > 1:
            self._watch = None  # stays: what follows may wait for them
        self._uninstall()
        close_bars(trainer)
        if trainer.is_global_zero and error.text and not error.said:
            sys.stdout.flush()
            print(error.text, file=sys.stderr, flush=True)
            error.said = True
        if error is not exception:
            raise error from None

    def _end_ranks(self, trainer: L.Trainer) -> None:
        launcher = trainer.strategy.launcher
        try:
            for process in getattr(launcher, "procs", ()):
                if isinstance(process, multiprocessing.process.BaseProcess):
                    process.join()  # spawned and forked ranks have the signal too, and save
        except KeyboardInterrupt:
            pass
        if launcher is not None:
            launcher.kill(signal.SIGKILL)

    def _error(self, trainer: L.Trainer, number: int, why: str = "stopped at once") -> Interrupted:
        """The end, in words."""
        name, step = signal.Signals(number).name, trainer.global_step
        if trainer.state.fn != TrainerFn.FITTING:
            return Interrupted(number, f"{name}: stopped. {self.advice or ''}".rstrip())
        checkpoint = self.interrupted or _newest_checkpoint(trainer)
        if self.interrupted:
            text = f"{name}: stopped after step {step}, all is saved in {checkpoint}."
        elif checkpoint:
            text = f"{name}: {why}; step {step + 1} is lost. The last checkpoint is {checkpoint}."
        else:
            text = f"{name}: {why}. There is no checkpoint."
        return Interrupted(number, f"{text} {self._advice(trainer, checkpoint)}".rstrip(), checkpoint)

    def _advice(self, trainer: L.Trainer, checkpoint: str | None) -> str:
        """How to go on, in terms of what was called."""
        if self.advice is not None or checkpoint is None:
            return self.advice or ""
        if any(isinstance(c, SaveConfigCallback) for c in trainer.callbacks):  # type: ignore[attr-defined]
            return f"To go on, repeat your command with --ckpt_path {shlex.quote(checkpoint)}"  # a LightningCLI's fit
        return f"To go on, repeat trainer.fit(..., ckpt_path={checkpoint!r})"


def _newest_checkpoint(trainer: L.Trainer) -> str | None:
    """What was last saved, or gone on from."""
    found = {str(trainer.ckpt_path)} if trainer.ckpt_path else set()
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            found |= {callback.best_model_path, callback.last_model_path, *callback.best_k_models}
    return max(filter(os.path.exists, found), key=os.path.getmtime, default=None)


class _Watch(threading.Thread):
    """Hears signals where the main thread can't, says what will come of them, and holds it to its time.

    Python calls handlers between two of its own instructions: never, in a rank that waits for another. So the number of
    each signal goes to a socket too, at the time it comes. This thread reads it. Where a step takes too long it sends
    this process the second signal, and where that doesn't help it ends it.
    """

    def __init__(self, callback: SaveOnInterrupt) -> None:
        super().__init__(daemon=True, name="interrupt-watch")
        self.callback, self.trainer, self.why = callback, callback._trainer, "stopped at once"
        self.ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self.theirs, self.former = theirs, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self.start()

    def close(self) -> None:
        """Ends the thread."""
        signal.set_wakeup_fd(self.former)
        self.theirs.close()

    def run(self) -> None:
        """Until it is closed, or the process is ended."""
        came, number, deadline = 0, 0, None
        while True:
            wait = None if deadline is None else max(0.0, deadline - time.monotonic())
            if select.select([self.ours], [], [], wait)[0]:
                if not (heard := self.ours.recv(64)):
                    self.ours.close()
                    return
                for number in (n for n in heard if n in SIGNALS):
                    came += 1
                    limit = (self.callback.time_limit if number == signal.SIGTERM else None) if came == 1 else GRACE
                    deadline = deadline if limit is None else time.monotonic() + limit
                    if came == 1 and self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
                        self.say(number)
                    elif came == 1:
                        came, deadline = 2, time.monotonic() + GRACE  # nothing trains: it is served at once
            elif self.callback._saving:
                deadline = time.monotonic() + 1
            elif came == 1:
                self.why = f"the step did not end within {self.callback.time_limit:g} s"
                os.kill(os.getpid(), number)  # comes back to this loop as the second
                deadline = None
            else:
                self.end(number)

    def say(self, number: int) -> None:
        """Beside the bar."""
        if not self.trainer.is_global_zero:
            return
        name, limit = signal.Signals(number).name, self.callback.time_limit
        after = "Press Ctrl-C again to stop at once, without saving."
        if number == signal.SIGTERM:
            after = "" if limit is None else f"If it has not ended in {limit:g} s, nothing is saved."
        say(self.trainer, f"{name}: saving at the end of this step. {after}".rstrip(), sys.stderr)

    def end(self, number: int) -> None:
        """Of the whole process, whatever its main thread does."""
        error = self.callback._error(self.trainer, number, self.why)
        show = "\033[?25h" if os.isatty(2) else ""  # a bar may have hidden the cursor
        os.write(2, f"{show}\n{error.text}\n".encode())
        if (launcher := self.trainer.strategy.launcher) is not None:
            launcher.kill(signal.SIGKILL)
        os._exit(128 + number)


_installed: SaveOnInterrupt | None = None


def _in_forked_child() -> None:
    """A loader's worker is ended by its process, and must not speak for it."""
    if _installed is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
