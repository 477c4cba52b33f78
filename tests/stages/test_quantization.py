"""The stages over quantized weights: exact resume, checkpoints of adapters alone, ratios of 1, and what is refused."""

import importlib.util
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import python
from grouping import grouped
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy
from runs import assert_equal, load_script
from torch.optim import AdamW
from transformers import AutoModelForCausalLM

from lightning_rlhf import HFExport, Load, LoRA, PPOModule, RewardModule, SFTModule
from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.models.quantization import is_quantized
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.strategies import ColossalAIStrategy

pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")

HERE = Path(__file__).parent
KINDS = ["nf4", "int8"]


def load(name):
    return load_script(HERE / f"{name}.py").run


RUNS = {name: load(f"run_{name}") for name in ("sft", "reward", "ppo")}
OPTIONS = {
    "sft": dict(max_epochs=2, dropout=0.2),
    "reward": dict(max_epochs=2, dropout=0.2),
    "ppo": dict(max_steps=5, kl_target=0.01, kl_horizon=50),
}


def run(stage, model_dir, out, kind="nf4", **options):
    return RUNS[stage](model_dir, out, lora=True, quantization=kind, **{**OPTIONS[stage], **options})


def trained(module):
    return {k: v.detach().clone() for k, v in module.named_parameters() if v.requires_grad}


