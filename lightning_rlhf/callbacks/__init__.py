"""Callbacks for exports, averaged weights, sample answers, win rates, reports, interrupts and predictions."""

from lightning_rlhf.callbacks.ema import EMA, averaged_weights
from lightning_rlhf.callbacks.export import HFExport
from lightning_rlhf.callbacks.interrupt import Interrupted, SaveOnInterrupt
from lightning_rlhf.callbacks.predictions import WritePredictions
from lightning_rlhf.callbacks.report import Report
from lightning_rlhf.callbacks.samples import SampleCompletions
from lightning_rlhf.callbacks.win_rate import MeasureWinRate
from lightning_rlhf.utils.checkpoint_io import AtomicCheckpointIO, CheckpointError

__all__ = [
    "EMA",
    "AtomicCheckpointIO",
    "CheckpointError",
    "HFExport",
    "Interrupted",
    "MeasureWinRate",
    "Report",
    "SampleCompletions",
    "SaveOnInterrupt",
    "WritePredictions",
    "averaged_weights",
]
