"""One LightningModule a stage."""

from lightning_rlhf.stages.reward import RewardModule
from lightning_rlhf.stages.sft import SFTModule

__all__ = ["RewardModule", "SFTModule"]
