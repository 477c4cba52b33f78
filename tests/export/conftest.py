"""Short fits of a trained model through the command line, with what they leave."""

import json

import pytest
from exported import STORIES, outputs

from lightning_rlhf.cli import cli


class Run:
    """A fit: its folder, and the module as it was after the last step."""

    def __init__(self, folder, module):
        self.folder, self.module = folder, module

    @property
    def checkpoint(self):
        [found] = self.folder.rglob("*.ckpt")
        return found

    def outputs(self):
        return outputs(self.module.model_to_export.model)


def fit(stage, folder, *arguments):
    rows = folder / "rows.jsonl"
    folder.mkdir(parents=True)
    row = {"prompt": "Say {i}", "completion": "dog {i}"} if stage == "SFTModule" else {
        "prompt": "Say {i}", "chosen": "the fox {i}", "rejected": "dog"}  # fmt: skip
    lines = [json.dumps({k: v.format(i=i) for k, v in row.items()}) + "\n" for i in range(8)]
    rows.write_text("".join(lines), encoding="utf-8")
    data = "InstructionDataModule" if stage == "SFTModule" else "PreferenceDataModule"
    settings = {
        "model.pretrained": STORIES, "model.optimizer": "torch.optim.AdamW", "model.optimizer.lr": 2e-3,
        "data": data, "data.train": rows, "data.val": rows, "data.batch_size": 4, "data.cache_dir": folder / "cache",
        "trainer.max_epochs": 2, "trainer.accelerator": "cpu", "trainer.logger": "false",
        "trainer.default_root_dir": folder, "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }  # fmt: skip
    callbacks = ["--trainer.callbacks+=HFExport", "--trainer.callbacks.monitor", "val/loss"]
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    run = cli(["fit", "--model", stage, *options, *arguments, *callbacks])
    return Run(folder, run.model)


LORA = ("--model.lora.r", "4", "--model.lora.alpha", "8")


@pytest.fixture(scope="session")
def full_run(tmp_path_factory):
    return fit("SFTModule", tmp_path_factory.mktemp("export") / "full")


@pytest.fixture(scope="session")
def lora_run(tmp_path_factory):
    return fit("SFTModule", tmp_path_factory.mktemp("export") / "lora", *LORA)


@pytest.fixture(scope="session")
def adapter_run(tmp_path_factory):
    """Its exports are adapters, and EMA's average is what it exports."""
    arguments = ("--trainer.callbacks+=EMA", "--trainer.callbacks.decay", "0.5")
    adapters = ("--trainer.callbacks+=HFExport", "--trainer.callbacks.dirpath")
    folder = tmp_path_factory.mktemp("export") / "adapters"
    own = ("--trainer.callbacks.adapter_only", "true", "--trainer.callbacks.monitor", "val/loss")
    return fit("SFTModule", folder, *LORA, *arguments, *adapters, str(folder / "adapters"), *own)


@pytest.fixture(scope="session")
def reward_run(tmp_path_factory):
    return fit("RewardModule", tmp_path_factory.mktemp("export") / "reward", *LORA)


@pytest.fixture(scope="session")
def stories_gguf(tmp_path_factory):
    """The trained model as a GGUF file in 8 bits."""
    pytest.importorskip("auto_round")
    from lightning_rlhf.export import export

    return export(str(STORIES), "gguf", "q8_0", tmp_path_factory.mktemp("gguf") / "stories")
