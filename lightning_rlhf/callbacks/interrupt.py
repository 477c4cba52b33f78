"""Saves the run at the end of the step when it is interrupted."""

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

from lightning_rlhf.callbacks.progress import close_bars, print_above_bar
from lightning_rlhf.utils import AtomicCheckpointIO

SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Seconds that the main thread has to clean up when it must stop at once.
GRACE = 5.0


class Interrupted(SystemExit):
    """Ctrl-C or SIGTERM ended the run.

    If nothing catches it, the process ends with status 130 or 143 and without a traceback, so the next stage of a
    script does not start. It is not an :class:`Exception`, so ``except Exception`` does not catch it.

    Attributes:
        signal: ``SIGINT`` or ``SIGTERM``.
        checkpoint: The checkpoint to resume from. None if the run was complete, or if nothing was saved.
        code: The exit status: 130 or 143. In ranks that Lightning started beside the script it is 0, because with any
            other status Lightning would kill the script.
    """

    def __init__(self, number: int, text: str, checkpoint: str | None = None) -> None:
        super().__init__(128 + number)
        self.signal, self.text, self.checkpoint = signal.Signals(number), text, checkpoint
        self.said = False

    def __str__(self) -> str:
        return self.text


class SaveOnInterrupt(L.Callback):
    """Saves a checkpoint at the end of the optimizer step on SIGTERM or Ctrl-C, and then ends the run.

    A signal on any rank only sets a flag. At the end of an optimizer step all ranks exchange their flags and save
    ``interrupted.ckpt``. If a validation is due after that step, it still runs, and the checkpoint is written again
    after it, because a resumed run does not repeat it. A signal during a validation takes effect at its end. Then
    ``fit`` raises :class:`Interrupted` on all ranks. The hooks for the end of an epoch and of training do not run, so
    nothing is exported that looks finished. If the signal comes in the last step, the run ends normally and then
    raises ``Interrupted``.

    A second signal stops at once, without saving. So does the first signal while nothing is trained (sanity check, dry
    run, validate, test, predict), and SIGTERM if its step does not end within ``time_limit``, for instance because a
    reward hangs or a rank waits for a dead one. If the process cannot stop, it is killed ``GRACE`` seconds later.

    The callback moves itself to the end of the Trainer's list, so that the checkpoint holds what the other callbacks
    noted in the step. While it is active, Lightning's handler of SIGTERM is off; afterwards the former handlers are
    restored. Signals reach Python's main thread only, so ``fit`` in another thread cannot be interrupted.

    Args:
        dirpath: Directory of ``interrupted.ckpt``. Default: the Trainer's ``default_root_dir``.
        time_limit: Maximum number of seconds that a step may take after SIGTERM. A larger value waits longer for a slow
            step; clusters usually kill a process 30 to 90 seconds after SIGTERM. None: no limit.
        advice: Last line of the message, which says how to resume. None: a line that names ``ckpt_path``.

    Attributes:
        interrupted: Path of the checkpoint after an interrupt, otherwise None.
    """

    def __init__(self, dirpath: str | None = None, time_limit: float | None = 60.0, advice: str | None = None) -> None:
        self.dirpath, self.time_limit, self.advice = dirpath, time_limit, advice
        self.interrupted: str | None = None
        self._signal = 0  # the signal that came, or 0
        self._saving = False
        self._leaving = False
        self._former: dict[signal.Signals, Any] = {}
        self._trainer: Any = None
        self._watch: _Watch | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Moves this callback to the end of the list, and writes checkpoints atomically unless configured otherwise."""
        others = [callback for callback in trainer.callbacks if callback is not self]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, self]  # type: ignore[attr-defined]
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        if stage == TrainerFn.FITTING:
            self.interrupted, self._signal = None, 0

    # ------------------------------------------------------------------------------------------------- signals

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Installs the handlers, in the first hook after Lightning has installed its own."""
        self._install(trainer)

    on_train_start = on_validation_start = on_test_start = on_predict_start = on_sanity_check_start

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Restores the former handlers after ``validate``, ``test`` and ``predict``."""
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
            # unless other code has replaced ours; Python cannot restore a handler that it did not install (None)
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
        elif not self._leaving:  # otherwise the run is ending already
            self._leaving = True
            raise self._call_hooks(trainer, self._error(trainer, number, self._watch.why if self._watch else ""))

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without this process's handlers and threads: spawned ranks get a copy."""
        return {**vars(self), "_former": {}, "_trainer": None, "_watch": None}

    # ------------------------------------------------------------------------------------------------- training

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves after a signal if this batch completed an optimizer step."""
        last = trainer.is_last_batch or batch_idx + 1 == trainer.num_training_batches
        if last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save_if_asked(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Saves after a signal if the validation ran between two steps."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_if_asked(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stops before the step that follows the saved one.

        Raises:
            Interrupted: The run was saved after a signal.
        """
        if self.interrupted is not None:
            raise self._on_all_ranks(trainer, self._error(trainer, self._signal))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores the former handlers."""
        self._agree(trainer)
        self._uninstall()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Ends the run if a signal came in the last step.

        Raises:
            Interrupted: A signal came in the last step.
        """
        if self._signal:
            name = signal.Signals(self._signal).name
            text = f"{name} in the last step: the run is complete. {self.advice or ''}".rstrip()
            raise self._on_all_ranks(trainer, Interrupted(self._signal, text))

    def _on_all_ranks(self, trainer: L.Trainer, error: Interrupted) -> Interrupted:
        """Prepares an error that all ranks raise: ranks that Lightning started beside the script exit with 0."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0:
            error.code = 0
        return self._call_hooks(trainer, error)

    def _call_hooks(self, trainer: L.Trainer, error: Interrupted) -> Interrupted:
        """Calls ``on_exception`` in spawned and forked ranks; Lightning calls it only in their parent process."""
        if multiprocessing.parent_process() is not None and trainer.strategy.launcher is not None:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                callback.on_exception(trainer, trainer.lightning_module, error)
        return error

    def _agree(self, trainer: L.Trainer) -> int:
        """Returns the signal that any rank got, or 0. All ranks must call it."""
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
        """Restores the former handlers, and prints below the progress bar how to resume.

        Raises:
            Interrupted: Replaces other exceptions of an interrupt, for which Lightning would exit with status 1.
        """
        error = exception if isinstance(exception, Interrupted) else None
        if isinstance(exception, KeyboardInterrupt):  # during setup, when our handlers are not installed yet
            error = self._error(trainer, signal.SIGINT)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning has set it to be ignored
        elif isinstance(exception, ProcessExitedException) and exception.exit_code - 128 in SIGNALS:
            error = Interrupted(exception.exit_code - 128, "")  # a spawned or forked rank, which has printed it
        if error is None:
            self._uninstall()
            return
        alone = self._leaving or error is not exception
        if alone:  # the other ranks do not stop on their own
            self._end_ranks(trainer)
        if alone and trainer.world_size > 1:
            self._watch = None  # the thread keeps running, because the rest may wait for other ranks
        self._uninstall()
        close_bars(trainer)
        if trainer.is_global_zero and error.text and not error.said:
            sys.stdout.flush()
            sys.stderr.write(f"{error.text}\n")  # at once: the watching thread may print too
            sys.stderr.flush()
            error.said = True
        if error is not exception:
            raise error from None

    def _end_ranks(self, trainer: L.Trainer) -> None:
        launcher = trainer.strategy.launcher
        try:
            for process in getattr(launcher, "procs", ()):
                if isinstance(process, multiprocessing.process.BaseProcess):
                    process.join()  # spawned and forked ranks got the signal too, and save
        except KeyboardInterrupt:
            pass
        if launcher is not None:
            launcher.kill(signal.SIGKILL)

    def _error(self, trainer: L.Trainer, number: int, why: str = "stopped at once") -> Interrupted:
        """Makes the error with its message."""
        name, step = signal.Signals(number).name, trainer.global_step
        if trainer.state.fn != TrainerFn.FITTING:
            return Interrupted(number, f"{name}: stopped. {self.advice or ''}".rstrip())
        checkpoint = self.interrupted or _newest_checkpoint(trainer)
        if self.interrupted:
            text = f"{name}: stopped after step {step}. The run is saved in {checkpoint}."
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
    """Returns the checkpoint that was saved last, or the one that the run was resumed from."""
    found = {str(trainer.ckpt_path)} if trainer.ckpt_path else set()
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            found |= {callback.best_model_path, callback.last_model_path, *callback.best_k_models}
    return max(filter(os.path.exists, found), key=os.path.getmtime, default=None)


class _Watch(threading.Thread):
    """Receives signals while the main thread cannot, announces their effect, and enforces the time limits.

    Python calls signal handlers between two of its own instructions, so never in a rank that waits for another rank.
    Therefore Python also writes each signal's number to a socket, which this thread reads. If a step takes too long,
    the thread sends this process a second signal, and if that does not help, it ends the process.
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
        """Runs until it is closed or the process ends."""
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
                        self.announce(number)
                    elif came == 1:
                        came, deadline = 2, time.monotonic() + GRACE  # nothing is trained: the process stops at once
            elif self.callback._saving:
                deadline = time.monotonic() + 1
            elif came == 1:
                self.why = f"the step did not end within {self.callback.time_limit:g} s"
                os.kill(os.getpid(), number)  # this loop receives it as the second signal
                deadline = None
            else:
                self.end(number)

    def announce(self, number: int) -> None:
        """Announces the effect of a signal, above the progress bar."""
        if not self.trainer.is_global_zero:
            return
        name, limit = signal.Signals(number).name, self.callback.time_limit
        after = "Press Ctrl-C again to stop at once, without saving."
        if number == signal.SIGTERM:
            after = "" if limit is None else f"If the step does not end within {limit:g} s, nothing is saved."
        print_above_bar(self.trainer, f"{name}: saving at the end of this step. {after}".rstrip(), sys.stderr)

    def end(self, number: int) -> None:
        """Ends the whole process, whatever its main thread does."""
        error = self.callback._error(self.trainer, number, self.why)
        show = "\033[?25h" if os.isatty(2) else ""  # a bar may have hidden the cursor
        os.write(2, f"{show}\n{error.text}\n".encode())
        if (launcher := self.trainer.strategy.launcher) is not None:
            launcher.kill(signal.SIGKILL)
        os._exit(128 + number)


_installed: SaveOnInterrupt | None = None


def _in_forked_child() -> None:
    """Restores default handling of signals in workers of data loaders, which their parent process ends."""
    if _installed is not None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_forked_child)
