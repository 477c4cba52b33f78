"""RLHF as PyTorch Lightning modules: every token computed once, exact resume, one small algorithm a file.

Names load when they are used, so that ``import lightning_rlhf`` is quick.
"""

import importlib
import importlib.abc
import sys
from typing import TYPE_CHECKING, Any

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.callbacks import (
        EMA,
        CompletionsTable,
        HFExport,
        Interrupted,
        MeasureWinRate,
        Report,
        SampleCompletions,
        SaveOnInterrupt,
        WritePredictions,
    )
    from lightning_rlhf.data.instruction import InstructionDataModule
    from lightning_rlhf.data.preference import PreferenceDataModule
    from lightning_rlhf.data.prompts import DataPairs, PromptDataModule, Ptx
    from lightning_rlhf.data.unpaired import UnpairedDataModule
    from lightning_rlhf.functional import Algorithm
    from lightning_rlhf.models import Load, LoRA, Policy, RewardModel
    from lightning_rlhf.rl import GAE, KL, Critic, GroupLoss, Groups, Loss, Rollout, Shaping, Updates
    from lightning_rlhf.rl.environments import Environment, ToolEnvironment, Turn
    from lightning_rlhf.rollout import Sampling
    from lightning_rlhf.stages import (
        DPOModule,
        GRPOModule,
        KTOModule,
        OnlineDPOModule,
        PPOModule,
        RewardModule,
        SFTModule,
    )
    from lightning_rlhf.stages.pair_losses import OnlinePairShaping, PairShaping, WeightedLoss
    from lightning_rlhf.stages.references import ReferenceUpdate
    from lightning_rlhf.strategies import ColossalAIStrategy

__version__ = "0.1.0"

_HOMES = {
    "ColossalAIStrategy": "strategies",
    "Algorithm": "functional",
    "DPOModule": "stages",
    "DataPairs": "data.prompts",
    "GRPOModule": "stages",
    "CompletionsTable": "callbacks",
    "EMA": "callbacks",
    "HFExport": "callbacks",
    "Interrupted": "callbacks",
    "SampleCompletions": "callbacks",
    "SaveOnInterrupt": "callbacks",
    "MeasureWinRate": "callbacks",
    "WritePredictions": "callbacks",
    "InstructionDataModule": "data.instruction",
    "KTOModule": "stages",
    "OnlineDPOModule": "stages",
    "PPOModule": "stages",
    **dict.fromkeys(("OnlinePairShaping", "PairShaping", "WeightedLoss"), "stages.pair_losses"),
    "PreferenceDataModule": "data.preference",
    "PromptDataModule": "data.prompts",
    "Ptx": "data.prompts",
    "UnpairedDataModule": "data.unpaired",
    "Load": "models",
    "LoRA": "models",
    **dict.fromkeys(("GAE", "KL", "Critic", "GroupLoss", "Groups", "Loss", "Rollout", "Shaping", "Updates"), "rl"),
    **dict.fromkeys(("Environment", "ToolEnvironment", "Turn"), "rl.environments"),
    "Policy": "models",
    "ReferenceUpdate": "stages.references",
    "Report": "callbacks",
    "RewardModel": "models",
    "RewardModule": "stages",
    "SFTModule": "stages",
    "Sampling": "rollout",
}
__all__ = [
    "EMA",
    "GAE",
    "KL",
    "Algorithm",
    "ColossalAIStrategy",
    "CompletionsTable",
    "Critic",
    "DPOModule",
    "DataPairs",
    "Environment",
    "GRPOModule",
    "GroupLoss",
    "Groups",
    "HFExport",
    "InstructionDataModule",
    "Interrupted",
    "KTOModule",
    "LoRA",
    "Load",
    "Loss",
    "MeasureWinRate",
    "OnlineDPOModule",
    "OnlinePairShaping",
    "PPOModule",
    "PairShaping",
    "Policy",
    "PreferenceDataModule",
    "PromptDataModule",
    "Ptx",
    "ReferenceUpdate",
    "Report",
    "RewardModel",
    "RewardModule",
    "Rollout",
    "SFTModule",
    "SampleCompletions",
    "Sampling",
    "SaveOnInterrupt",
    "Shaping",
    "ToolEnvironment",
    "Turn",
    "UnpairedDataModule",
    "Updates",
    "WeightedLoss",
    "WritePredictions",
    "__version__",
]


__getattr__ = loader(__name__, _HOMES)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _AfterLightning(importlib.abc.MetaPathFinder):
    """Registers the strategies' names when Lightning is imported, which reads no entry points for them.

    Importing it here would do so too, and make each ``import lightning_rlhf`` and each ``--help`` wait for seconds.
    """

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """What the other finders say, with a loader that registers them when the module is there."""
        if name != "lightning.pytorch":
            return None
        found = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec: Any = next((spec for spec in found if spec is not None), None)
        if spec is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            sys.meta_path.remove(self)
            load(module)
            _register()

        spec.loader.exec_module = exec_module
        return spec


def _register() -> None:
    """``Trainer(strategy="colossalai_zero2")`` then needs nothing else of this package."""
    importlib.import_module(f"{__name__}.strategies")


if "lightning.pytorch" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterLightning())
