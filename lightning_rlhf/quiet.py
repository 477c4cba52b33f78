"""What commands leave unsaid: advertisements and warnings of libraries to their own developers."""

from __future__ import annotations

import logging
import os
import sys
import warnings

#: Beginnings of lines that Lightning and bitsandbytes log, by logger.
_LOGGED: dict[str, tuple[str, ...]] = {
    "lightning.pytorch.utilities.rank_zero": ("💡 Tip:", "GPU available: False", "TPU available: False"),
    "lightning.fabric.utilities.rank_zero": ("💡 Tip:",),
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community",),
}
#: Beginnings of warnings (as regular expressions) that nobody who runs a command can act upon, or need.
_WARNED = (
    r"Starting from v1\.9\.0, `tensorboardX` has been removed",  # metrics.csv serves
    r"`is_gradient_checkpointing` is deprecated",  # peft's call of transformers
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's call of torch
    r"The '\w+' does not have many workers",  # packing is cheap
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    r"`torch\.jit\.script_method` is deprecated",
    r"`max_epochs` was not set\. Setting it to 1000 epochs",
)


def quiet() -> None:
    """Has this process say what concerns the user alone; to be called before torch is loaded.

    Progress bars of downloads and of loading are for terminals. OpenMP's threads wait without spinning, so that a
    machine can do other work beside this. Whoever set the environment variables otherwise is obeyed.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in _LOGGED:
        logging.getLogger(name).addFilter(_concerns_users)  # the same function is added once
    for message in _WARNED:
        warnings.filterwarnings("ignore", message)


def _concerns_users(record: logging.LogRecord) -> bool:
    return not record.getMessage().lstrip().startswith(_LOGGED.get(record.name, ()))
