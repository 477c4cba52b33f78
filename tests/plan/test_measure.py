"""What is foretold from configs, beside real runs."""

import pytest
from torch.utils.data import DataLoader

from lightning_rlhf import (
    DPOModule,
    GRPOModule,
    Load,
    LoRA,
    PPOModule,
    PromptDataModule,
    RewardModule,
    Rollout,
    SFTModule,
    Updates,
)
from lightning_rlhf.plan.layout import Layout, moments, peak
from lightning_rlhf.plan.measure import Mode, measure
from lightning_rlhf.plan.shapes import Shape

from .cases import NEW, lengths
from .measured import fit


def compare(module, shape, found, share=0.05):
    """Asserts that a plan is within 2 % in what is held, and within a share at the peak."""
    told = measure(module, shape, Mode(checkpointing=module.load.gradient_checkpointing))
    most = peak(moments(told, Layout("ddp", 1, 1, False, shape.rows)))
    parts = {"weights": told.trained + told.frozen, "gradients": told.gradients, "states": told.states}
    for name, size in parts.items():
        assert size == pytest.approx(found[name], rel=0.02), name
    assert most.on_device == pytest.approx(found["peak"], rel=share)


@pytest.mark.parametrize(
    "stage, settings",
    [
        (SFTModule, {}),
        (SFTModule, {"lora": LoRA(r=8)}),
        (SFTModule, {"load": Load(gradient_checkpointing=True)}),
        (RewardModule, {}),
        pytest.param(DPOModule, {}, marks=pytest.mark.slow),
    ],
    ids=["sft", "sft lora", "sft checkpointing", "reward", "dpo"],
)
def test_a_step(stage, settings, small_model):
    shape = Shape("instructions" if stage is SFTModule else "preferences", 4, 40, 40, 1 if stage is SFTModule else 2, 1)
    found = fit(stage(small_model, **settings), DataLoader([shape.batch() for _ in range(3)], batch_size=None))
    compare(stage(small_model, **settings), shape, found)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("stage, settings", [(GRPOModule, {"lora": LoRA(r=8)}), (PPOModule, {})], ids=["grpo", "ppo"])
def test_an_iteration(stage, settings, small_model, tmp_path):
    group = 4 if stage is GRPOModule else 1
    settings = dict(settings, rollout=Rollout(group, NEW), updates=Updates(epochs=2))
    texts = [{"prompt": "fox dog " * 12} for _ in range(8)]
    data = PromptDataModule(texts, batch_size=2 if group > 1 else 8, val_fraction=0.0, cache_dir=tmp_path)
    module = stage(small_model, lengths, **settings)
    found = fit(module, data)
    prompt = len(module.sampled[0].experience.trees[0].prompt)
    rows = 2 if group > 1 else 8
    shape = Shape("prompts", rows, prompt, 12, group, 1, rows, 2, 1, group)
    compare(stage(small_model, lengths, **settings), shape, found)
