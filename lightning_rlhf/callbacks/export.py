"""Exports the best and the last weights as Hugging Face directories."""

from __future__ import annotations

import copy
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_rlhf.callbacks.ema import averaged_weights
from lightning_rlhf.data.errors import DataError
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.protocols import ChecksValidation, stop_tokens_of
from lightning_rlhf.strategies import whole_state_dict
from lightning_rlhf.utils.collectives import all_ranks, gather_objects
from lightning_rlhf.utils.filesystem import check_replaceable, check_writable


class HFExport(L.Callback):
    """Writes directories that ``from_pretrained`` loads: ``best`` whenever a metric improves, ``last`` at the end.

    The module's ``model_to_export.model`` and ``tokenizer`` are exported, with an
    :class:`~lightning_rlhf.callbacks.EMA` its averaged weights. Sharded weights (FSDP) are gathered by all ranks and
    written by one. A new run says at its start which exports of an earlier one it will replace. With ``fast_dev_run``
    nothing is written, so that exports of a finished run stay. A weight that is not finite raises an error that names
    it, and the former export stays.

    Args:
        dirpath: Parent directory of both. Default: ``hf`` under the Trainer's ``default_root_dir``.
        when: ``best``, ``end`` or ``both``. ``best`` needs ``monitor``.
        monitor: Metric that decides what is best, such as ``val/loss``. If ranks have different values, their mean
            decides.
        mode: ``min`` if a smaller value of the metric is better, ``max`` if a larger value is better.
        adapter_only: Save only adapters instead of merged weights.
        max_shard_size: Largest size of a weights file. A smaller value gives more files.

    Raises:
        ValueError: ``when: best`` without ``monitor``.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        when: Literal["best", "end", "both"] = "both",
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        adapter_only: bool = False,
        max_shard_size: str = "5GB",
    ) -> None:
        if when == "best" and monitor is None:
            raise ValueError("HFExport(when='best') needs monitor, such as 'val/loss'.")
        self.dirpath, self.when, self.monitor, self.mode = dirpath, when, monitor, mode
        self.adapter_only, self.max_shard_size = adapter_only, max_shard_size
        self.best: float | None = None
        self._validated = self._validates = False

    @property
    def state_key(self) -> str:
        """Distinguishes several exports of one run."""
        return self._generate_state_key(dirpath=self.dirpath, monitor=self.monitor, mode=self.mode)

    def state_dict(self) -> dict[str, Any]:
        """Returns the best value so far, so that a resumed run does not replace a better export."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the best value."""
        self.best = state_dict["best"]

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Checks before training that exports will be possible.

        Raises:
            FileExistsError: The path of an export is taken by something else.
            OSError: The directory of exports can't be written.
            ValueError: The strategy does not gather whole weights.
        """
        if stage != TrainerFn.FITTING:
            return
        strategy: Any = trainer.strategy
        # FSDP's type of checkpoint has no public attribute
        in_shards = getattr(strategy, "_state_dict_type", "full") != "full" or getattr(strategy, "zero_stage_3", False)
        if in_shards or isinstance(strategy, ModelParallelStrategy):
            raise ValueError(
                f"HFExport: {type(strategy).__name__} keeps weights in shards with its settings. Use FSDPStrategy with "
                "state_dict_type: full, or remove HFExport."
            )
        for name in self._names:
            check_replaceable(self._path(trainer, name))
            if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                check_writable(self._path(trainer, name) / "config.json", "HFExport", "its dirpath")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Names exports of an earlier run, and warns if there is no validation, so that ``best`` will not be written.

        Raises:
            DataError: ``when`` is ``best``, but nothing is validated.
        """
        if not trainer.global_step and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            earlier = [str(self._path(trainer, name)) for name in self._names if self._path(trainer, name).exists()]
            if earlier:
                rank_zero_info(f"HFExport: this run will replace {' and '.join(earlier)} of an earlier run.")
        self._validated = False
        self._validates = trainer.enable_validation and (
            trainer.val_dataloaders is None or any(trainer.num_val_batches)
        )
        if self._validates or not self._watches:
            return
        reason = f"HFExport: nothing is validated, so {self.monitor} is not logged and 'best' is not written"
        if self.when == "best":
            raise DataError(f"{reason}. Add validation data, or set when: end.")
        if not isinstance(getattr(trainer, "datamodule", None), ChecksValidation):  # it has said so
            rank_zero_warn(f"{reason}. Only 'last' is written, at the end.")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports if the metric has improved.

        Raises:
            ValueError: The metric was not logged, or a weight is not finite.
            RuntimeError: The rank that writes failed; its message has the reason.
        """
        if not self._watches or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        self._validated = True
        own = trainer.callback_metrics.get(self.monitor)  # type: ignore[arg-type]
        found = [
            value for value in gather_objects(None if own is None else float(own), all_ranks()) if value is not None
        ]
        if not found:
            known = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"HFExport: monitor={self.monitor!r} was not logged. Logged: {known}.")
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        value = sum(found) / len(found)  # all ranks must make the same decision
        best = self.best if self.best is not None else float("inf" if self.mode == "min" else "-inf")
        if value < best if self.mode == "min" else value > best:  # never a NaN
            self.best = value
            self._export(trainer, pl_module, "best")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exports the last weights, and prints their directory and that of the best.

        Raises:
            ValueError: A weight is not finite.
            RuntimeError: The rank that writes failed; its message has the reason.
        """
        if self.when != "best" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._export(trainer, pl_module, "last")
            rank_zero_info(f"Hugging Face model: {self._path(trainer, 'last')}")
        if self.best is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_info(f"Best by {self.monitor}, {self.best:.4g}: {self._path(trainer, 'best')}")
        if self._watches and self._validates and self.best is None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            reason = (
                f"{self.monitor} was never a number"
                if self._validated
                else (
                    "no validation was due before the run ended. Lower trainer.val_check_interval or "
                    "trainer.check_val_every_n_epoch, or train for longer"
                )
            )
            rank_zero_warn(f"HFExport: no 'best' was written: {reason}.")

    @property
    def _watches(self) -> bool:
        return self.monitor is not None and self.when != "end"

    @property
    def _names(self) -> list[str]:
        return [*(["best"] if self._watches else []), *(["last"] if self.when != "best" else [])]

    def _path(self, trainer: L.Trainer, name: str) -> Path:
        return Path(self.dirpath or Path(trainer.default_root_dir) / "hf") / name

    def _export(self, trainer: L.Trainer, pl_module: Any, name: str) -> None:
        error: Exception | None = None
        with averaged_weights(trainer):
            weights = whole_state_dict(trainer.strategy)
            try:
                self._write(trainer, pl_module, name, weights)
            except Exception as problem:  # the other ranks must know, or they would wait forever
                error = problem
        failures = gather_objects(None if error is None else f"{type(error).__name__}: {error}", all_ranks())
        if error is not None:
            raise error
        if any(failures):
            raise RuntimeError(f"HFExport: {next(filter(None, failures))}")

    def _write(self, trainer: L.Trainer, pl_module: Any, name: str, weights: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            model: nn.Module = pl_module.model_to_export.model
            names = {id(module): name for name, module in pl_module.named_modules()}
            prefix = names[id(model)].replace("_fsdp_wrapped_module.", "") + "."
            save_pretrained(
                _unwrapped(model),
                pl_module.tokenizer,
                self._path(trainer, name),
                stop_token_ids=stop_tokens_of(pl_module),
                state_dict={k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)},
                adapter_only=self.adapter_only,
                max_shard_size=self.max_shard_size,
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model without FSDP's wrappers around its layers, with the same tensors."""
    wrappers = [module for module in model.modules() if isinstance(module, FullyShardedDataParallel)]
    if not wrappers:
        return model
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    for wrapper in reversed(wrappers):  # inner ones first
        memo[id(wrapper)] = copy.deepcopy(wrapper.module, memo)
    return copy.deepcopy(model, memo)
