"""What runs did, as HTML pages: one run's by the callback ``Report``, several compared by ``lightning-rlhf report``."""

from lightning_rlhf.report.page import write_report
from lightning_rlhf.report.runs import Curve, StageReport, read_report

__all__ = ["Curve", "StageReport", "read_report", "write_report"]
