"""ColossalAI's data parallelism for Lightning's Trainer, and tensor parallelism: DDP, ZeRO, Gemini, ``tp``, ``pp``.

Importing this package registers the names of :data:`~lightning_rlhf.strategies.colossalai.NAMES` with Lightning. It
does not import ColossalAI.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
)
from torch import nn

from lightning_rlhf.strategies.colossalai import ColossalAIStrategy
from lightning_rlhf.strategies.precision import ColossalAIPrecision

__all__ = [
    "ColossalAIPrecision",
    "ColossalAIStrategy",
    "holds_whole_models",
    "runs_alone",
    "whole_state_dict",
    "whole_weights",
]

ColossalAIStrategy.register_strategies(StrategyRegistry)


def runs_alone(strategy: Strategy) -> bool:
    """Whether a rank can run a model without the other ranks, possibly within :func:`whole_weights`.

    Under tensor and sequence parallelism it needs those ranks that run the model with it, but none that have other
    data.

    Args:
        strategy: Any strategy.
    """
    return isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)


def holds_whole_models(strategy: Strategy) -> bool:
    """Whether each device always holds all weights.

    Args:
        strategy: Any strategy.
    """
    parts = isinstance(strategy, ColossalAIStrategy) and (strategy.sharded or strategy.cuts_models)
    return runs_alone(strategy) and not parts


def whole_weights(strategy: Strategy | None, child: nn.Module) -> AbstractContextManager[None]:
    """Within it, each rank can run a model alone, for instance to generate. All ranks must enter and leave.

    Args:
        strategy: Any strategy, or None without a Trainer. It has an effect only if the strategy shards weights.
        child: A child of the LightningModule. Other modules do not change.
    """
    return strategy.whole_weights(child) if isinstance(strategy, ColossalAIStrategy) else nullcontext()


def whole_state_dict(strategy: Strategy) -> dict[str, Any]:
    """Returns the module's whole state dict on rank 0. All ranks must call it, because it may gather shards.

    Args:
        strategy: Any strategy.
    """
    if isinstance(strategy, ColossalAIStrategy):
        return strategy.whole_state_dict()
    return strategy.lightning_module_state_dict()
