"""What is trained stays fp32: heads, adapters, constants; precisions that cast all are refused with the way out."""

from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from grouping import grouped
from lightning.pytorch.plugins import BitsandbytesPrecision, HalfPrecision
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf import (
    GRPOModule,
    InstructionDataModule,
    Load,
    LoRA,
    OnlineDPOModule,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    Sampling,
    SFTModule,
)
from lightning_rlhf.rl import Rollout
from lightning_rlhf.stages import base

QUESTIONS = {"Who are you?": "A model.", "What is red?": "An apple."}
STAGES = ("sft", "reward", "ppo")


def letters(prompts, completions):
    return [float(len(set(c))) for c in completions]


def stage(name, folder, cache, **options):
    pairs = [{"prompt": q, "chosen": a, "rejected": "No."} for q, a in QUESTIONS.items()]
    common = dict(val_fraction=0.0, batch_size=2, cache_dir=cache)
    if name == "sft":
        rows = [{"prompt": q, "completion": a} for q, a in QUESTIONS.items()]
        return SFTModule(folder, **grouped(**options)), InstructionDataModule(rows, max_length=128, **common)
    if name == "reward":
        return RewardModule(folder, **grouped(**options)), PreferenceDataModule(pairs, max_length=128, **common)
    options |= dict(reward=letters, sampling=Sampling(max_new_tokens=4), epochs=1)
    return PPOModule(folder, **grouped(**options)), PromptDataModule([{"prompt": q} for q in QUESTIONS], **common)


def fit(module, data, out, steps=1, **options):
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        max_steps=steps,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=out,
        **options,
    )
    trainer.fit(module, data)
    return trainer


class TransformerEngine(HalfPrecision):
    """Lightning's own needs a package that needs a GPU."""

    precision = "transformer-engine"

    def __init__(self):
        super().__init__("bf16-true")
        self.precision = "transformer-engine"


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize(
    "options, message",
    [
        (dict(precision="bf16-true"), "set trainer.precision to bf16-mixed, and model.load.dtype to bfloat16"),
        (dict(precision="16-true"), "set trainer.precision to 16-mixed, and model.load.dtype to float16"),
        (dict(plugins=TransformerEngine()), "set trainer.precision to bf16-mixed"),
    ],
    ids=["bf16", "fp16", "fp8"],
)
def test_true_half_precision_is_refused_before_anything_is_loaded(name, options, message, tiny_model_dir, tmp_path):
    module, data = stage(name, tiny_model_dir, tmp_path / "cache", lora=LoRA(r=2))
    with pytest.raises(ValueError, match=f"(?i){message}"):
        fit(module, data, tmp_path, **options)
    assert not hasattr(module, "policy") and not hasattr(module, "reward_model")


