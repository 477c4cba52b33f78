"""What is foretold of a rank of several, beside real runs of two and four processes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from forked import python

from lightning_rlhf.plan.layout import Layout, moments, peak
from lightning_rlhf.plan.measure import Mode, measure
from lightning_rlhf.plan.ranks import one_rank
from lightning_rlhf.plan.shapes import Shape
from lightning_rlhf.plan.stages import stage_of

from .cases import PROMPTS, SHAPES, module_of

BF16 = "bf16-mixed"
GEMINI = {"plugin": "gemini", "precision": BF16, "min_chunk_elements": 2**16}
BESIDE_SFT = ("reward", "ppo", "grpo")


def test_a_rank_makes_no_second_group():
    with one_rank(2, 2) as mesh:
        assert mesh.tensor.members == (2, 3) and mesh.sequence.members == (0, 2) and mesh.sequence.place == 1
        with pytest.raises(ValueError, match=r"planning sp=2 .* this process has one already"), one_rank(1, 2):
            pass
    assert not dist.is_initialized()


def run(model, out, devices=2, precision="32-true", stage="sft", **strategy):
    """Measures a case; returns what each rank held."""
    script = Path(__file__).with_name("run_ranks.py")
    case = {"devices": devices, "precision": precision, "stage": stage, "micro_batches": 2, **strategy}
    root = Path(__file__).resolve().parents[2]
    paths = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{script.parent}"}
    command = [python(), str(script), str(model), str(out), json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((out / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(devices)]


def shape_of(stage, prompt):
    """The micro-batch of a rank."""
    if stage in SHAPES:
        return SHAPES[stage]
    rows, group = PROMPTS[stage]
    return Shape("prompts", rows, prompt, 12, group, 1, rows, 2, 1, group)


def plan(model, found, devices=2, precision="32-true", stage="sft", plugin="ddp", min_chunk_elements=2**20, **axes):
    """What is foretold of each rank of one copy, as what it takes and the moment of its peak."""
    tp, pp, sp = (axes.get(name, 1) for name in ("tp", "pp", "sp"))
    shape, sharded = shape_of(stage, found[0].get("prompt")), plugin != "ddp"
    masters = sharded and precision == BF16
    mode = Mode(precision, torch.bfloat16 if masters else None, sharded, tp=tp, sp=sp)
    copies = devices // (tp * pp * sp)
    layout = Layout(
        plugin, tp, copies, False, shape.rows, masters, overlaps=False, chunk=min_chunk_elements, pp=pp, sp=sp
    )
    manual, told = stage in PROMPTS, []
    for first, depth in ((True, 3), (False, 2)) if pp > 1 else ((True, 5),):
        each = measure(module_of(stage, model), shape, mode, depth)
        if pp > 1:
            part = measure(module_of(stage, model), shape._replace(rows=shape.rows // 2), mode, depth)
            each = stage_of(each, part, 2, first, summed=stage == "sft")
        told.append((each, layout, peak(moments(each, layout, manual))))
    return told


exhaustive = pytest.mark.exhaustive


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    "case",
    [
        pytest.param({}, marks=exhaustive),
        pytest.param({"plugin": "zero1"}, marks=exhaustive),
        pytest.param({"plugin": "zero2", "precision": BF16}, marks=exhaustive),
        {"tp": 2},
        {"pp": 2},
        pytest.param({"plugin": "zero2", "precision": BF16, "pp": 2}, marks=exhaustive),
        {"plugin": "zero1", "sp": 2},
        pytest.param({"sp": 2}, marks=exhaustive),
        pytest.param({"plugin": "zero2", "precision": BF16, "sp": 2}, marks=exhaustive),
        GEMINI,
        pytest.param({**GEMINI, "stage": "reward"}, marks=exhaustive),
        pytest.param({**GEMINI, "stage": "ppo"}, marks=exhaustive),
        pytest.param({**GEMINI, "stage": "grpo"}, marks=exhaustive),
        pytest.param({"plugin": "zero2", "precision": BF16, "stage": "reward"}, marks=exhaustive),
        {"plugin": "zero2", "precision": BF16, "stage": "ppo"},
        pytest.param({"plugin": "zero2", "precision": BF16, "stage": "grpo"}, marks=exhaustive),
        *(pytest.param({"pp": 2, "stage": stage}, marks=exhaustive) for stage in BESIDE_SFT),
        *(pytest.param({"tp": 2, "stage": stage}, marks=exhaustive) for stage in BESIDE_SFT),
        *(pytest.param({"tp": 4, "devices": 4, "stage": stage}, marks=exhaustive) for stage in ("sft", *BESIDE_SFT)),
        *(pytest.param({"sp": 2, "stage": stage}, marks=exhaustive) for stage in BESIDE_SFT),
        *(pytest.param({"plugin": "zero1", "stage": stage}, marks=exhaustive) for stage in BESIDE_SFT),
        pytest.param({"tp": 2, "devices": 4, "plugin": "zero2", "precision": BF16}, marks=exhaustive),
    ],
    ids=lambda case: ", ".join(f"{k}={v}" for k, v in case.items()) or "ddp",
)
def test_a_rank_of_several(case, small_model, even_model, tmp_path):
    case, model = {"plugin": "ddp", **case}, even_model if case.get("tp") == 4 else small_model
    if case["plugin"] != "ddp":
        pytest.importorskip("colossalai")
    found = run(model, tmp_path, **case)
    told = plan(model, found, **case)
    # ranks of a copy are slices or stretches that take as much, or stages; the last stretch takes most
    held = found[:1] + found[-1:] if case.get("pp", 1) > 1 else found[-1:]
    for have, (each, layout, most) in zip(held, told, strict=True):
        assert most.on_device == pytest.approx(have["peak"], rel=0.03)
        assert most.parts["weights"] == pytest.approx(have["weights"], rel=0.02)
        masters = 4 * each.elements / layout.replicas if layout.masters else 0  # which no optimizer's state holds
        assert most.parts["states"] - masters == pytest.approx(have["states"], rel=0.02)
        if layout.plugin == "ddp":
            assert each.gradients == pytest.approx(have["gradients"], rel=0.02)
