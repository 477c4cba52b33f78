"""ColossalAI's data parallelism for the ordinary Trainer: DDP, ZeRO and Gemini by one flag.

Importing this room registers the names of :data:`~lightning_rlhf.strategies.colossalai.NAMES` with Lightning; it
imports no ColossalAI.
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
    """Whether a rank can run a model without the others, if need be within :func:`whole_weights`.

    Args:
        strategy: Any.
    """
    return isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) and not isinstance(strategy, DeepSpeedStrategy)


def holds_whole_models(strategy: Strategy) -> bool:
    """Whether each device has all weights, as they are, all the time.

    Args:
        strategy: Any.
    """
    return runs_alone(strategy) and not (isinstance(strategy, ColossalAIStrategy) and strategy.sharded)


def whole_weights(strategy: Strategy | None, child: nn.Module) -> AbstractContextManager[None]:
    """Within it each rank can run a model alone, for instance to generate; all ranks must enter and leave.

    Args:
        strategy: Any, or None where no Trainer is; only under one that shards weights is there something to do.
        child: Of the LightningModule; others stay as they are.
    """
    return strategy.whole_weights(child) if isinstance(strategy, ColossalAIStrategy) else nullcontext()


def whole_state_dict(strategy: Strategy) -> dict[str, Any]:
    """The module's state dict on rank 0, whatever checkpoints hold; all ranks must call: it may gather shards.

    Args:
        strategy: Any.
    """
    if isinstance(strategy, ColossalAIStrategy):
        return strategy.whole_state_dict()
    return strategy.lightning_module_state_dict()
