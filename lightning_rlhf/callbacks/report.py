"""Writes a self-contained HTML report of a run: settings, curves, and answers before and after."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_rlhf.callbacks.completions import CompletionsTable
from lightning_rlhf.callbacks.interrupt import Interrupted
from lightning_rlhf.callbacks.samples import SampleCompletions
from lightning_rlhf.report import Curve, StageReport, read_report, write_report
from lightning_rlhf.report.groups import choose_groups
from lightning_rlhf.report.settings import describe, describe_trainer
from lightning_rlhf.utils.filesystem import check_writable, move_aside

_EVALUATION = ("val", "eval", "test")


class Report(L.Callback):
    """Writes an HTML report of the run: settings, curves of all logged metrics, answers and final values.

    The file needs no network and no scripts. It is written when training ends, is interrupted or fails, and again after
    a later ``trainer.validate`` or ``trainer.test``. Metrics that these log before training appear at step 0. The
    answers come from :class:`~lightning_rlhf.callbacks.SampleCompletions`, the groups of completions from
    :class:`~lightning_rlhf.callbacks.CompletionsTable`. Checkpoints hold the report's data, so the
    report of a resumed run is complete. With ``fast_dev_run`` nothing is written.

    Args:
        path: Path of the file. Default: ``report.html`` under the Trainer's ``default_root_dir``.
        title: Heading of the file. None: "Training report", or with ``append`` the heading of the existing file.
        stage: Heading of this run. Default: the module's name, such as PPO.
        append: Keep the other stages in the file, so that SFT, reward model and PPO share one report. A stage with the
            same name is replaced. False: a new run moves the file of an earlier one to ``report.1.html``.
        every_n_steps: Also write the report after every this many steps. A larger value writes it less often. None:
            only at the end.

    Raises:
        ValueError: ``every_n_steps`` is below 1.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        title: str | None = None,
        stage: str | None = None,
        append: bool = False,
        every_n_steps: int | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(
                f"every_n_steps must be at least 1, or null to write at the end only; got {every_n_steps}."
            )
        self.path, self.title, self.stage, self.append = path, title, stage, append
        self.every_n_steps = every_n_steps
        self.report = StageReport("")
        self._samples_read: tuple[Path, int] | None = None  # the file of samples, and the position read so far
        self._noted = -1  # the last step whose metrics were noted

    # ------------------------------------------------------------------------------------------------- hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks before training that the file can be written, and skips the answers of earlier runs.

        Raises:
            OSError: The file can't be written.
            ValueError: The path is taken by a file that is not a report.
        """
        if stage != TrainerFn.FITTING:
            return
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_writable(self._target(trainer), "Report", "its path")
        if self._target(trainer).exists():
            read_report(self._target(trainer))
        samples = Path(trainer.default_root_dir) / "samples.jsonl"
        self._samples_read = samples, samples.stat().st_size if samples.exists() else 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the report, or continues the one in the checkpoint."""
        if trainer.global_step == 0:
            before = {} if self.report.ended else self.report.curves
            self.report = StageReport("", curves=before)
            self._start_anew(trainer)
        elif self._target(trainer).exists():
            self._add_missing_values(trainer)
        self._noted = trainer.global_step
        report = self.report
        report.name = self.stage or type(pl_module).__name__.removesuffix("Module") or type(pl_module).__name__
        report.started = report.started or _now()
        report.status, report.ended = "running", ""
        report.settings = {
            "Model": describe(pl_module),
            "Data": describe(getattr(trainer, "datamodule", None)),
            "Trainer": describe_trainer(trainer),
        }

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Notes the metrics of the previous step, whose hooks are all done, and writes the report when it is due."""
        step = trainer.global_step
        if step > self._noted:
            self._note(trainer, step)
            if self.every_n_steps and step % self.every_n_steps == 0:
                self._write(trainer)
            self._noted = step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes the metrics logged so far, for this step's checkpoint; modules may log more after the callbacks."""
        if trainer.global_step > self._noted:
            self._note(trainer, trainer.global_step, only_new=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes validation metrics."""
        if not trainer.sanity_checking:
            self._note(trainer, trainer.global_step, evaluation=True)
            self._write_again(trainer)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes test metrics."""
        self._note(trainer, trainer.global_step, evaluation=True)
        self._write_again(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the last step."""
        self._note(trainer, trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the report after all other callbacks have finished training."""
        self._end(trainer, "finished")
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(f"Report: {self._target(trainer)}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes the report of a run that stops early."""
        if self.report.status == "running":
            if trainer.world_size == 1:  # computing a metric may need all ranks, and the others may not have stopped
                self._note(trainer, trainer.global_step)
            kind, text = type(exception).__name__, str(exception)
            what = f"stopped at step {trainer.global_step} by {kind}{': ' if text else ''}{text}"
            if isinstance(exception, Interrupted):
                what = f"interrupted at step {trainer.global_step}"
            self._end(trainer, what)

    def state_dict(self) -> dict[str, Any]:
        """Returns the report's data, so that the report of a resumed run is complete."""
        self._read_samples()
        return asdict(self.report)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the report's data."""
        self.report = StageReport(**state_dict)

    def _start_anew(self, trainer: L.Trainer) -> None:
        """Moves the report of an earlier run aside, and reads the new file of answers from its start."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if self._samples_read is not None and any(isinstance(each, SampleCompletions) for each in callbacks):
            self._samples_read = self._samples_read[0], 0
        if trainer.is_global_zero and not self.append and (old := move_aside(self._target(trainer))) is not None:
            rank_zero_info(f"Report: the report of an earlier run is now {old}.")

    # ------------------------------------------------------------------------------------------------- collecting

    def _note(self, trainer: L.Trainer, step: int, only_new: bool = False, evaluation: bool = False) -> None:
        """Adds values of training or of evaluation (all, or those that have changed), and groups of the last table."""
        # on all ranks, because computing a metric may need all of them
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        for name, value in values.items():
            if name.startswith(_EVALUATION) == evaluation:
                curve = self.report.curves.setdefault(name, Curve())
                if not (only_new and curve.last and curve.last[1] == float(f"{value:.6g}")):
                    curve.add(step, value)
        tables = (each for each in trainer.callbacks if isinstance(each, CompletionsTable))  # type: ignore[attr-defined]
        for table in tables:
            self.report.groups = choose_groups(table.last) or self.report.groups

    def _add_missing_values(self, trainer: L.Trainer) -> None:
        """Reads from the file the values of the checkpoint's step that were logged after the checkpoint was saved."""
        _, stages = read_report(self._target(trainer))
        for curves in (stage.curves for stage in stages if stage.run == self.report.run):
            for name, curve in curves.items():
                own = self.report.curves.get(name, Curve())
                for step, value in curve.all():
                    if (own.last[0] if own.last else -1) < step <= trainer.global_step:
                        own.add(int(step), value)
                        self.report.curves[name] = own

    def _read_samples(self) -> None:
        if self._samples_read is None or not self._samples_read[0].exists():
            return
        path, place = self._samples_read
        with path.open("rb") as file:
            file.seek(place)
            lines = file.readlines()
        self._samples_read = path, place + sum(map(len, lines))
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                rank_zero_warn(f"Report: a line of {path} is not JSON, so its answer is left out: {line[:80]!r}")
                continue
            known = self.report.samples.setdefault(row["prompt"], [])
            known[1:] = [row]

    # ------------------------------------------------------------------------------------------------- writing

    def _target(self, trainer: L.Trainer) -> Path:
        return Path(self.path or Path(trainer.default_root_dir) / "report.html")

    def _end(self, trainer: L.Trainer, status: str) -> None:
        self.report.status = status
        self._write(trainer)

    def _write_again(self, trainer: L.Trainer) -> None:
        """Writes the report again after an evaluation that follows training."""
        if trainer.state.fn != TrainerFn.FITTING and self.report.ended:
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        self.report.ended = _now()
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._read_samples()
        target = self._target(trainer)
        title, stages = read_report(target) if self.append and target.exists() else ("Training report", [])
        places = {stage.name: i for i, stage in enumerate(stages)}
        i = places.get(self.report.name, len(stages))
        stages[i : i + 1] = [self.report]
        write_report(target, self.title or title, stages)


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
