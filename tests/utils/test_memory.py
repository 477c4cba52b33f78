"""Peak memory, and pages that are given back."""

import sys

import pytest
import torch

from lightning_rlhf.utils.memory import PeakMemory, release_pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def test_peak_memory_is_what_was_held_at_once():
    peak = PeakMemory("cpu")
    if peak.bytes() is None:
        pytest.skip("this sandbox lets nobody reset the peak")
    for _ in range(5):  # not the sum
        held = torch.ones(16 * 2**20)
        del held
    found = PeakMemory.bytes(peak)
    assert 60e6 < found < 200e6  # an allocator may hold two of them
    assert PeakMemory("cpu").bytes() < 30e6, "it is less what was held before, and freed memory is given back"


def test_pages_of_a_file_are_given_back_and_read_again(tmp_path):
    size = 8 * 2**20
    torch.arange(size, dtype=torch.int32).numpy().tofile(tmp_path / "file")
    mapped = torch.from_file(str(tmp_path / "file"), size=size, dtype=torch.int32)
    first, second = mapped[: size // 2 + 5], mapped[size // 2 + 5 :]
    peak = PeakMemory("cpu")
    if peak.bytes() is None:
        pytest.skip("this sandbox lets nobody reset the peak")
    for part in (first, second):
        assert part.max() > 0
        release_pages(part)
    assert peak.bytes() < 0.7 * mapped.nbytes, "never both at once"
    assert torch.equal(mapped, torch.arange(size, dtype=torch.int32)), "what a page shares with its neighbor is kept"
