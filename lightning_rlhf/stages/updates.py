"""Optimizer steps that all ranks take, or drop, together, for the stages that step by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_rlhf.functional.advantages import merge_moments, moments
from lightning_rlhf.stages.base import Stage
from lightning_rlhf.stages.optim import gradient_norm, parameters_of


class ManualStage(Stage):
    """Base of the stages with several updates an iteration, one iteration a ``training_step``.

    Exactly one optimizer step of an iteration goes through Lightning's counters, so that ``global_step``,
    ``max_steps``, schedules and checkpoints are in iterations.

    Losses are divided by the whole minibatch's totals, so that the sum of all ranks' gradients is exact. One collective
    an update makes it, not backward passes, except where the strategy shards gradients.

    Attributes:
        iteration: Iterations done.
        dropped: Iterations in a row that took no update because something in them was not finite.
    """

    automatic_optimization: ClassVar[bool] = False
    iteration: int = 0
    _diverged: int = -1

    def on_fit_start(self) -> None:
        """Refuses strategies that would not sum gradients as this stage does; silences a warning that misleads.

        Raises:
            ValueError: It is one.
        """
        super().on_fit_start()
        if not isinstance(self.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"{type(self).__name__} runs on one device, under DDP and under colossalai_..., not under "
                f"{type(self.strategy).__name__}: set trainer.strategy to one of these."
            )
        # Its advice is for one optimizer step a batch; here a checkpoint after the iteration is what resumes exactly.
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization", UserWarning)

    # ------------------------------------------------------------------------------------------------- ranks

    def _ranks(self) -> int:
        return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

    def all_reduce(self, values: Tensor, operation: Any = None) -> Tensor:
        """The sum over ranks (or what else ``operation`` is) of a small tensor."""
        if self._ranks() == 1:
            return values
        values = values.to(self.device, copy=True)
        dist.all_reduce(values, operation or dist.ReduceOp.SUM)
        return values.cpu()

    def all_gather_rows(self, values: Tensor) -> Tensor:
        """(R, ...) a small tensor of each rank."""
        if self._ranks() == 1:
            return values[None]
        values = values.to(self.device)
        found = [torch.empty_like(values) for _ in range(self._ranks())]
        dist.all_gather(found, values)
        return torch.stack(found).cpu()

    def moments(self, values: Tensor, weight: Tensor | None = None) -> Tensor:
        """(3,) moments of values over all ranks; see :func:`~lightning_rlhf.functional.advantages.moments`."""
        return merge_moments(self.all_gather_rows(moments(values, weight)))

    # ------------------------------------------------------------------------------------------------- updates

    def apart(self) -> AbstractContextManager[None]:
        """Within it backward passes leave gradients to this rank, unless the strategy shards them."""
        strategy = self.strategy
        if isinstance(strategy, DDPStrategy) and not self._sharded:
            return strategy.block_backward_sync()
        return nullcontext()

    def accumulate(self, loss: Tensor) -> None:
        """A backward pass: adds a part of a minibatch's loss to its gradients."""
        self.manual_backward(loss * self._ranks() if self._sharded else loss)  # those that shard them average

    def update(self, parameters: Sequence[nn.Parameter], loss: float, first: bool) -> bool:
        """Sums gradients over ranks and steps all optimizers, or drops the update, on all ranks alike.

        Where losses are scaled (fp16), all optimizers are unscaled, stepped or dropped, and the scale moved, once and
        together: a scale that moved between two of them would unscale the second by another factor.

        Args:
            parameters: What the optimizers train.
            loss: The whole loss, the same on all ranks.
            first: Whether no update of this iteration was taken yet; the first is the one that Lightning counts.

        Returns:
            Whether it was taken.
        """
        if self._ranks() > 1 and not self._sharded:
            for p in parameters:  # ranks whose part was empty
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            for dtype in {p.dtype for p in parameters}:
                gradients = [p.grad for p in parameters if p.dtype == dtype and p.grad is not None]
                flat = torch.cat([g.flatten() for g in gradients])
                dist.all_reduce(flat)
                for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                    gradient.copy_(summed.view_as(gradient))
        scaler, scale = self.scaler, self.loss_scale
        if scaler is not None:
            for optimizer in self._optimizers():
                scaler.unscale_(optimizer.optimizer)
        norm = self.clip(parameters, None) if self._sharded else gradient_norm(parameters)
        finite = math.isfinite(loss) and bool(norm.isfinite())
        if finite:
            self._step(count=first)
            self.dropped = 0
        elif scale <= 1 or not math.isfinite(loss):  # else the scale is too large, which is no fault of the run's
            self._diverged = self.iteration
        if scaler is not None:
            scaler.update()
        elif not finite and scale != 1:
            self._lower_scales()
        self.drop_gradients(parameters)
        return finite

    def _lower_scales(self) -> None:
        """Has those children whose gradients are not finite skip a step, by which ColossalAI lowers their scales."""
        assert self._sharded is not None
        for optimizer in self._optimizers():
            if self._sharded.clip_grad_norm(parameters_of(optimizer.optimizer), None).isfinite():
                optimizer.zero_grad()
        self._step(count=False)

    def count_iteration(self, parameters: Sequence[nn.Parameter]) -> None:
        """A step without gradients, which changes nothing, for an iteration that took no update.

        Raises:
            RuntimeError: ``max_skipped_updates`` iterations in a row took none, because something was not finite.
        """
        self.drop_gradients(parameters)
        self._step(count=True)
        if self._diverged == self.iteration:
            self.count_dropped(True, "iterations")

    def _optimizers(self) -> list[Any]:
        found: Any = self.optimizers()
        return found if isinstance(found, list) else [found]

    def _step(self, count: bool) -> None:
        """Steps all optimizers, by gradients that are unscaled already."""
        plugin: Any = self.trainer.precision_plugin
        scaler = self.scaler
        if scaler is not None:
            plugin.scaler = None  # it would unscale, and move the scale, for each of them
        try:
            for i, optimizer in enumerate(self._optimizers()):
                if count and i == 0:
                    optimizer.step()
                else:
                    self.trainer.strategy.optimizer_step(optimizer.optimizer, closure=lambda: None)
        finally:
            if scaler is not None:
                plugin.scaler = scaler

    # ------------------------------------------------------------------------------------------------- schedules

    def step_schedules(self, metrics: Mapping[str, Any] = MappingProxyType({})) -> None:
        """One step of each schedule, once an iteration; of one by a metric under ``val/``, after each validation.

        Args:
            metrics: What the iteration logs, by name.

        Raises:
            ValueError: A schedule goes by a metric that is not there.
        """
        for scheduler in self._schedules():
            if not isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step()
            elif not _monitor(scheduler).startswith("val/"):
                self._step_plateau(scheduler, metrics)

    def on_validation_epoch_end(self) -> None:
        """Steps the schedules that go by validation, before a checkpoint is written of it."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            for scheduler in self._schedules():
                if isinstance(scheduler, ReduceLROnPlateau) and _monitor(scheduler).startswith("val/"):
                    self._step_plateau(scheduler, {})

    def _schedules(self) -> list[Any]:
        found: Any = self.lr_schedulers()
        return found if isinstance(found, list) else [] if found is None else [found]

    def _step_plateau(self, scheduler: ReduceLROnPlateau, metrics: Mapping[str, Any]) -> None:
        name, known = _monitor(scheduler), {**self.trainer.callback_metrics, **metrics}
        if name not in known:
            raise ValueError(
                f"lr_scheduler goes by {name!r}, which is not logged. Set its monitor (of "
                f"lightning.pytorch.cli.ReduceLROnPlateau) to one of: {', '.join(sorted(known)) or 'none yet'}."
            )
        scheduler.step(float(known[name]))

    # ------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the iteration and what it counts."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["online"] = {"iteration": self.iteration}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        super().on_load_checkpoint(checkpoint)
        self.iteration = checkpoint["online"]["iteration"]


def _monitor(scheduler: ReduceLROnPlateau) -> str:
    """The metric that it goes by; torch's class does not say, Lightning's does."""
    return getattr(scheduler, "monitor", "train/score" if scheduler.mode == "max" else "train/loss")
