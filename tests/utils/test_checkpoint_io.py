"""A checkpoint is whole or not there, whatever happens while it is written."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from forked import python

from lightning_rlhf.utils import AtomicCheckpointIO

ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
KILLED = """
import sys, time, torch
from lightning_rlhf.utils import AtomicCheckpointIO
io = AtomicCheckpointIO()
io.save_checkpoint({"x": torch.zeros(10)}, sys.argv[1])
print("first", flush=True)

class Slow:
    def __reduce__(self):
        print("writing", flush=True)
        time.sleep(60)

io.save_checkpoint({"x": torch.ones(10_000_000), "slow": Slow()}, sys.argv[1])
"""


@pytest.mark.slow
def test_kill_9_while_saving_leaves_the_former_checkpoint(tmp_path):
    script, target = tmp_path / "killed.py", tmp_path / "x.ckpt"
    script.write_text(KILLED)
    process = subprocess.Popen([python(), str(script), str(target)], env=ENV, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "first\n"
    assert process.stdout.readline() == "writing\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.equal(torch.load(target, weights_only=True)["x"], torch.zeros(10))


def test_a_full_disk_leaves_the_former_checkpoint_and_no_rest(tmp_path, monkeypatch):
    io = AtomicCheckpointIO()
    io.save_checkpoint({"x": 1}, tmp_path / "a.ckpt")

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("lightning_rlhf.utils.checkpoint_io.sync", full)
    with pytest.raises(OSError, match="space"):
        io.save_checkpoint({"x": 2}, tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_an_option_that_would_be_ignored_is_refused(tmp_path):
    with pytest.raises(TypeError, match="storage_options"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "a.ckpt", storage_options={"mode": "x"})
