"""What is foretold of a rank of two, beside real runs of two processes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import python

from lightning_rlhf import SFTModule
from lightning_rlhf.plan.layout import Layout, moments, peak
from lightning_rlhf.plan.measure import Mode, measure
from lightning_rlhf.plan.ranks import one_rank
from lightning_rlhf.plan.shapes import Shape

SHAPE = Shape("instructions", 4, 40, 40, 1, 1)


def test_a_rank_makes_no_second_group():
    with one_rank(2) as ranks:
        assert ranks.size == 2
        with pytest.raises(ValueError, match=r"planning tp=2 .* this process has one already"), one_rank(2):
            pass
    assert not dist.is_initialized()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "plugin, tp, precision",
    [
        pytest.param("ddp", 1, "32-true", marks=pytest.mark.exhaustive),
        pytest.param("zero1", 1, "32-true", marks=pytest.mark.exhaustive),
        ("zero2", 1, "bf16-mixed"),
        ("ddp", 2, "32-true"),
    ],
)
def test_a_rank_of_two(plugin, tp, precision, small_model, tmp_path):
    if plugin != "ddp":
        pytest.importorskip("colossalai")
    script, out = Path(__file__).with_name("run_ranks.py"), tmp_path / "found.json"
    command = [python(), str(script), str(small_model), str(out), plugin, str(tp), precision]
    root = Path(__file__).resolve().parents[2]
    paths = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{script.parent}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    cast, copies = (None if precision == "32-true" else torch.bfloat16), 2 // tp
    told = measure(SFTModule(small_model), SHAPE, Mode(precision, cast, tp=tp))
    layout = Layout(plugin, tp, copies, False, SHAPE.rows, masters=cast is not None, overlaps=False)
    most = peak(moments(told, layout))
    assert most.on_device == pytest.approx(found["peak"], rel=0.01)
    assert most.parts["weights"] == pytest.approx(found["weights"], rel=0.02)
    masters = 0 if cast is None else 4 * told.elements / copies  # which no optimizer's state holds
    assert most.parts["states"] - masters == pytest.approx(found["states"], rel=0.02)
