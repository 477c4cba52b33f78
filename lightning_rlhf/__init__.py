"""RLHF as PyTorch Lightning modules: every token computed once, exact resume, one small algorithm a file.

Names load when they are used, so that ``import lightning_rlhf`` is quick.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_rlhf.callbacks import HFExport, SampleCompletions, SaveOnInterrupt, WritePredictions
    from lightning_rlhf.data.instruction import InstructionDataModule
    from lightning_rlhf.data.preference import PreferenceDataModule
    from lightning_rlhf.models import LoRA, Policy, RewardModel
    from lightning_rlhf.stages import RewardModule, SFTModule

__version__ = "0.1.0"

_HOMES = {
    "HFExport": "callbacks",
    "SampleCompletions": "callbacks",
    "SaveOnInterrupt": "callbacks",
    "WritePredictions": "callbacks",
    "InstructionDataModule": "data.instruction",
    "PreferenceDataModule": "data.preference",
    "LoRA": "models",
    "Policy": "models",
    "RewardModel": "models",
    "RewardModule": "stages",
    "SFTModule": "stages",
}
__all__ = [
    "HFExport",
    "InstructionDataModule",
    "LoRA",
    "Policy",
    "PreferenceDataModule",
    "RewardModel",
    "RewardModule",
    "SFTModule",
    "SampleCompletions",
    "SaveOnInterrupt",
    "WritePredictions",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
