"""HTML reports of runs: the callback ``Report`` writes one run's, and ``lightning-rlhf report`` compares several."""

from lightning_rlhf.report.page import write_report
from lightning_rlhf.report.runs import Curve, StageReport, read_report

__all__ = ["Curve", "StageReport", "read_report", "write_report"]
