"""Optimizer steps that all ranks take, or skip, together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_rlhf.strategies import ColossalAIStrategy
from lightning_rlhf.strategies.gradients import (
    clip_grad_norm,
    grad_scaler,
    loss_scale,
    parameters_of,
    sharding,
    zero_grad,
)
from lightning_rlhf.utils.collectives import data_size, replica_ranks


class Step(NamedTuple):
    """The result of an update.

    Attributes:
        outcome: ``taken``; ``overflow`` if it was skipped because the loss scale was too large for fp16, which is
            normal; ``not_finite`` if it was skipped because the loss or gradients were not finite.
        grad_norms: Norms of gradients before clipping, by name.
    """

    outcome: Literal["taken", "overflow", "not_finite"]
    grad_norms: dict[str, float]


class Updater:
    """Backward passes and optimizer steps of a LightningModule with manual optimization.

    Losses are divided by the totals of the whole minibatch, so that the sum of all ranks' gradients is exact. One
    collective per update makes this sum, not the backward passes, except where the strategy shards gradients.

    Lightning counts exactly one step per iteration, so that ``global_step``, ``max_steps``, schedules and checkpoints
    are in iterations.

    Args:
        module: The module that is trained. A Trainer must be attached when it is used, and the module's
            ``on_before_optimizer_step`` must call :meth:`clip`.
    """

    def __init__(self, module: L.LightningModule) -> None:
        self.module = module
        self._to_clip: list[tuple[Sequence[nn.Parameter], float]] = []

    @property
    def trainer(self) -> L.Trainer:
        """The module's."""
        return self.module.trainer

    @property
    def sharded(self) -> ColossalAIStrategy | None:
        """The strategy, where each rank holds a part of the gradients."""
        return sharding(self.trainer.strategy)

    def no_sync(self) -> AbstractContextManager[None]:
        """Keeps gradients of backward passes on this rank, unless the strategy shards them."""
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and not self.sharded:
            return strategy.block_backward_sync()
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """A backward pass: adds a part of a minibatch's loss to its gradients."""
        self.module.manual_backward(
            loss * data_size() if self.sharded else loss
        )  # strategies that shard gradients average them

    def zero_grad(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> None:
        """Sets gradients to none."""
        zero_grad(self.trainer, [p for group in parameters.values() for p in group])

    def step(
        self, parameters: Mapping[str, Sequence[nn.Parameter]], loss: float, max_grad_norm: float | None, count: bool
    ) -> Step:
        """Sums gradients over ranks, clips them and steps all optimizers, or skips the update, on all ranks alike.

        As everywhere in Lightning, ``on_before_optimizer_step`` sees gradients that are unscaled and not yet clipped.
        An update that is skipped calls no such hook.

        Where losses are scaled (fp16), all optimizers are unscaled, stepped or skipped together, and the scale moves
        once: a scale that moved between two of them would unscale the second by another factor.

        Args:
            parameters: All trained parameters, in groups by name; each group is clipped by its own norm.
            loss: The whole loss, the same on all ranks.
            max_grad_norm: Norm beyond which gradients are clipped; None for no bound.
            count: Whether Lightning counts this step: the first of an iteration.

        Returns:
            The outcome and the norms.

        Raises:
            RuntimeError: The module's hook did not clip.
        """
        if not self.sharded:
            self._sum_gradients([p for group in parameters.values() for p in group])
        scaler, scale = grad_scaler(self.trainer), loss_scale(self.trainer)
        if scaler is not None:
            for optimizer in self._optimizers():
                scaler.unscale_(optimizer.optimizer)
        strategy = self.trainer.strategy
        norms = {name: clip_grad_norm(strategy, group, None).item() for name, group in parameters.items()}
        finite = math.isfinite(loss) and all(map(math.isfinite, norms.values()))
        if finite:
            self._to_clip = [] if max_grad_norm is None else [(group, max_grad_norm) for group in parameters.values()]
            self._step(count)
            if self._to_clip:
                raise RuntimeError(
                    f"{type(self.module).__name__}.on_before_optimizer_step does not call super(), which clips "
                    "gradients: call it last."
                )
        if scaler is not None:
            scaler.update()
        elif not finite and scale != 1:
            self._lower_scales()
        self.zero_grad(parameters)
        if finite:
            return Step("taken", norms)
        return Step("overflow" if scale > 1 and math.isfinite(loss) else "not_finite", norms)

    def clip(self, optimizer: Optimizer) -> None:
        """Clips the gradients that an optimizer is about to step by; to be called after all hooks that look at them.

        Hooks may have changed them, so the norms are measured anew.
        """
        own = {id(p) for p in parameters_of(optimizer)}
        waiting, self._to_clip = self._to_clip, []
        for group, limit in waiting:
            if own.isdisjoint(map(id, group)):
                self._to_clip.append((group, limit))
            else:
                clip_grad_norm(self.trainer.strategy, group, limit)

    def count_iteration(self, parameters: Mapping[str, Sequence[nn.Parameter]]) -> None:
        """A step without gradients, which changes nothing, for an iteration that took no update."""
        self.zero_grad(parameters)
        self._step(count=True)

    def step_schedules(self, metrics: Mapping[str, Any], validated: bool = False) -> None:
        """One step of each schedule per iteration; one that follows a metric under ``val/`` steps after validation.

        Args:
            metrics: What the iteration logs, by name.
            validated: Steps only those that follow validation, otherwise only the others.

        Raises:
            ValueError: A schedule follows a metric that is not logged.
        """
        found: Any = self.module.lr_schedulers()
        for scheduler in found if isinstance(found, list) else [] if found is None else [found]:
            plateau = isinstance(scheduler, ReduceLROnPlateau)
            if (plateau and _monitor(scheduler).startswith("val/")) != validated:
                continue
            if not plateau:
                scheduler.step()
                continue
            name, known = _monitor(scheduler), {**self.trainer.callback_metrics, **metrics}
            if name not in known:
                raise ValueError(
                    f"lr_scheduler follows {name!r}, which is not logged. Set its monitor (of "
                    f"lightning.pytorch.cli.ReduceLROnPlateau) to one of: {', '.join(sorted(known)) or 'none yet'}."
                )
            scheduler.step(float(known[name]))

    def _sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        ranks = replica_ranks()
        if ranks.size == 1:
            return
        for p in parameters:  # ranks whose part was empty
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for dtype in dict.fromkeys(p.dtype for p in parameters):  # in the same order on all ranks
            gradients = [p.grad for p in parameters if p.dtype == dtype and p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat, group=ranks.group)
            if data_size() < ranks.size:  # under sequence parallelism gradients are made to be averaged over a copy
                flat *= data_size() / ranks.size
            for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    def _lower_scales(self) -> None:
        """Lets optimizers with gradients that are not finite skip a step, so that ColossalAI lowers their scales."""
        sharded = self.sharded
        assert sharded is not None
        for optimizer in self._optimizers():
            if sharded.clip_grad_norm(parameters_of(optimizer.optimizer), None).isfinite():
                optimizer.zero_grad()
        self._step(count=False)

    def _optimizers(self) -> list[Any]:
        found: Any = self.module.optimizers()
        return found if isinstance(found, list) else [found]

    def _step(self, count: bool) -> None:
        """Steps all optimizers by gradients that are unscaled already."""
        plugin: Any = self.trainer.precision_plugin
        scaler = grad_scaler(self.trainer)
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


def _monitor(scheduler: ReduceLROnPlateau) -> str:
    """Returns the metric that a schedule follows; torch's class does not say, Lightning's does."""
    return getattr(scheduler, "monitor", "train/score" if scheduler.mode == "max" else "train/loss")