def difference(a, b):
    flat = [torch.cat([x[k].flatten().double() for k in b]) for x in (a, b)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stage", RUNS)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(stage, kind, wide_model_dir, tmp_path):
    """In the middle of an epoch, from a checkpoint that holds what is trained and nothing of what is quantized."""
    _, whole = run(stage, wide_model_dir, tmp_path / "a", kind, save_every=1)
    assert is_quantized(whole)
    place = tmp_path / "a" / "step3.ckpt"
    saved = torch.load(place, weights_only=True)["state_dict"]
    inside = ("policy.", "reward_model.", "critic.", "reward.")
    assert {k for k in saved if k.startswith(inside)} == trained(whole).keys()
    _, resumed = run(stage, wide_model_dir, tmp_path / "b", kind, ckpt=str(place), seed=7)
    assert_equal(trained(resumed), trained(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_loads_by_itself(kind, wide_model_dir, tmp_path):
    trainer, module = run("sft", wide_model_dir, tmp_path, kind, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    settings = dict(pretrained=wide_model_dir, optimizer=AdamW)
    again = SFTModule.load_from_checkpoint(tmp_path / "one.ckpt", strict=True, **settings)
    assert again.load.quantization == kind and is_quantized(again)
    assert_equal(trained(again), trained(module))


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_in_the_middle_does_not_disturb_a_run(kind, wide_model_dir, tmp_path):
    _, plain = run("sft", wide_model_dir, tmp_path / "a", kind)
    export = HFExport(str(tmp_path / "hf"), monitor="val/loss")
    _, module = run("sft", wide_model_dir, tmp_path / "b", kind, callbacks=[export])
    assert_equal(trained(module), trained(plain))
    ids = torch.arange(5, 25)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf" / "last").eval()
    with torch.no_grad(), module.policy.native_attention() as model:
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------- PPO


@pytest.mark.parametrize("kind", KINDS)
def test_ratios_start_at_one_and_the_engine_agrees(kind, wide_model_dir, tmp_path):
    """1e-5, after passes of other batches, at a temperature, in minibatches of other micro-batches."""
    trainer, module = run("ppo", wide_model_dir, tmp_path, kind, max_steps=3, epochs=1, lr=3e-2)
    assert module.policy.layout == "tree" and module.policy.adapters.keys() == {"policy", "critic"}
    assert trainer.callback_metrics["train/first_ratio_error"] < 1e-5
    assert trainer.callback_metrics["train/rollout_error"] < 1e-4
    assert trainer.callback_metrics["train/kl"] != 0  # the reference is the same backbone, with adapters off


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_and_layout_do_not_change_the_result(kind, wide_model_dir, tmp_path):
    options = dict(max_steps=2, samples_per_prompt=2, kl_target=None)
    _, whole = run("ppo", wide_model_dir, tmp_path / "a", kind, micro_batch_tokens=None, **options)
    _, parts = run("ppo", wide_model_dir, tmp_path / "b", kind, micro_batch_tokens=60, **options)
    _, padded = run("ppo", wide_model_dir, tmp_path / "c", kind, micro_batch_tokens=60, layout="padded", **options)
    assert difference(trained(parts), trained(whole)) < 1e-5
    assert difference(trained(padded), trained(whole)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_adapter_shares_the_quantized_backbone(kind, wide_model_dir, tmp_path):
    """And scores as it was trained to, where it was trained over weights that were quantized alike."""
    _, reward = run("reward", wide_model_dir, tmp_path / "reward", kind, max_epochs=1)
    save_pretrained(reward.reward_model.model, reward.tokenizer, tmp_path / "hf", adapter_only=True)
    _, module = run("ppo", wide_model_dir, tmp_path / "ppo", kind, max_steps=1, reward=str(tmp_path / "hf"))
    assert module.policy.adapters.keys() == {"policy", "critic", "reward"}
    batch = pack([Tree([5, 6, 7], [Branch([8, 9, 4]), Branch([10, 11])])])
    with torch.no_grad():
        found, want = module.policy(batch, "reward"), reward.eval().reward_model(batch, normalize=True)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_separate_critic_is_quantized_too(kind, wide_model_dir, tmp_path):
    _, module = run("ppo", wide_model_dir, tmp_path, kind, max_steps=1, critic_kind="separate")
    assert is_quantized(module.policy) and is_quantized(module.critic)


# ------------------------------------------------------------------------------------------------- strategies


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_two_processes_train_as_one(stage, wide_model_dir, tmp_path):
    options = {**OPTIONS[stage], **({"dropout": 0.0} if stage == "sft" else {})}
    run(stage, wide_model_dir, tmp_path / "one", **options)
    (tmp_path / "two").mkdir()
    env = {**os.environ, "PYTHONPATH": str(HERE.parents[1]), "MASTER_ADDR": "127.0.0.1"}
    options |= {"lora": True, "quantization": "nf4", "devices": 2}
    command = [python(), str(HERE / f"run_{stage}.py"), str(wide_model_dir), str(tmp_path / "two")]
    done = subprocess.run([*command, json.dumps(options)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / name / "weights.pt", weights_only=False) for name in ("one", "two"))
    one = {k: v for k, v in one.items() if "lora_" in k}
    assert difference(two, one) < 1e-4


def test_strategies_that_cut_or_cast_weights_are_refused(wide_model_dir):
    module = SFTModule(wide_model_dir, **grouped(lora=LoRA(r=4), quantization="nf4"))
    for strategy in (SingleDeviceStrategy("cpu"), DDPStrategy(), ColossalAIStrategy("ddp")):
        module.trainer = kept = SimpleNamespace(strategy=strategy, precision_plugin=Precision())
        module.setup("fit")
    for strategy in (ColossalAIStrategy("zero2"), ColossalAIStrategy("gemini"), FSDPStrategy()):
        module.trainer = kept = SimpleNamespace(strategy=strategy, precision_plugin=Precision())
        with pytest.raises(ValueError, match="runs on one device, under DDP and under colossalai_ddp"):
            module.setup("fit")
    assert kept
    module.load = Load()
    module.setup("fit")


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("stage", [SFTModule, RewardModule, lambda *a, **k: PPOModule(*a, **grouped(reward=len, **k))])
def test_settings_that_can_not_train_are_refused(stage, wide_model_dir, monkeypatch):
    with pytest.raises(ValueError, match=r"quantized weights can't be trained. Give lora"):
        stage(wide_model_dir, **grouped(quantization="nf4"))
    with pytest.raises(ValueError, match=r"lora.init='pissa' moves"):
        stage(wide_model_dir, **grouped(quantization="nf4", lora=LoRA(r=4, init="pissa")))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning_rlhf\[quantization\]'"):
        stage(wide_model_dir, **grouped(quantization="nf4", lora=LoRA(r=4)))
