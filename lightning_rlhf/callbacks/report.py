"""What a run did, as one HTML file that needs nothing else: settings, curves, answers before and after."""

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

from lightning_rlhf.callbacks.interrupt import Interrupted
from lightning_rlhf.report import Curve, StageReport, read_report, write_report
from lightning_rlhf.report.settings import describe, describe_trainer

_EVALUATION = ("val", "eval", "test")


class Report(L.Callback):
    """Writes an HTML report of the run: settings, curves of all that was logged, answers, final values.

    The file needs no network and runs no scripts. It is written when training ends, is interrupted or fails, and again
    after a later ``trainer.validate`` or ``trainer.test``. What these log before training stands at step 0. Answers are
    those of :class:`~lightning_rlhf.callbacks.SampleCompletions`. All of it is kept in checkpoints: the report of a
    resumed run is whole. Under ``fast_dev_run`` nothing is written.

    Args:
        path: Of the file; default ``report.html`` under the Trainer's ``default_root_dir``.
        title: Heading of the file; None keeps that of a file which is added to.
        stage: Heading of this run; default the module's name, such as PPO.
        append: Keep other stages that the file has, so that SFT, reward model and PPO make one report; a stage of the
            same name is replaced. False replaces the file.
        every_n_steps: Write every so many steps too.

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
            raise ValueError(f"every_n_steps must be at least 1, or null for the end alone; got {every_n_steps}.")
        self.path, self.title, self.stage, self.append = path, title, stage, append
        self.every_n_steps = every_n_steps
        self.report = StageReport("")
        self._answers: tuple[Path, int] | None = None  # the file of samples, and how far it was read
        self._noted = -1

    # ------------------------------------------------------------------------------------------------- hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses to write over what is no report, before compute is spent; finds the end of older answers.

        Raises:
            ValueError: A file that is no report is in its place.
        """
        if stage != TrainerFn.FITTING:
            return
        if self._target(trainer).exists():
            read_report(self._target(trainer))
        answers = Path(trainer.default_root_dir) / "samples.jsonl"
        self._answers = answers, answers.stat().st_size if answers.exists() else 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins, or goes on with what the checkpoint brought."""
        if trainer.global_step == 0:
            before = {} if self.report.ended else self.report.curves
            self.report = StageReport("", curves=before)
        elif self._target(trainer).exists():
            self._complete(trainer)
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
        """Notes the step before, all of whose hooks are done; writes where it is time."""
        step = trainer.global_step
        if step > self._noted:
            self._note(trainer, step)
            if self.every_n_steps and step % self.every_n_steps == 0:
                self._write(trainer)
            self._noted = step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notes what is new already, for the checkpoint of this step; modules may log the rest after callbacks."""
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
        """Writes, after all other callbacks have done what they do at the end of training."""
        self._end(trainer, "finished")
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(f"Report: {self._target(trainer)}")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes what there is."""
        if self.report.status == "running":
            if trainer.world_size == 1:  # other ranks may be elsewhere, and not take part in computing a metric
                self._note(trainer, trainer.global_step)
            kind, text = type(exception).__name__, str(exception)
            what = f"stopped at step {trainer.global_step} by {kind}{': ' if text else ''}{text}"
            if isinstance(exception, Interrupted):
                what = f"interrupted at step {trainer.global_step}"
            self._end(trainer, what)

    def state_dict(self) -> dict[str, Any]:
        """All that the report will say, so that a resumed run's is whole."""
        self._read_answers()
        return asdict(self.report)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self.report = StageReport(**state_dict)

    # ------------------------------------------------------------------------------------------------- collecting

    def _note(self, trainer: L.Trainer, step: int, only_new: bool = False, evaluation: bool = False) -> None:
        """Adds values: of training or of evaluation, all or those that differ from their last."""
        # on all ranks, since a metric may only now be computed, by all together
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        for name, value in values.items():
            if name.startswith(_EVALUATION) == evaluation:
                curve = self.report.curves.setdefault(name, Curve())
                if not (only_new and curve.last and curve.last[1] == float(f"{value:.6g}")):
                    curve.add(step, value)

    def _complete(self, trainer: L.Trainer) -> None:
        """Takes from the file what modules logged of the checkpoint's step after it was saved."""
        _, stages = read_report(self._target(trainer))
        for curves in (stage.curves for stage in stages if stage.run == self.report.run):
            for name, curve in curves.items():
                own = self.report.curves.get(name, Curve())
                for step, value in curve.all():
                    if (own.last[0] if own.last else -1) < step <= trainer.global_step:
                        own.add(int(step), value)
                        self.report.curves[name] = own

    def _read_answers(self) -> None:
        if self._answers is None or not self._answers[0].exists():
            return
        path, place = self._answers
        with path.open("rb") as file:
            file.seek(place)
            lines = file.readlines()
        self._answers = path, place + sum(map(len, lines))
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                rank_zero_warn(f"Report: a line of {path} is no JSON, and its answer is left out: {line[:80]!r}")
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
        """After training, for evaluations that follow it."""
        if trainer.state.fn != TrainerFn.FITTING and self.report.ended:
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        self.report.ended = _now()
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._read_answers()
        target = self._target(trainer)
        title, stages = read_report(target) if self.append and target.exists() else ("Training report", [])
        places = {stage.name: i for i, stage in enumerate(stages)}
        i = places.get(self.report.name, len(stages))
        stages[i : i + 1] = [self.report]
        write_report(target, self.title or title, stages)


def _now() -> str:
    return datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
