"""Hugging Face directories of the best and the last weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lightning_rlhf.models.saving import save_pretrained


class HFExport(L.Callback):
    """Writes directories that ``from_pretrained`` loads: ``best`` whenever a metric improves, ``last`` at the end.

    Args:
        dirpath: Parent of both; default ``hf`` under the Trainer's ``default_root_dir``.
        on: ``best``, ``end`` or ``both``; ``best`` needs ``monitor``.
        monitor: Metric that decides what is best, such as ``val/loss``.
        mode: Whether less or more of it is better.
        adapter_only: Save adapters alone rather than merged weights.
        max_shard_size: Most bytes of a weights file.

    Raises:
        ValueError: ``on: best`` without ``monitor``.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        on: Literal["best", "end", "both"] = "both",
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        adapter_only: bool = False,
        max_shard_size: str = "5GB",
    ) -> None:
        if on == "best" and monitor is None:
            raise ValueError("HFExport(on='best') needs monitor, such as 'val/loss'.")
        self.dirpath, self.on, self.monitor, self.mode = dirpath, on, monitor, mode
        self.adapter_only, self.max_shard_size = adapter_only, max_shard_size
        self.best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best value so far, so that a resumed run does not replace a better export."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self.best = state_dict["best"]

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports when the metric is better than ever.

        Raises:
            ValueError: ``monitor`` names a metric that was not logged.
        """
        if self.monitor is None or self.on == "end" or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if self.monitor not in trainer.callback_metrics:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"HFExport: monitor={self.monitor!r} was not logged. Logged: {known}.")
        value = float(trainer.callback_metrics[self.monitor])
        if self.best is None or (value < self.best if self.mode == "min" else value > self.best):
            self.best = value
            self._export(trainer, pl_module, "best")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the last weights and says where they are."""
        if self.on != "best":
            path = self._export(trainer, pl_module, "last")
            rank_zero_info(f"Hugging Face model: {path}")

    def _export(self, trainer: L.Trainer, pl_module: Any, name: str) -> Path:
        path = Path(self.dirpath or Path(trainer.default_root_dir) / "hf") / name
        if trainer.is_global_zero:
            save_pretrained(
                pl_module.policy.model,
                pl_module.tokenizer,
                path,
                stop_token_ids=getattr(pl_module, "stop_token_ids", ()),
                adapter_only=self.adapter_only,
                max_shard_size=self.max_shard_size,
            )
        trainer.strategy.barrier("HFExport")
        return path
