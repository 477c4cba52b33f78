"""Peak memory of a process or a GPU, and pages that a process gives back."""

from __future__ import annotations

import ctypes
import gc
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Peak memory from the moment it is made: of the GPU, or of the process on Linux, mapped files counted.

    Args:
        device: Where the model runs.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._before: int | None = torch.cuda.memory_allocated()
        else:
            self._before = _reset_peak()

    def bytes(self) -> int | None:
        """The peak, less what was held before; None where the system doesn't tell."""
        if self._before is None:
            return None
        now = torch.cuda.max_memory_allocated() if self.on_gpu else _status("VmHWM")
        return max(0, now - self._before)


def release_pages(tensor: Tensor) -> None:
    """Gives back the memory of a tensor that nobody reads any more, while others of the same file stay.

    A mapped file is unmapped as a whole: until then all that was read of it stays resident. On other systems than Linux
    nothing happens.

    Args:
        tensor: A contiguous tensor on the CPU. Its values are lost if they are not those of a file.
    """
    if sys.platform != "linux":
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes) // page * page - start
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


def _reset_peak() -> int | None:
    """Gives freed memory back, resets the process's peak, and returns what is resident; None on other systems."""
    if sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)
    try:
        _CLEAR.write_text("5")
        return _status("VmRSS")
    except OSError:  # in a sandbox
        return None


def _status(name: str) -> int:
    """A figure of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024
