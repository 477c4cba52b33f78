"""Averaged weights beside the trained ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from lightning_rlhf.functional.precision import wide
from lightning_rlhf.strategies import holds_whole_models


class EMA(L.Callback):
    """Keeps an exponential moving average of the trained weights, for validation, samples and exports.

    After each step that Lightning counts, ``average = decay * average + (1 - decay) * weights``, in fp32 at least; it
    starts at the weights that ``fit`` starts from. In PPO a counted step is an iteration, whatever its updates. Only
    what trains of the module's ``model_to_export`` is averaged: adapters, not the frozen backbone.

    Validation, test and predict batches run under the average, and so do
    :class:`~lightning_rlhf.callbacks.SampleCompletions` and :class:`~lightning_rlhf.callbacks.HFExport`. Training never
    does, nor do PPO's rollouts. A checkpoint's ``state_dict`` holds the trained weights, and this callback's part of it
    the average: a run that is given this callback and ``ckpt_path`` has both. For other uses there is
    :func:`averaged_weights`.

    Lightning's ``EMAWeightAveraging`` copies the whole module, in its own dtype, puts frozen weights into checkpoints,
    and has the trained weights back in place before validation's end, when exports are made.

    Args:
        decay: Share of the average that a step keeps: it looks back about ``1 / (1 - decay)`` steps, which should be
            well below the length of the run.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}.")
        self.decay = decay
        self._average: dict[str, Tensor] = {}  # by name in `model_to_export`
        self._resumed = False  # it came from a checkpoint
        self._kept: dict[str, Tensor] | None = None  # kept while the module has the average
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Goes first, so that what others do after a step has the average of it.

        Raises:
            ValueError: The strategy shards weights.
        """
        if not holds_whole_models(trainer.strategy):
            raise ValueError(
                f"EMA runs on one device and under DDP, not under {type(trainer.strategy).__name__}: set "
                "trainer.strategy to ddp, or leave EMA out."
            )
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(c for c in callbacks if c is not self)]  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------------- the average

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts at the weights, or where the checkpoint was.

        Raises:
            ValueError: The checkpoint's average is of other weights.
        """
        parameters = _trained(pl_module)
        if self._resumed:
            self._check(parameters)
        start = self._average if self._resumed else parameters
        self._average = {k: wide(start[k].detach()).to(p.device, copy=True) for k, p in parameters.items()}
        self._resumed = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Knows the last step that was averaged."""
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Averages once a counted step."""
        if trainer.global_step == self._step:  # within an accumulation window
            return
        self._step = trainer.global_step
        for name, p in _trained(pl_module).items():
            self._average[name].lerp_(p.to(self._average[name].dtype), 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """The average, exactly."""
        return {"average": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it back."""
        self._average, self._resumed = state_dict["average"], True

    # ------------------------------------------------------------------------------------------------- its use

    @contextmanager
    def applied(self, module: L.LightningModule) -> Iterator[None]:
        """Within it the module has the average; the trained weights are kept aside, not copied.

        Args:
            module: The one that trains.

        Raises:
            ValueError: The checkpoint's average is of other weights.
        """
        if self._kept is not None:  # a validation is running
            yield
            return
        self._take_average(module)
        try:
            yield
        finally:
            self._take_trained(module)

    def _take_average(self, module: L.LightningModule) -> None:
        if not self._average:  # validation of a model that nothing was averaged of
            return
        parameters = _trained(module)
        self._check(parameters)
        self._kept = {name: p.data for name, p in parameters.items()}
        for name, p in parameters.items():
            p.data = self._average[name].to(p)

    def _take_trained(self, module: L.LightningModule) -> None:
        if self._kept is not None:
            for name, p in _trained(module).items():
                p.data = self._kept[name]
            self._kept = None

    def _check(self, parameters: dict[str, nn.Parameter]) -> None:
        have, want = ({k: tuple(v.shape) for k, v in x.items()} for x in (self._average, parameters))
        if have != want:
            name = next(k for k in [*want, *have] if have.get(k) != want.get(k))
            raise ValueError(
                f"EMA: the average is of other weights than the module trains. {name}: {have.get(name, 'missing')} "
                f"there, {want.get(name, 'missing')} here. Set the module up as in the run that averaged."
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Evaluates the average."""
        self._take_average(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Goes back, before checkpoints are written."""
        self._take_trained(pl_module)

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Goes back, where a validation broke off."""
        self._take_trained(pl_module)


def averaged_weights(trainer: L.Trainer) -> AbstractContextManager[None]:
    """Within it the module has its averaged weights, where the Trainer has an :class:`EMA`; else nothing happens.

    Args:
        trainer: Of a run that is going on or over, or that validated a checkpoint.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ema = next((c for c in callbacks if isinstance(c, EMA)), None)
    return nullcontext() if ema is None else ema.applied(trainer.lightning_module)


def _trained(module: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.model_to_export.named_parameters() if p.requires_grad}
