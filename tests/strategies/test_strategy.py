"""ColossalAI's strategy against one plain Lightning process: curves, checkpoints, export, and bad ends."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from curves import curve, largest_difference
from forked import python
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

HERE = Path(__file__).parent
pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]

ZERO2, GEMINI = {"plugin": "zero2"}, {"plugin": "gemini", "min_chunk_elements": 2048}
FP32 = {
    "ddp": {"plugin": "ddp", "find_unused_parameters": True},
    "zero1": {"plugin": "zero1"},
    "zero2": ZERO2,
}
BF16 = {"zero2": ZERO2, "gemini": GEMINI}
#: All on the same global batch; 20 steps of SFT and reward, 8 of DPO and KTO, 5 iterations of 4 updates each of PPO, 5
#: of two of online DPO.
RUNS = {
    "sft": dict(stage="sft"),
    "sft, accumulation and clipping": dict(stage="sft", accumulate=2, clip=0.5),
    "sft, LoRA and checkpointing": dict(stage="sft", lora=True, checkpointing=True),
    "sft, z-loss": dict(stage="sft", z_loss=0.1, max_steps=8),
    "reward": dict(stage="reward", lr=1e-3),
    "reward, all": dict(stage="reward", lr=1e-3, lora=True, checkpointing=True, accumulate=2, clip=0.05),
    "dpo": dict(stage="dpo", lr=1e-3, max_steps=8),
    "dpo, LoRA": dict(stage="dpo", lr=1e-3, lora=True, checkpointing=True, accumulate=2, max_steps=8),
    "kto": dict(stage="kto", lr=1e-3, max_steps=8),
    "kto, LoRA": dict(stage="kto", lr=1e-3, lora=True, checkpointing=True, max_steps=8),
    "ppo": dict(stage="ppo", max_steps=5, lr=3e-3, ptx_coef=0.5, max_norm=0.5),
    "ppo, shared backbone": dict(stage="ppo", max_steps=5, lr=3e-3, lora=True, max_norm=0.5, checkpointing=True),
    "ppo, head": dict(stage="ppo", max_steps=5, lr=3e-3, ptx_coef=0.5, critic_kind="head"),
    "grpo": dict(stage="grpo", max_steps=5, lr=1e-3, algorithm="dapo"),
    "online dpo": dict(stage="online_dpo", max_steps=5, lr=1e-3),
    "two optimizers": dict(stage="gan", max_steps=8),
    "value clipping": dict(stage="sft", clip=0.01, clip_by="value", max_steps=4),
}  # fmt: skip
#: Clamped gradients are as good as their signs. Large steps make rounding grow.
IN_BF16 = {
    name: dict(run, precision="bf16-mixed", lr=3e-3 if name.startswith("ppo") else 1e-3)
    for name, run in RUNS.items()
    if name != "value clipping"
}
CLIPPED = ("sft, accumulation and clipping", "value clipping")
#: Runs that CI tests under every strategy; under ZeRO-2 in fp32 it tests all.
CHOSEN = ("sft, accumulation and clipping", "sft, LoRA and checkpointing", "ppo", "two optimizers")
CHECKPOINTS = {
    "zero1 sharded": ({"plugin": "zero1", "checkpoint": "sharded"}, "32-true"),
    "zero2": (ZERO2, "32-true"),
    "zero2 bf16": (ZERO2, "bf16-mixed"),
    "zero2 offload": ({**ZERO2, "cpu_offload": True, "checkpoint": "sharded"}, "bf16-mixed"),
    "gemini": (GEMINI, "bf16-mixed"),
    "gemini sharded": ({**GEMINI, "checkpoint": "sharded"}, "bf16-mixed"),
    "gemini halves": ({**GEMINI, "shard_param_frac": 0.5, "offload_optim_frac": 0.5}, "bf16-mixed"),
}  # fmt: skip


def start(model_dir, out, cases, check=True):
    """Runs cases one after the other in one start of processes."""
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "MASTER_ADDR": "127.0.0.1"}
    command = [python(), str(HERE / "run.py"), str(model_dir), str(out), json.dumps(cases)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


# ------------------------------------------------------------------------------------------------- curves


def pairs(names, strategies, whole=None):
    """Arguments of tests: a run and a strategy."""
    return [
        pytest.param(name, strategy, marks=() if name in CHOSEN or strategy == whole else pytest.mark.exhaustive)
        for name in names
        for strategy in strategies
    ]


@pytest.fixture(scope="module")
def runs(tiny_model_dir, tmp_path_factory, request):
    """The runs that the selected tests compare."""
    out = tmp_path_factory.mktemp("curves")
    plain, two = {}, {}
    for test in request.session.items:
        for function, made, after, strategies in (
            (test_curve_equals_one_plain_process, RUNS, "", FP32),
            (test_curve_in_bf16_equals_one_plain_process_in_bf16, IN_BF16, ", bf16", BF16),
        ):
            if getattr(test, "obj", None) is function:
                name, strategy = test.callspec.params["name"], test.callspec.params["strategy"]
                plain[name + after] = made[name]
                two[f"{name}{after} {strategy}"] = dict(made[name], strategy=strategies[strategy], devices=2)
    start(tiny_model_dir, out, plain | {name: RUNS[name] for name in ("sft", *CLIPPED)})
    start(tiny_model_dir, out, two)
    return out


@pytest.mark.parametrize("name, strategy", pairs(RUNS, FP32, "zero2"))
def test_curve_equals_one_plain_process(runs, name, strategy):
    assert largest_difference(curve(runs / f"{name} {strategy}"), curve(runs / name)) < 1e-5


@pytest.mark.parametrize("name, strategy", pairs(IN_BF16, BF16))
def test_curve_in_bf16_equals_one_plain_process_in_bf16(runs, name, strategy):
    a, b = curve(runs / f"{name}, bf16 {strategy}"), curve(runs / f"{name}, bf16")
    # of stages that sample the losses (not score, KL and norm), before samples part; of others the loss
    early = {"ppo": slice(2, 4), "grpo": slice(2, 3), "online dpo": slice(0, 1)}.get(name.partition(",")[0])
    a, b = (c[:, :1] if early is None else c[:2, early] for c in (a, b))
    assert largest_difference(a, b) < 2e-2


def test_clipping_bites(runs):
    for name in CLIPPED:
        assert largest_difference(curve(runs / name)[:4], curve(runs / "sft")[:4]) > 1e-4  # 10 times the bound above


# ------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def saved(tiny_model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("checkpoints")
    sft = dict(stage="sft", max_steps=6, devices=2)
    first, second = {}, {}
    for name, (strategy, precision) in CHECKPOINTS.items():
        run = dict(sft, strategy=strategy, precision=precision)
        first[name] = dict(run, save_every=3, export=True)
        second[f"{name}, resumed"] = dict(run, ckpt=str(out / name / "step=3.ckpt"))
    gan = dict(stage="gan", max_steps=8, devices=2)
    for mode in ("full", "sharded"):
        first[f"gan {mode}"] = dict(gan, strategy={**ZERO2, "checkpoint": mode}, save_every=6)
    for shared in (False, True):
        run = dict(stage="ppo", max_steps=3, devices=2, strategy=ZERO2, lora=shared, lr=3e-3, kl_target=1.0)
        first[f"ppo {shared}"] = dict(run, save_every=2)
        second[f"ppo {shared}, resumed"] = dict(run, ckpt=str(out / f"ppo {shared}" / "step=2.ckpt"))
    start(tiny_model_dir, out, first | second)
    return out


@pytest.mark.parametrize("name", [*CHECKPOINTS, "ppo False", "ppo True"])
def test_resume_goes_on_with_the_same_curve(saved, name):
    whole, resumed = curve(saved / name), curve(saved / f"{name}, resumed")
    left = len(resumed) - 1
    assert left >= 1 or name.startswith("ppo")
    if name.startswith("ppo"):
        assert torch.equal(resumed, whole[2:])
    else:
        assert torch.equal(resumed[1:], whole[-left:])
    a, b = (torch.load(saved / n / "weights.pt") for n in (name, f"{name}, resumed"))
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("mode", [pytest.param("full", marks=pytest.mark.exhaustive), "sharded"])
def test_model_checkpoint_keeps_the_best_and_the_last(tiny_model_dir, tmp_path, mode):
    run = dict(stage="sft", max_steps=6, devices=2, strategy={**ZERO2, "checkpoint": mode})
    start(tiny_model_dir, tmp_path, {"a": dict(run, save_every=2, top_k=2, save_last=True)})
    place = tmp_path / "a"
    points = curve(place)
    kept = sorted(p.name for p in place.glob("*.ckpt"))
    assert kept == ["last.ckpt", "step=4.ckpt", "step=6.ckpt"], (kept, points)  # the loss falls
    assert all(p.is_dir() == (mode == "sharded") for p in place.glob("*.ckpt"))
    start(tiny_model_dir, tmp_path, {"b": dict(run, max_steps=8, ckpt=str(place / "last.ckpt"))})
    assert len(curve(tmp_path / "b")) == 2


@pytest.mark.parametrize("mode", ["full", "sharded"])
def test_resume_on_another_number_of_ranks(saved, tiny_model_dir, tmp_path, mode):
    # steps of two optimizers are counted one by one
    checkpoint = str(saved / f"gan {mode}" / "step=6.ckpt")
    run = dict(stage="gan", max_steps=8, ckpt=checkpoint)
    cases = {"one": dict(run, strategy={**ZERO2, "checkpoint": mode})}
    if mode == "full":
        cases["plain"] = run
    start(tiny_model_dir, tmp_path, cases)
    for name in cases:
        assert largest_difference(curve(tmp_path / name), curve(saved / f"gan {mode}")[3:]) < 1e-6


def test_a_sharded_directory_becomes_an_ordinary_checkpoint(saved, tiny_model_dir, tmp_path):
    from lightning_rlhf.strategies.checkpoints import consolidate

    file = tmp_path / "one.ckpt"
    consolidate(saved / "gan sharded" / "step=6.ckpt", file)
    start(tiny_model_dir, tmp_path, {"plain": dict(stage="gan", max_steps=8, ckpt=str(file))})
    assert largest_difference(curve(tmp_path / "plain"), curve(saved / "gan sharded")[3:]) < 1e-6


def test_a_plain_checkpoint_loads_under_every_plugin(tiny_model_dir, tmp_path):
    start(tiny_model_dir, tmp_path, {"plain": dict(stage="gan", max_steps=8, save_every=6)})
    run = dict(stage="gan", max_steps=8, devices=2, ckpt=str(tmp_path / "plain" / "step=6.ckpt"))
    cases = {name: dict(run, strategy=strategy) for name, strategy in FP32.items()}
    start(tiny_model_dir, tmp_path, cases)
    for name in cases:
        assert largest_difference(curve(tmp_path / name), curve(tmp_path / "plain")[3:]) < 1e-6


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_export_is_the_model_after_fit(saved, name):
    exported = AutoModelForCausalLM.from_pretrained(saved / name / "hf" / "last")
    after = torch.load(saved / name / "weights.pt")
    for key, value in exported.named_parameters():
        assert torch.equal(value.float(), after[f"policy.model.{key}"].float()), key


# ------------------------------------------------------------------------------------------------- the rest


def test_validate_export_and_adapters(tiny_model_dir, tmp_path):
    """Validation before, during and after; a reward model with adapters under Gemini leaves as a whole model."""
    run = dict(max_steps=3, validate=True, sanity=1)
    half = dict(precision="bf16-mixed")
    plain = {"plain": dict(run, stage="sft"), "half": dict(run, stage="sft", **half)}
    start(tiny_model_dir, tmp_path, plain)
    gemini = dict(devices=2, strategy=GEMINI, **half)
    cases = {
        "zero2": dict(run, stage="sft", devices=2, strategy=ZERO2),
        "gemini": dict(run, stage="sft", **gemini),
        "ppo": dict(run, stage="ppo", lora=True, offload_frozen=True, **gemini),
        "reward": dict(stage="reward", lora=True, max_steps=2, export=True, **gemini),
    }
    start(tiny_model_dir, tmp_path, cases)
    for name in cases:
        curve(tmp_path / name)
    scores = {name: json.loads((tmp_path / name / "scores.json").read_text()) for name in plain | cases}
    for before, after in zip(scores["plain"], scores["zero2"], strict=True):
        assert before[0].keys() == after[0].keys()
        assert all(before[0][k] == pytest.approx(after[0][k], abs=1e-5) for k in before[0])
    for before, after in zip(scores["half"], scores["gemini"], strict=True):
        assert before[0]["val/loss"] == pytest.approx(after[0]["val/loss"], abs=3e-2)
    assert len(scores["ppo"]) == 2
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward" / "hf" / "last")
    assert all(p.isfinite().all() for p in exported.parameters())


def test_answers_are_compared_while_weights_are_cut(tiny_model_dir, tmp_path):
    """Win rates under ZeRO-2 and Gemini are of the same answers as in a run of one process."""
    run = dict(stage="sft", max_steps=6, win_rate=3, lr=1e-3)
    start(tiny_model_dir, tmp_path, {"plain": run, "half": dict(run, precision="bf16-mixed")})
    cases = {
        "zero2": dict(run, devices=2, strategy=ZERO2),
        "gemini": dict(run, devices=2, strategy=GEMINI, precision="bf16-mixed"),
    }
    start(tiny_model_dir, tmp_path, cases)
    for name, like in {"zero2": "plain", "gemini": "half"}.items():
        curve(tmp_path / name)
        found, wanted = (
            [json.loads(line) for line in (tmp_path / place / "win_rate.jsonl").read_text().splitlines()]
            for place in (name, like)
        )
        assert [row["step"] for row in wanted] == [3] * 3 + [6] * 3
        if name == "zero2":
            assert found == wanted
        else:  # of other roundings; the start's are the same
            assert [(row["step"], row["prompt"], row["b"]) for row in found] == [
                (row["step"], row["prompt"], row["b"]) for row in wanted
            ]
            assert any(row["a"] != row["b"] for row in found)


def test_noise_on_embeddings_ends_with_training(tiny_model_dir, tmp_path):
    """NEFTune under every plugin: the first loss is another than without, validation's is not."""
    run = dict(stage="sft", devices=2, max_steps=2, lr=0.0, validate=True)
    strategies = {
        "ddp": dict(strategy=FP32["ddp"]),
        "zero2": dict(strategy=ZERO2),
        "gemini": dict(strategy=GEMINI, precision="bf16-mixed"),
    }
    cases = {
        f"{name} {alpha}": dict(run, **s, neftune_alpha=alpha)
        for name, s in strategies.items()
        for alpha in (0.0, 20.0)
    }
    start(tiny_model_dir, tmp_path, cases)
    for name in strategies:
        without, noisy = (curve(tmp_path / f"{name} {alpha}") for alpha in (0.0, 20.0))
        assert largest_difference(without, noisy) > 1e-3
        scores = [json.loads((tmp_path / f"{name} {alpha}" / "scores.json").read_text()) for alpha in (0.0, 20.0)]
        assert scores[0] == scores[1]


