"""Writes what was sampled in training to tables."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import pyarrow as pa
import pyarrow.parquet as pq
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_rlhf.callbacks.samples import log_table
from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.protocols import RecordsCompletions
from lightning_rlhf.utils.collectives import gather_objects
from lightning_rlhf.utils.filesystem import check_writable, free_name


class CompletionsTable(L.Callback):
    """Writes all completions of every nth iteration of GRPO, PPO or online DPO: a file per iteration, of all ranks.

    A file ``completions/iteration_000010.jsonl`` has one row per completion, by the row of its prompt: ``iteration``,
    ``row``, ``prompt``, ``completion``, ``score``, ``score/PART`` for each part of the reward, ``reward/NAME`` for what
    a reward returned beside its score, ``advantage``, ``length`` in tokens, ``truncated``, ``flat`` (all scores of its
    prompt are equal), ``learned`` (the loss has it), and ``data/COLUMN`` for the prompt's other columns. With
    ``flat_groups: refill`` it has the completions that were sampled in vain too. What does not apply is null.

    A file is written whole or not at all. A resumed run writes those of its iterations again; a new run moves those of
    an earlier one to ``completions.1``. Loggers that accept tables or text get the first groups. ``Report`` shows
    groups of the last file. With ``fast_dev_run`` nothing is written.

    Args:
        every_n_iterations: Number of iterations from one table to the next. A larger value needs less space.
        format: ``jsonl`` or ``parquet``.
        dirpath: Folder of the files. Default: ``completions`` under the Trainer's ``default_root_dir``.
        log_groups: Number of prompts whose completions loggers get; 0 for none.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(
        self,
        every_n_iterations: int = 10,
        format: Literal["jsonl", "parquet"] = "jsonl",
        dirpath: str | os.PathLike[str] | None = None,
        log_groups: int = 4,
    ) -> None:
        check_arguments(CompletionsTable.__init__, locals(), every_n_iterations=Range(1), log_groups=Range(0))
        self.every_n_iterations, self.format, self.dirpath = every_n_iterations, format, dirpath
        self.log_groups = log_groups
        self.last: list[dict[str, Any]] = []  # the records of the last table, on rank 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks before training that there will be completions, and that their files can be written.

        Raises:
            OSError: No file can be written in the folder.
            ValueError: The module samples nothing.
        """
        if stage == TrainerFn.FITTING and not isinstance(pl_module, RecordsCompletions):
            raise ValueError(
                f"CompletionsTable writes what GRPO, PPO and online DPO sample; {type(pl_module).__name__} samples "
                "nothing. Remove the callback, or use SampleCompletions."
            )
        if stage == TrainerFn.FITTING and trainer.is_global_zero and not _dry(trainer):
            check_writable(self._target(trainer, 0), "CompletionsTable", "its dirpath")
        self.last = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Moves the files of an earlier run aside."""
        if trainer.global_step or not trainer.is_global_zero or _dry(trainer):
            return
        folder = self._target(trainer, 0).parent
        if files := [path for path in folder.glob("iteration_*") if path.suffix in (".jsonl", ".parquet")]:
            old = free_name(folder)
            old.mkdir()
            for path in files:
                os.replace(path, old / path.name)
            rank_zero_info(f"CompletionsTable: the tables of an earlier run are now in {old}.")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Writes the completions of an iteration."""
        if _dry(trainer) or pl_module.iteration % self.every_n_iterations:
            return
        parts = gather_objects(pl_module.completion_records())
        if trainer.is_global_zero:
            every = sorted((record for part in parts for record in part), key=lambda record: record["row"])
            names = dict.fromkeys(name for record in every for name in record)
            self.last = records = [{name: record.get(name) for name in names} for record in every]
            path = self._target(trainer, pl_module.iteration)
            write_records(path, records)
            self._log(trainer, records, pl_module.iteration)
            if pl_module.iteration == self.every_n_iterations:
                rank_zero_info(f"Completions of every {self.every_n_iterations} iterations: {path.parent}")

    def _target(self, trainer: L.Trainer, iteration: int) -> Path:
        folder = Path(self.dirpath or Path(trainer.default_root_dir) / "completions")
        return folder / f"iteration_{iteration:06d}.{self.format}"

    def _log(self, trainer: L.Trainer, records: Sequence[Mapping[str, Any]], iteration: int) -> None:
        rows = list(dict.fromkeys(record["row"] for record in records))[: self.log_groups]
        shown = [record for record in records if record["row"] in rows]
        if shown:
            names = list(shown[0])
            log_table(trainer, "completions", names, [[_cell(r[name]) for name in names] for r in shown], iteration)


def _dry(trainer: L.Trainer) -> bool:
    dry: bool = trainer.fast_dev_run  # type: ignore[attr-defined]
    return dry


def write_records(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes records with the same keys to a file, whole or not at all.

    Args:
        path: Its name ends in ``.jsonl`` or ``.parquet``. In Parquet, a column whose values are no numbers, texts or
            truth values of one type has them as JSON, and so has one of integers beyond 64 bits. What JSON can't
            hold, such as a date, is written as its text, in both formats.
        records: They may be none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        if path.suffix == ".parquet":
            names = list(records[0]) if records else []
            pq.write_table(pa.table({name: _column([r[name] for r in records]) for name in names}), partial)
        else:
            lines = (_json(record) + "\n" for record in records)
            partial.write_text("".join(lines), encoding="utf-8", errors="replace")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _column(values: Sequence[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {str}:  # half a surrogate pair, which JSON can spell, is no text for Parquet
        return [None if v is None else v.encode("utf-8", "replace").decode() for v in values]
    if kinds == {bool} or (kinds <= {int, float} and all(-(1 << 63) <= v < 1 << 63 for v in values if type(v) is int)):
        return [float(v) if v is not None and float in kinds else v for v in values]
    return [None if value is None else _json(value) for value in values]


def _json(value: Any) -> str:
    """JSON, in which a date or another object of the data's columns is a text."""
    return json.dumps(value, ensure_ascii=False, default=str)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
