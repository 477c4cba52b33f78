"""Quantized models: GPTQ, AutoRound and plain rounding in the GPTQ format, and bitsandbytes' formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.quantize.calibration import Rows, read_rows
    from lightning_rlhf.quantize.compare import Comparison, Result, compare_methods
    from lightning_rlhf.quantize.grid import METHODS, Grid
    from lightning_rlhf.quantize.methods import quantize

_HOMES = {
    "METHODS": "grid",
    "Grid": "grid",
    "quantize": "methods",
    **dict.fromkeys(("Rows", "read_rows"), "calibration"),
    **dict.fromkeys(("Comparison", "Result", "compare_methods"), "compare"),
}
__all__ = ["METHODS", "Comparison", "Grid", "Result", "Rows", "compare_methods", "quantize", "read_rows"]
__getattr__ = loader(__name__, _HOMES)
