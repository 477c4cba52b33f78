"""Gradients, wherever the strategy keeps them: their norm, clipping, and the scale of losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_rlhf.functional.precision import wide
from lightning_rlhf.strategies.colossalai import ColossalAIStrategy


def sharding(strategy: Strategy | None) -> ColossalAIStrategy | None:
    """The strategy, where each rank holds a part of the gradients."""
    return strategy if isinstance(strategy, ColossalAIStrategy) and strategy.sharded else None


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """The model's own parameters that an optimizer trains."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def clip_grad_norm(strategy: Strategy, parameters: Sequence[nn.Parameter], max_grad_norm: float | None) -> Tensor:
    """As ``torch.nn.utils.clip_grad_norm_``, wherever the gradients are; all ranks must call.

    Args:
        strategy: Any.
        parameters: Whose gradients are clipped by their common norm.
        max_grad_norm: None only measures.

    Returns:
        Scalar norm before clipping.
    """
    if isinstance(strategy, ColossalAIStrategy) and (strategy.sharded or strategy.cuts_models):
        return strategy.clip_grad_norm(list(parameters), max_grad_norm)
    if max_grad_norm is None:
        return grad_norm(parameters)
    return nn.utils.clip_grad_norm_(parameters, max_grad_norm)


def grad_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """2-norm of all gradients that this rank holds, in fp32 at least."""
    # a rank's own part of a gradient that is cut over ranks
    mine = [g.to_local() if isinstance(g, DTensor) else g for p in parameters if (g := p.grad) is not None]
    norms = [wide(gradient).norm() for gradient in mine]
    return torch.stack([norm.float() for norm in norms]).norm() if norms else torch.zeros(())


def zero_grad(trainer: Trainer, parameters: Sequence[nn.Parameter]) -> None:
    """Sets gradients to none."""
    for p in parameters:
        p.grad = None
    if sharding(trainer.strategy):
        for optimizer in trainer.optimizers:
            optimizer.zero_grad()


def grad_scaler(trainer: Trainer) -> Any:
    """What scales losses against underflow in fp16 and looks for overflow; None where nothing does."""
    return getattr(trainer.precision_plugin, "scaler", None)


def loss_scale(trainer: Trainer) -> float:
    """The factor by which losses are scaled, whoever scales them; 1 where nobody does."""
    if (scaler := grad_scaler(trainer)) is not None:
        return float(scaler.get_scale())
    sharded = sharding(trainer.strategy)
    return 1.0 if sharded is None else sharded.loss_scale
