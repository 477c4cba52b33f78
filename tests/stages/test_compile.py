"""torch.compile: packed batches differ in all their lengths, and are compiled for once and not for each."""

import lightning.pytorch as L
import pytest
import torch
from torch._dynamo.utils import counters

from lightning_rlhf import (
    InstructionDataModule,
    LoRA,
    PPOModule,
    PreferenceDataModule,
    PromptDataModule,
    RewardModule,
    SFTModule,
)

ROWS = [{"prompt": "fox " * (1 + i % 7) + str(i), "completion": "dog " * (1 + i % 5)} for i in range(10)]


def nothing(prompts, completions):
    return [0.0] * len(completions)


class Graphs(L.Callback):
    """How many graphs were compiled after each step."""

    def __init__(self):
        self.counts = []

    def on_train_batch_end(self, *args):
        self.counts.append(counters["stats"]["unique_graphs"])


def make(name, folder, cache):
    options = dict(batch_size=2, val_fraction=0.0, cache_dir=cache)

    def plain(params):
        return torch.optim.SGD(params, lr=0.1)

    if name == "sft":
        return SFTModule(folder, optimizer=plain), InstructionDataModule(ROWS, max_length=256, **options)
    if name == "ppo":
        return PPOModule(folder, nothing, lora=LoRA(r=2)), PromptDataModule(ROWS, **options)
    rows = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "no"} for r in ROWS]
    return RewardModule(folder, optimizer=plain), PreferenceDataModule(rows, max_length=256, **options)


def fit(module, data, out, callbacks=()):
    trainer = L.Trainer(accelerator="cpu", logger=False, max_steps=5, enable_checkpointing=False, default_root_dir=out,
                        enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks))  # fmt: skip
    trainer.fit(module, data)


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_a_compiled_stage_is_compiled_for_all_lengths_and_learns_the_same(name, tiny_model_dir, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    want, data = make(name, tiny_model_dir, tmp_path / "cache")
    fit(want, data, tmp_path)
    module, data = make(name, tiny_model_dir, tmp_path / "cache")
    graphs = Graphs()
    fit(torch.compile(module, backend="eager"), data, tmp_path, [graphs])
    assert graphs.counts[0] > 0
    assert graphs.counts[1:] == [graphs.counts[1]] * 4  # the second length makes torch compile for all
    for key, value in want.state_dict().items():
        torch.testing.assert_close(module.state_dict()[key], value, atol=1e-6, rtol=1e-5)


def test_an_online_stage_that_was_compiled_as_a_whole_is_refused(tiny_model_dir, tmp_path):
    module, data = make("ppo", tiny_model_dir, tmp_path / "cache")
    with pytest.raises(ValueError, match=r"compile the model alone, by module.configure_model\(\) and module.policy"):
        fit(torch.compile(module, backend="eager"), data, tmp_path)
    assert not hasattr(module, "policy")
