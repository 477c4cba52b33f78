"""Callbacks: Hugging Face export, averaged weights, sample answers, reports, interrupts that save, predictions."""

from lightning_rlhf.callbacks.atomic import AtomicCheckpointIO
from lightning_rlhf.callbacks.ema import EMA, averaged_weights
from lightning_rlhf.callbacks.export import HFExport
from lightning_rlhf.callbacks.interrupt import SaveOnInterrupt
from lightning_rlhf.callbacks.predictions import WritePredictions
from lightning_rlhf.callbacks.report import Report
from lightning_rlhf.callbacks.samples import SampleCompletions

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "HFExport",
    "Report",
    "SampleCompletions",
    "SaveOnInterrupt",
    "WritePredictions",
    "averaged_weights",
]
