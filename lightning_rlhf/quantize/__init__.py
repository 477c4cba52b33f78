"""Quantized models: GPTQ, AutoRound and plain rounding in the GPTQ format, and bitsandbytes' formats."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.quantize.grid import METHODS, Grid
    from lightning_rlhf.quantize.methods import quantize

_HOMES = {"METHODS": "grid", "Grid": "grid", "quantize": "methods"}
__all__ = ["METHODS", "Grid", "quantize"]
__getattr__ = loader(__name__, _HOMES)
