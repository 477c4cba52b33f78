"""Writes predictions to a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_rlhf.protocols import FindsRows
from lightning_rlhf.utils.collectives import gather_objects
from lightning_rlhf.utils.filesystem import check_writable, move_aside


class WritePredictions(L.Callback):
    """Writes the results of ``predict`` to ``predictions.jsonl``: one line per record, in the order of the data.

    The module's ``predict_step`` must return records with a ``row``. If the data module knows where a row came from,
    its line has this place as ``where``. During prediction each rank writes to a part file beside the target; a run
    that is killed leaves these files behind. At the end, the file of an earlier run is moved to
    ``predictions.1.jsonl``. With ``fast_dev_run`` nothing is written.

    Args:
        path: Path of the file. Default: ``predictions.jsonl`` under the Trainer's ``default_root_dir``.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = path
        self._part: TextIO | None = None

    def _target(self, trainer: L.Trainer) -> Path:
        return Path(self.path or Path(trainer.default_root_dir) / "predictions.jsonl")

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens this rank's part file.

        Raises:
            OSError: The file can't be written.
        """
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        target = self._target(trainer)
        check_writable(target, "WritePredictions", "its path")
        target.parent.mkdir(parents=True, exist_ok=True)
        self._part = target.with_name(f"{target.name}.part{trainer.global_rank}").open("w+", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Writes the records of a batch."""
        if self._part is None:
            return
        data = getattr(trainer, "datamodule", None)
        for record in outputs:
            place = {"where": data.where("predict", record["row"])} if isinstance(data, FindsRows) else {}
            self._part.write(json.dumps({**record, **place}, ensure_ascii=False) + "\n")
        self._part.flush()

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Merges the part files of all ranks, in the order of the data."""
        if self._part is None:
            return
        self._part.seek(0)
        lines = [line.rstrip("\n") for line in self._part]
        parts = gather_objects(lines)
        target = self._target(trainer)
        if trainer.is_global_zero:
            # the sort is stable: records of the same row keep their order
            records = sorted((line for part in parts for line in part), key=lambda line: json.loads(line)["row"])
            temporary = target.with_name(f"{target.name}.writing")
            temporary.write_text("".join(line + "\n" for line in records), encoding="utf-8")
            if (old := move_aside(target)) is not None:
                rank_zero_info(f"WritePredictions: the predictions of an earlier run are now in {old}.")
            os.replace(temporary, target)
        trainer.strategy.barrier("WritePredictions")
        self._part.close()
        os.unlink(self._part.name)
        self._part = None
        rank_zero_info(f"Predictions: {target}")
