"""Callbacks for exports, averaged weights, answers, completions, win rates, reports, interrupts and predictions.

Names load when they are used: the callbacks that stages need use neither evaluation nor report.
"""

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.callbacks.completions import CompletionsTable
    from lightning_rlhf.callbacks.ema import EMA, averaged_weights
    from lightning_rlhf.callbacks.export import HFExport
    from lightning_rlhf.callbacks.interrupt import Interrupted, SaveOnInterrupt
    from lightning_rlhf.callbacks.predictions import WritePredictions
    from lightning_rlhf.callbacks.report import Report
    from lightning_rlhf.callbacks.samples import SampleCompletions
    from lightning_rlhf.callbacks.win_rate import MeasureWinRate

_HOMES = {
    **dict.fromkeys(("EMA", "averaged_weights"), "ema"),
    "CompletionsTable": "completions",
    "HFExport": "export",
    **dict.fromkeys(("Interrupted", "SaveOnInterrupt"), "interrupt"),
    "MeasureWinRate": "win_rate",
    "Report": "report",
    "SampleCompletions": "samples",
    "WritePredictions": "predictions",
}
__all__ = [
    "EMA",
    "CompletionsTable",
    "HFExport",
    "Interrupted",
    "MeasureWinRate",
    "Report",
    "SampleCompletions",
    "SaveOnInterrupt",
    "WritePredictions",
    "averaged_weights",
]

__getattr__ = loader(__name__, _HOMES)
