"""Weights in the GPTQ format."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

INSTALL = (
    "pip install device-smi==0.5.7 tokenicer==0.0.14 pypcre==0.6.4 logbar==0.4.15 threadpoolctl==3.8.0 defuser==0.0.28 "
    "py-cpuinfo==9.0.0 && pip install --no-deps gptqmodel==7.7.0 optimum==2.3.0 auto-round==0.16.1"
)
"""The line that was tested: gptqmodel's own metadata asks for a newer torch than it needs."""


def require(*packages: str) -> None:
    """Checks that packages for the GPTQ format are installed.

    Raises:
        ModuleNotFoundError: One is missing. The message names it and the line that installs it.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(
            f"GPTQ weights need {' and '.join(missing).replace('_', '-')}. Install it: {INSTALL}", name=missing[0]
        )


def import_gptqmodel() -> Any:
    """Imports gptqmodel without its banner and tips, and without its compiled packing, which takes minutes to build."""
    require("gptqmodel", "logbar")
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    from logbar import LogBar

    LogBar.shared().setLevel("ERROR")
    return importlib.import_module("gptqmodel")
