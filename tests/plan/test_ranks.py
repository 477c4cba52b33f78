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
from lightning_rlhf.plan.stages import stage_of

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
    "plugin, tp, pp, precision",
    [
        pytest.param("ddp", 1, 1, "32-true", marks=pytest.mark.exhaustive),
        pytest.param("zero1", 1, 1, "32-true", marks=pytest.mark.exhaustive),
        ("zero2", 1, 1, "bf16-mixed"),
        ("ddp", 2, 1, "32-true"),
        ("ddp", 1, 2, "32-true"),
        pytest.param("zero2", 1, 2, "bf16-mixed", marks=pytest.mark.exhaustive),
    ],
)
def test_a_rank_of_two(plugin, tp, pp, precision, small_model, tmp_path):
    if plugin != "ddp":
        pytest.importorskip("colossalai")
    script = Path(__file__).with_name("run_ranks.py")
    command = [python(), str(script), str(small_model), str(tmp_path), plugin, str(tp), str(pp), precision]
    root = Path(__file__).resolve().parents[2]
    paths = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{script.parent}"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    cast, copies = (None if precision == "32-true" else torch.bfloat16), 2 // (tp * pp)
    mode = Mode(precision, cast, tp=tp)
    layout = Layout(plugin, tp, copies, False, SHAPE.rows, masters=cast is not None, overlaps=False, pp=pp)
    for rank, layers in enumerate((3, 2) if pp > 1 else (5,)):
        found = json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8"))
        told = measure(SFTModule(small_model), SHAPE, mode, layers)
        if pp > 1:
            part = measure(SFTModule(small_model), SHAPE._replace(rows=SHAPE.rows // 2), mode, layers)
            told = stage_of(told, part, 2, first=rank == 0, summed=True)
        most = peak(moments(told, layout))
        assert most.on_device == pytest.approx(found["peak"], rel=0.02 if pp > 1 else 0.01)
        assert most.parts["weights"] == pytest.approx(found["weights"], rel=0.02)
        masters = 0 if cast is None else 4 * told.elements / copies  # which no optimizer's state holds
        assert most.parts["states"] - masters == pytest.approx(found["states"], rel=0.02)
        if plugin == "ddp":
            assert told.gradients == pytest.approx(found["gradients"], rel=0.02)