def test_lightnings_own_quantization_and_a_half_default_dtype_are_refused(tiny_model_dir, tmp_path):
    module, data = stage("sft", tiny_model_dir, tmp_path / "cache", lora=LoRA(r=2))
    plugin = object.__new__(BitsandbytesPrecision)  # it needs a GPU to be made
    module._trainer = SimpleNamespace(precision_plugin=plugin, strategy=None)
    with pytest.raises(ValueError, match=r"model.load.quantization to nf4 or int8"):
        module._check_precision()
    module._trainer = None
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(ValueError, match=r"default dtype is .*bfloat16"):
            fit(module, data, tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", STAGES)
def test_what_trains_over_a_bf16_model_is_fp32_and_moves_in_all_its_entries(name, tiny_model_dir, tmp_path):
    """In bf16 a step of 2e-5 is below what most entries can show: 1.6 % of a reward head's moved."""
    torch.manual_seed(0)
    lora = LoRA(r=2, modules_to_save=[] if name == "reward" else ["lm_head"])
    module, data = stage(name, tiny_model_dir, tmp_path / "cache", lora=lora, dtype="bfloat16")
    module.configure_model()
    heads = {"sft": "modules_to_save", "reward": "score.modules_to_save", "ppo": "value_head"}
    trained = {k: p for k, p in module.model_to_export.named_parameters() if p.requires_grad}
    before = {k: p.detach().clone() for k, p in trained.items()}
    fit(module, data, tmp_path, steps=4, precision="bf16-mixed")
    assert {p.dtype for p in trained.values()} == {torch.float32}
    frozen = {p.dtype for p in module.model_to_export.parameters() if not p.requires_grad and p.dim() > 1}
    assert torch.bfloat16 in frozen
    head = next(k for k in trained if heads[name] in k and k.endswith("weight"))
    moved = (trained[head] != before[head]).float().mean().item()
    assert moved == 1
    want = AutoModelForCausalLM.from_pretrained(tiny_model_dir).model.rotary_emb.inv_freq
    assert torch.equal(module.model_to_export.transformer.model.rotary_emb.inv_freq, want)


def test_training_all_weights_in_16_bits_is_warned_of(tiny_model_dir, tmp_path):
    module, data = stage("sft", tiny_model_dir, tmp_path / "cache", dtype="bfloat16")
    with pytest.warns(UserWarning, match=r"below 1/256 of a weight are lost. Set model.load.dtype to float32"):
        fit(module, data, tmp_path, precision="bf16-mixed")


def test_samples_of_a_head_trained_in_fp32_over_a_bf16_model_need_no_autocast(tiny_model_dir, tmp_path):
    module, _ = stage("sft", tiny_model_dir, tmp_path, lora=LoRA(r=2, modules_to_save=["lm_head", "embed_tokens"]),
                      dtype="bfloat16")  # fmt: skip
    module.configure_model()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer("Who are you?", return_tensors="pt").input_ids
    with module.policy.native_attention() as model, torch.no_grad():
        out = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    assert out.shape[1] > ids.shape[1]


@pytest.mark.parametrize("name", ["sft", "ppo"])
@pytest.mark.parametrize(
    ("device", "settings", "before", "within"),
    [
        ("cuda", {}, "highest", "high"),
        ("cuda", {"load": Load(tf32=False)}, "highest", "highest"),
        ("cuda", {}, "medium", "medium"),  # the process has chosen
        ("cpu", {}, "highest", "highest"),
    ],
)
def test_fp32_is_multiplied_in_tf32_on_a_gpu_while_a_fit_runs(
    name, device, settings, before, within, tiny_model_dir, tmp_path, monkeypatch
):
    """There is no GPU here: the stage is told that it is on one when it chooses."""
    original, seen = base.matmul_precision, []
    monkeypatch.setattr(base, "matmul_precision", lambda _, tf32: original(torch.device(device), tf32))
    module, data = stage(name, tiny_model_dir, tmp_path / "cache", **settings)
    monkeypatch.setattr(module, "on_train_batch_end", lambda *args: seen.append(torch.get_float32_matmul_precision()))
    torch.set_float32_matmul_precision(before)
    try:
        fit(module, data, tmp_path)
        assert seen == [within] and torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("kind", [GRPOModule, OnlineDPOModule])
def test_groups_are_counted_in_double_precision_too(tiny_model_dir, tmp_path, kind):
    """There torch makes doubles of what has no dtype."""
    rollout = Rollout(samples_per_prompt=2, sampling=Sampling(max_new_tokens=4))
    module = kind(tiny_model_dir, letters, rollout=rollout)
    rows = [{"prompt": q} for q in QUESTIONS]
    data = PromptDataModule(rows, val=rows, batch_size=2, cache_dir=tmp_path)
    trainer = fit(module, data, tmp_path, precision="64-true")
    assert next(module.policy.parameters()).dtype == torch.float64 and trainer.global_step == 1
    assert trainer.validate(module, data, verbose=False)[0]["val/length"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 0.5}, r"trainer.gradient_clip_val=0.5: PPOModule clips.* by updates.max_grad_norm"),
        (
            {"accumulate_grad_batches": 2},
            r"trainer.accumulate_grad_batches=2: PPOModule takes.*updates.micro_batch_tok",
        ),
    ],
)
def test_settings_of_the_trainer_that_are_the_stages_own_are_refused(tiny_model_dir, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        fit(*stage("ppo", tiny_model_dir, tmp_path), tmp_path, **options)
