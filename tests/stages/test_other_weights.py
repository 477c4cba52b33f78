"""A checkpoint that does not fit a run's models: one line says what differs, and what to do."""

import re
import shutil
from dataclasses import replace

import pytest
import torch
from runs import quiet

from lightning_rlhf import InstructionDataModule, Load, LoRA, PPOModule, PromptDataModule, SFTModule
from lightning_rlhf.rl import Critic, Rollout
from lightning_rlhf.rollout import Sampling
from lightning_rlhf.utils import CheckpointError

ROWS = [{"prompt": f"Say {i}", "completion": f"{i} " * (1 + i % 3)} for i in range(8)]
LORA = LoRA(r=2, targets=["q_proj"])
OTHERWISE = ", or start a new run with what that run exported (its hf/best or hf/last) as pretrained."


def lengths(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


def ppo(model_dir, **settings):
    return PPOModule(model_dir, lengths, rollout=Rollout(sampling=Sampling(max_new_tokens=4)), **settings)


def data_of(module, tmp_path, val=None):
    options = dict(val=val, val_fraction=0.0, cache_dir=tmp_path)
    if isinstance(module, PPOModule):
        return PromptDataModule(ROWS, batch_size=2, **options)
    return InstructionDataModule(ROWS, batch_size=4, **options)


def run(module, tmp_path, ckpt=None):
    trainer = quiet(tmp_path, max_steps=1 if ckpt is None else 2)
    trainer.fit(module, data_of(module, tmp_path), ckpt_path=ckpt)
    return trainer


def separate(**settings):
    return dict(critic=Critic(kind="separate"), **settings)


@pytest.mark.parametrize(
    ("stage", "was", "now", "said"),
    [
        (SFTModule, {}, {"lora": LORA}, "made without LoRA, and this run has LoRA of rank 2. Leave out lora"),
        (SFTModule, {"lora": LORA}, {}, "made with LoRA of rank 2, and this run has none. Set lora with r=2"),
        (SFTModule, {"lora": LORA}, {"lora": replace(LORA, r=3)},
         "made with LoRA of rank 2, and this run has rank 3. Set lora.r to 2"),
        (SFTModule, {"lora": LORA}, {"lora": replace(LORA, targets=["q_proj", "v_proj"])},
         "made with LoRA on q_proj, and this run has it on q_proj, v_proj. Set lora.targets to [q_proj]"),
        (SFTModule, {"lora": LORA}, {"lora": replace(LORA, alpha=8.0)},
         "made with lora.alpha=32.0, and this run has 8.0. Set lora.alpha to 32.0"),
        (SFTModule, {"lora": LORA}, {"lora": replace(LORA, rslora=True)},
         "made with lora.rslora=False, and this run has True. Set lora.rslora to False"),
        (SFTModule, {"lora": LORA}, {"lora": replace(LORA, dora=True)},
         "made without DoRA, and this run has it. Set lora.dora to false"),
        (SFTModule, {"lora": LORA}, {"lora": replace(LORA, modules_to_save=["lm_head"])},
         "made without layers trained whole, and this run has lm_head. Set lora.modules_to_save to []"),
        (SFTModule, {}, {"chat_template": "llama3"},
         "made with 400 embeddings, and this run has 403. Give the same pretrained, tokenizer and chat_template"),
        (SFTModule, {"lora": LORA}, {"lora": LORA, "chat_template": "llama3"},
         "made with no new tokens to train, and this run has 3. Give the same tokenizer and chat_template"),
        (ppo, separate(), {"critic": Critic(kind="head")},
         "made with critic.kind=separate, and this run has head. Set critic.kind to separate"),
        (ppo, {"lora": LORA}, separate(lora=LORA),
         "made with critic.kind=adapter, and this run has separate. Set critic.kind to adapter"),
        (ppo, separate(), {"lora": LORA}, "made without LoRA, and this run has LoRA of rank 2. Leave out lora"),
    ],
)  # fmt: skip
def test_other_adapters_tokens_and_critics_are_named(stage, was, now, said, tiny_model_dir, tmp_path):
    run(stage(tiny_model_dir, **was), tmp_path).save_checkpoint(path := tmp_path / "x.ckpt")
    module = stage(tiny_model_dir, **now)
    line = re.escape(f"{path} does not fit {type(module).__name__}. It was {said}{OTHERWISE}")
    with pytest.raises(CheckpointError, match=f"^{line}$"):
        run(module, tmp_path, path)
    run(stage(tiny_model_dir, **was), tmp_path, path)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_another_model_is_named(lora, tiny_model_dir, deep_model_dir, wide_model_dir, other_model_dir, tmp_path):
    run(SFTModule(tiny_model_dir, lora=lora), tmp_path).save_checkpoint(path := tmp_path / "x.ckpt")
    said = {
        deep_model_dir: "made with a model of 2 layers, and this run has one of 4. Give the same pretrained",
        wide_model_dir: r"made with policy\.model\..* of shape \(\d+, 32\), and this run has shape \(\d+, 64\)",
        other_model_dir: "",
    }
    if lora is not None:
        frozen = r"made on other frozen weights than this run has: policy\.\S+ differs. Give the same pretrained"
        said = dict.fromkeys(said, frozen)
    for model_dir, message in said.items():
        module = SFTModule(model_dir, lora=lora)
        if not message:  # all weights are the checkpoint's
            run(module, tmp_path, path)
            continue
        with pytest.raises(CheckpointError, match=f"does not fit SFTModule. It was {message}"):
            run(module, tmp_path, path)
        with pytest.raises(CheckpointError, match="does not fit SFTModule"):
            quiet(tmp_path).validate(module, data_of(module, tmp_path, ROWS[:2]), ckpt_path=path)


def test_the_same_model_elsewhere_or_in_another_dtype_is_no_other(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, moved := tmp_path / "moved")
    run(SFTModule(tiny_model_dir, lora=LORA), tmp_path).save_checkpoint(path := tmp_path / "x.ckpt")
    run(SFTModule(moved, lora=LORA), tmp_path, path)
    run(SFTModule(moved, lora=replace(LORA, dropout=0.5), load=Load(dtype="bfloat16")), tmp_path, path)


def test_another_reference_is_named_where_a_run_goes_on(tiny_model_dir, other_model_dir, tmp_path):
    """Not where it is only measured: its weights are all its own."""
    run(ppo(tiny_model_dir, **separate()), tmp_path).save_checkpoint(path := tmp_path / "x.ckpt")
    module = ppo(other_model_dir, **separate())
    message = r"other frozen weights than this run has: reference\.\S+ differs. Give the same reference \(or pretrained"
    with pytest.raises(CheckpointError, match=message):
        run(module, tmp_path, path)
    (found,) = quiet(tmp_path).validate(module, data_of(module, tmp_path, ROWS[:2]), ckpt_path=path, verbose=False)
    assert found["val/score"] > 0


def test_other_quantization_is_named_where_a_run_goes_on(wide_model_dir, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    nf4 = SFTModule(wide_model_dir, lora=LORA, load=Load(quantization="nf4"))
    run(nf4, tmp_path).save_checkpoint(path := tmp_path / "x.ckpt")
    message = r"made with load.quantization=nf4, and this run has null. Set load.quantization to nf4, or start"
    with pytest.raises(CheckpointError, match=message):
        run(SFTModule(wide_model_dir, lora=LORA), tmp_path, path)
    plain = SFTModule.load_from_checkpoint(path, load=Load())
    held = torch.load(path, weights_only=True)["state_dict"]
    assert held and all(torch.equal(plain.state_dict()[name], value) for name, value in held.items())


def test_weights_that_a_user_loads_are_explained_too(tiny_model_dir):
    module, other = SFTModule(tiny_model_dir, lora=LORA), SFTModule(tiny_model_dir)
    for each in (module, other):
        each.configure_model()
    with pytest.raises(CheckpointError, match=r"The state dict does not fit SFTModule. It was made without LoRA"):
        module.load_state_dict(other.state_dict())
    assert module.load_state_dict({}, strict=False).missing_keys
