"""Parallelism within a copy beside what is seldom run with it, through the Trainer, against one process."""

import pytest
import torch
from curves import curve, largest_difference
from meshes import assert_same_run
from processes import run_stages

from lightning_rlhf.strategies.checkpoints import consolidate

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]
HALF = dict(stage="sft", max_steps=4, lr=1e-3)

#: Few steps each: gradients are compared elsewhere, and rounding grows. A plugin by the axis of two ranks.
STAGES = {
    "online dpo": (dict(stage="online_dpo", max_steps=2, lr=1e-3), dict(sp="zero1", pp="ddp")),
    "environment": (dict(stage="grpo", max_steps=2, lr=3e-3, turns=2), dict(sp="ddp", pp="zero2")),
}
PAIRS = [(name, axis) for name, (_, plugins) in STAGES.items() for axis in plugins]
#: As FP32 in number, and rounded alike: one process under the same plugin.
HALVES = {"bf16-mixed": ("bf16-mixed", "zero1"), "16-mixed": ("colossalai 16-mixed", "zero2")}


def meshed(options, plugin, devices=2, **axes):
    """Options of a run on ranks that share a copy."""
    return dict(options, devices=devices, strategy={"plugin": plugin, **axes, "timeout": 600})


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory):
    """Runs of one process, and of two that run a copy together."""
    out = tmp_path_factory.mktemp("combinations")
    saved = dict(stage="sft", max_steps=4, save_every=2)
    one = {name: options for name, (options, _) in STAGES.items()} | {"sharded": saved}
    one |= {name: dict(HALF, precision=p, strategy={"plugin": plugin}) for name, (p, plugin) in HALVES.items()}
    run_stages(tiny_model_dir, out, one)
    two = {f"{name}, {axis}": meshed(STAGES[name][0], STAGES[name][1][axis], **{axis: 2}) for name, axis in PAIRS}
    two |= {f"{name}, sp": meshed(dict(HALF, precision=p), plugin, sp=2) for name, (p, plugin) in HALVES.items()}
    two["sharded, sp"] = meshed(saved, "zero1", sp=2, checkpoint="sharded")
    directory = str(out / "sharded, sp" / "step=2.ckpt")
    two["sharded, resumed"] = meshed(
        dict(stage="sft", max_steps=4, ckpt=directory), "zero2", sp=2, checkpoint="sharded"
    )
    run_stages(tiny_model_dir, out, two)
    return out


@pytest.mark.parametrize(("name", "axis"), PAIRS)
def test_stages_have_the_curves_of_one_process(runs, name, axis):
    assert_same_run(runs / f"{name}, {axis}", runs / name)


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_rounds_as_usual(runs, name):
    one, two = curve(runs / name), curve(runs / f"{name}, sp")
    assert len(one) == 4 and largest_difference(one, two) < 3e-2


def test_a_sharded_checkpoint_of_stretches_goes_on_anywhere(runs, tiny_model_dir, tmp_path):
    assert (runs / "sharded, sp" / "step=2.ckpt").is_dir()
    assert_same_run(runs / "sharded, sp", runs / "sharded")
    whole = curve(runs / "sharded")
    assert largest_difference(curve(runs / "sharded, resumed"), whole[-2:]) < 1e-5
    consolidate(runs / "sharded, sp" / "step=2.ckpt", tmp_path / "one.ckpt")
    alone = dict(stage="sft", max_steps=4, ckpt=str(tmp_path / "one.ckpt"))
    run_stages(tiny_model_dir, tmp_path, {"alone": alone})
    assert largest_difference(curve(tmp_path / "alone"), whole[-2:]) < 1e-5


# ------------------------------------------------------------------------------------------------- more than two stages

#: By plugin.
IN_THREE = {
    "sft": (dict(stage="sft", max_steps=3, accumulate=2, clip=0.3, lora=True, save_every=2, win_rate=2), "zero1"),
    "dpo": (dict(stage="dpo", max_steps=2, lr=1e-3), "ddp"),
    "ppo": (dict(stage="ppo", max_steps=1, lr=3e-3, max_norm=0.5), "zero2"),
}


@pytest.mark.exhaustive
def test_three_stages(deep_model_dir, tmp_path):
    """Of which the first has two layers of four: updates, samples, rollouts, win rates and a checkpoint."""
    run_stages(deep_model_dir, tmp_path, {name: options for name, (options, _) in IN_THREE.items()})
    three = {f"{n}, pp": meshed(options, plugin, 3, pp=3) for n, (options, plugin) in IN_THREE.items()}
    run_stages(deep_model_dir, tmp_path, three)
    for name in IN_THREE:
        assert_same_run(tmp_path / f"{name}, pp", tmp_path / name)
    pairs = [(tmp_path / name / "win_rate.jsonl").read_text() for name in ("sft, pp", "sft")]
    assert pairs[0] == pairs[1] and pairs[0]
    one, two = (torch.load(tmp_path / name / "step=2.ckpt", weights_only=True) for name in ("sft", "sft, pp"))
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, value in one["state_dict"].items():
        assert torch.allclose(value, two["state_dict"][key], atol=1e-5), key


# ------------------------------------------------------------------------------------------------- random numbers


def test_noise_and_dropout_in_stages_train_as_in_one_process(tiny_model_dir, tmp_path):
    """Other random numbers, so the losses are near; the same ones in a run that goes on from a checkpoint."""
    run = dict(stage="sft", max_steps=4, lora=True, dropout=0.1, neftune_alpha=5.0, lr=1e-3)
    run_stages(tiny_model_dir, tmp_path, {"one": run})
    saved = meshed(dict(run, save_every=2), "zero1", pp=2)
    resumed = meshed(dict(run, ckpt=str(tmp_path / "two" / "step=2.ckpt")), "zero1", pp=2)
    run_stages(tiny_model_dir, tmp_path, {"two": saved, "resumed": resumed})
    one, two = curve(tmp_path / "one"), curve(tmp_path / "two")
    assert 0 < largest_difference(one, two) < 0.1
    assert largest_difference(curve(tmp_path / "resumed"), two[-2:]) < 1e-6
