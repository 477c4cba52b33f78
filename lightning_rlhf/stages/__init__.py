"""One LightningModule a stage."""

from lightning_rlhf.stages.dpo import DPOModule
from lightning_rlhf.stages.grpo import GRPOModule
from lightning_rlhf.stages.kto import KTOModule
from lightning_rlhf.stages.online_dpo import OnlineDPOModule
from lightning_rlhf.stages.ppo import PPOModule
from lightning_rlhf.stages.reward import RewardModule
from lightning_rlhf.stages.sft import SFTModule

__all__ = ["DPOModule", "GRPOModule", "KTOModule", "OnlineDPOModule", "PPOModule", "RewardModule", "SFTModule"]
