"""An exponential moving average of the trained weights."""

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

    After each step that Lightning counts, ``average = decay * average + (1 - decay) * weights``, in fp32 or wider. The
    average starts at the weights at the start of ``fit``. In PPO a counted step is an iteration. Only trainable
    parameters of the module's ``model_to_export`` are averaged: adapters, for instance, but not the frozen backbone.

    Validation, testing and prediction use the average, and so do
    :class:`~lightning_rlhf.callbacks.SampleCompletions` and :class:`~lightning_rlhf.callbacks.HFExport`. Training and
    PPO's rollouts never use it. A checkpoint's ``state_dict`` holds the trained weights, and this callback's state
    holds the average, so a run with this callback and ``ckpt_path`` restores both. Use :func:`averaged_weights` to
    apply the average elsewhere.

    Lightning's ``EMAWeightAveraging`` copies the whole module in its own dtype, stores frozen weights in checkpoints,
    and restores the trained weights before the end of validation, when exports are made.

    Args:
        decay: Share of the average that each step keeps. The average covers about the last ``1 / (1 - decay)`` steps,
            which should be far fewer than the steps of the run. A larger value averages over more steps.

    Raises:
        ValueError: ``decay`` is not in [0, 1).
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}.")
        self.decay = decay
        self._average: dict[str, Tensor] = {}  # by name in `model_to_export`
        self._resumed = False  # the average came from a checkpoint
        self._trained_weights: dict[str, Tensor] | None = None  # set while the module has the average
        self._step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Moves this callback to the front of the list, so that the others find the average up to date.

        Raises:
            ValueError: The strategy shards weights.
        """
        if not holds_whole_models(trainer.strategy):
            raise ValueError(
                f"EMA supports one device and DDP, but not {type(trainer.strategy).__name__}. Set trainer.strategy to "
                "ddp, or remove EMA."
            )
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [self, *(c for c in callbacks if c is not self)]  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------------- the average

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the average at the weights, or restores it from the checkpoint.

        Raises:
            ValueError: The checkpoint's average belongs to other weights.
        """
        parameters = _trainable(pl_module)
        if self._resumed:
            self._check(parameters)
        start = self._average if self._resumed else parameters
        self._average = {k: wide(start[k].detach()).to(p.device, copy=True) for k, p in parameters.items()}
        self._resumed = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the last step that was averaged."""
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average once per counted step."""
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        for name, p in _trainable(pl_module).items():
            self._average[name].lerp_(p.to(self._average[name].dtype), 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """Returns the average without rounding."""
        return {"average": self._average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the average."""
        self._average, self._resumed = state_dict["average"], True

    # ------------------------------------------------------------------------------------------------- using it

    @contextmanager
    def applied(self, module: L.LightningModule) -> Iterator[None]:
        """Gives the module the averaged weights within the context. The trained weights are not copied.

        Args:
            module: The module that is trained.

        Raises:
            ValueError: The checkpoint's average belongs to other weights.
        """
        if self._trained_weights is not None:  # a validation is running
            yield
            return
        self._use_average(module)
        try:
            yield
        finally:
            self._use_trained(module)

    def _use_average(self, module: L.LightningModule) -> None:
        if not self._average:  # validation without training
            return
        parameters = _trainable(module)
        self._check(parameters)
        self._trained_weights = {name: p.data for name, p in parameters.items()}
        for name, p in parameters.items():
            p.data = self._average[name].to(p)

    def _use_trained(self, module: L.LightningModule) -> None:
        if self._trained_weights is not None:
            for name, p in _trainable(module).items():
                p.data = self._trained_weights[name]
            self._trained_weights = None

    def _check(self, parameters: dict[str, nn.Parameter]) -> None:
        have, want = ({k: tuple(v.shape) for k, v in x.items()} for x in (self._average, parameters))
        if have != want:
            name = next(k for k in [*want, *have] if have.get(k) != want.get(k))
            raise ValueError(
                f"EMA: the checkpoint's average does not match the module's weights. {name} has the shape "
                f"{have.get(name, 'missing')} in the average and {want.get(name, 'missing')} in the module. Use the "
                "module's settings of the run that wrote the checkpoint."
            )

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Switches to the average."""
        self._use_average(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Switches back to the trained weights, before checkpoints are written."""
        self._use_trained(pl_module)

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Switches back to the trained weights if a validation failed."""
        self._use_trained(pl_module)


def averaged_weights(trainer: L.Trainer) -> AbstractContextManager[None]:
    """Gives the module its averaged weights within the context. It has no effect if the Trainer has no :class:`EMA`.

    Args:
        trainer: A Trainer that is training, has trained, or has validated a checkpoint.
    """
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    ema = next((c for c in callbacks if isinstance(c, EMA)), None)
    return nullcontext() if ema is None else ema.applied(trainer.lightning_module)


def _trainable(module: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.model_to_export.named_parameters() if p.requires_grad}
