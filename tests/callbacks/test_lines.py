"""Progress in lines."""

import re

import lightning.pytorch as L

from lightning_rlhf import InstructionDataModule, SFTModule
from lightning_rlhf.callbacks.lines import Lines

ROWS = [{"instruction": f"question {i}", "output": "fox"} for i in range(40)]


def test_a_line_is_printed_each_quarter_of_each_run(tiny_model_dir, tmp_path, capsys):
    for steps in (8, 2):
        trainer = L.Trainer(
            max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[Lines()],
            default_root_dir=tmp_path, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(SFTModule(tiny_model_dir), InstructionDataModule(ROWS, batch_size=4, val_fraction=0.0))
    out = capsys.readouterr().out
    assert re.findall(r"^   step (\d+) of (\d+), \d+ s$", out, re.MULTILINE) == [
        ("2", "8"), ("4", "8"), ("6", "8"), ("8", "8"), ("1", "2"), ("2", "2")
    ]  # fmt: skip
    assert "\r" not in out
