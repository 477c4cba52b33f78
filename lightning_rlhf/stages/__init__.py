"""One LightningModule a stage."""

from lightning_rlhf.stages.sft import SFTModule

__all__ = ["SFTModule"]