def test_fp16_scales_losses_and_clips(tiny_model_dir, tmp_path):
    run = dict(stage="sft", max_steps=4, clip=0.5)
    start(tiny_model_dir, tmp_path, {"plain": run})
    cases = {name: dict(run, devices=2, strategy=s, precision="colossalai 16-mixed") for name, s in BF16.items()}
    start(tiny_model_dir, tmp_path, cases)
    for name in cases:
        assert largest_difference(curve(tmp_path / name), curve(tmp_path / "plain")) < 2e-2


def test_a_killed_rank_ends_the_run_and_leaves_the_last_checkpoint(tiny_model_dir, tmp_path):
    run = dict(stage="gan", max_steps=20, devices=2, strategy={**ZERO2, "timeout": 30}, save_every=4, kill=[1, 14])
    done = start(tiny_model_dir, tmp_path, {"killed": run}, check=False)
    assert done.returncode != 0
    assert not (tmp_path / "killed" / "curve.json").exists()
    last = sorted((tmp_path / "killed").glob("step=*.ckpt"))[-1]
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 12 or last.name == "step=8.ckpt"


@pytest.mark.parametrize("mode, rank", [pytest.param("full", 0, marks=pytest.mark.exhaustive), ("sharded", 1)])
def test_a_full_disk_leaves_the_former_checkpoint(tiny_model_dir, tmp_path, mode, rank):
    run = dict(
        stage="gan", max_steps=20, devices=2, strategy={**ZERO2, "checkpoint": mode, "timeout": 30}, save_every=4
    )
    done = start(tiny_model_dir, tmp_path, {"full": dict(run, full=[rank, 6])}, check=False)
    assert done.returncode != 0
    place = tmp_path / "full"
    assert sorted(p.name for p in place.glob("*step=*")) == ["step=4.ckpt"]
    start(tiny_model_dir, tmp_path, {"resumed": dict(run, ckpt=str(place / "step=4.ckpt"), save_every=0, max_steps=6)})
    curve(tmp_path / "resumed")


def test_fp16_refuses_a_loss_through_two_optimizers(tiny_model_dir, tmp_path):
    run = dict(stage="gan", devices=2, strategy=ZERO2, precision="colossalai 16-mixed")
    done = start(tiny_model_dir, tmp_path, {"gan": run}, check=False)
    assert done.returncode != 0
    assert "depends on maker, critics.one, but with 16-mixed each optimizer scales its loss" in done.stderr
