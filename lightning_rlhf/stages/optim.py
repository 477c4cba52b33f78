"""Optimizer and schedule defaults that the stages share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Trainer
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_rlhf.checks import Range, check_arguments


def parameter_groups(parameters: Iterable[nn.Parameter]) -> list[dict[str, object]]:
    """The trainable ones in two groups: matrices decay, norms and biases (everything of one dimension) do not.

    Raises:
        ValueError: Nothing is trainable.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise ValueError("No parameter is trainable: give lora, or a model that is not frozen.")
    decay = [p for p in trainable if p.dim() > 1]
    rest = [p for p in trainable if p.dim() <= 1]
    groups: list[dict[str, object]] = [{"params": decay}] if decay else []
    return [*groups, {"params": rest, "weight_decay": 0.0}] if rest else groups


def default_optimizer(params: Iterable[Any]) -> Optimizer:
    """AdamW, learning rate 2e-5, betas (0.9, 0.999), weight decay 0.01."""
    return AdamW(params, lr=2e-5, weight_decay=0.01)


def rl_optimizer(params: Iterable[Any]) -> Optimizer:
    """AdamW, learning rate 1e-5, betas (0.9, 0.95), epsilon 1e-5, no decay (Ouyang et al. 2022, C.4)."""
    return AdamW(params, lr=1e-5, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0)


class CosineWarmup(LambdaLR):
    """Linear warm-up, then a cosine down to a share of the rate, counted in optimizer steps.

    Args:
        optimizer: Whose rates are scheduled.
        warmup: Steps of warm-up where at least 1, else the share of ``total_steps``.
        final: Share of the rate at the end.
        total_steps: Length of the run; None takes it from the Trainer when training starts.

    Raises:
        ValueError: One of them is out of its range.
    """

    def __init__(
        self, optimizer: Optimizer, warmup: float = 0.03, final: float = 0.1, total_steps: int | None = None
    ) -> None:
        check_arguments(CosineWarmup.__init__, locals(), warmup=Range(0), final=Range(0, 1), total_steps=Range(1))
        self.warmup, self.final, self.total_steps = warmup, final, total_steps
        self.fitted = total_steps is None
        super().__init__(optimizer, self._factor)

    def _factor(self, step: int) -> float:
        if self.total_steps is None:
            return 1.0
        warmup = int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * self.total_steps)
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))

    def set_total_steps(self, total_steps: int) -> None:
        """Fixes the length of the run and sets the first step's rate."""
        self.total_steps = total_steps
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * self._factor(self.last_epoch)
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


def fit_schedules(trainer: Trainer) -> None:
    """Gives each :class:`CosineWarmup` that was left without one the run's length; to be called in ``on_train_start``.

    Not when optimizers are configured: asking the Trainer for its steps there makes it build the data loaders before
    a checkpoint's place in them is known, and that place would be lost.

    Raises:
        ValueError: The run has no end.
    """
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        if isinstance(scheduler, CosineWarmup) and scheduler.fitted:
            steps = trainer.estimated_stepping_batches
            if not math.isfinite(steps) or steps < 0:
                raise ValueError(
                    "The schedule needs the run's length: set trainer.max_steps or trainer.max_epochs, or give "
                    "lr_scheduler its total_steps."
                )
            scheduler.set_total_steps(int(steps))
