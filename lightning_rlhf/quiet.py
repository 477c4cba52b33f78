"""Hides advertisements of libraries, and warnings that only concern their developers."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

#: Beginnings of log lines to hide, by logger.
_LOGGED: dict[str, tuple[str, ...]] = {
    "lightning.pytorch.utilities.rank_zero": ("💡 Tip:", "TPU available: False"),
    "lightning.fabric.utilities.rank_zero": ("💡 Tip:",),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community",),
}
#: Beginnings (regular expressions) of warnings that do not help somebody who runs a stage.
_WARNED = (
    r"Starting from v1\.9\.0, `tensorboardX` has been removed",  # metrics.csv replaces it
    r"`is_gradient_checkpointing` is deprecated",  # peft calls it
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning calls it
    r"The '\w+' does not have many workers",  # packing is cheap
    r"Total length of `list` across ranks is zero",  # no validation rows, which the data module says
    r"The dirpath has changed from",  # a resumed run logs to a new version_N
    r"`torch\.jit\.script_method` is deprecated",
)
#: Beginnings of warnings about settings that a config has made deliberately.
_WARNED_COMMANDS = (
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"`max_epochs` was not set\. Setting it to 1000 epochs",
)
_HOME = str(Path(__file__).parent)


def quiet() -> None:
    """Hides messages that do not concern the user of a command. Call it before torch is loaded.

    Progress bars of downloads and of loading are only shown in terminals. OpenMP's threads wait without spinning, so
    that the machine can do other work. Environment variables that the user has set are not changed.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_missing_gpu)
    for message in _WARNED_COMMANDS:
        warnings.filterwarnings("ignore", message)
    quiet_libraries()


def quiet_libraries() -> None:
    """Hides messages of libraries that do not help users, and shows our own warnings without a source line.

    A stage calls it when it is made. Warnings are not filtered if the user has chosen filters (``python -W``).
    """
    for name in _LOGGED:
        logging.getLogger(name).addFilter(_concerns_users)  # the same function is added once
    if not sys.warnoptions:
        for message in _WARNED:
            warnings.filterwarnings("ignore", message)
    if getattr(warnings.formatwarning, "__name__", "") != "without_source":
        warnings.formatwarning = _without_source(warnings.formatwarning)


def _without_source(former: Callable[..., str]) -> Callable[..., str]:
    """Formats our warnings without path and line of their source, and other warnings as before."""

    def without_source(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if filename.startswith(_HOME):
            return f"Warning: {message}\n"
        return former(message, category, filename, lineno, line)

    return without_source


def _concerns_users(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip().startswith(_LOGGED.get(record.name, ()))


def _is_no_missing_gpu(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("GPU available: False")
