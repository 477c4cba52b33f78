"""Between the lines of commands stand none of libraries, and no carriage returns where output is no terminal."""

import json
import os
import subprocess
import sys

import pytest

FUNCTION = "lightning_rlhf.rewards.verifiers.length"
SCRIPT = """
import json, os, sys
from lightning_rlhf.cli import main
for number, arguments in enumerate(json.loads(sys.argv[1])):
    print(f"== {number}", flush=True)
    main(arguments)
print(os.environ["OMP_WAIT_POLICY"])
"""


#: A run of Python's: only the Trainer's own lines, and a warning of ours.
PYTHON = """
import sys
import lightning.pytorch as L
from lightning_rlhf import HFExport, InstructionDataModule, LoRA, SFTModule
module = SFTModule(sys.argv[1], lora=LoRA(r=2))
data = InstructionDataModule("rows.jsonl", batch_size=4)
trainer = L.Trainer(accelerator="cpu", max_steps=1, log_every_n_steps=1, callbacks=[HFExport(monitor="val/loss")])
trainer.fit(module, data)
"""
FOREIGN = ("Tip:", "Warning:", "deprecat", "site-packages", "kernels-community", "Loading weights", "litlogger")


@pytest.fixture(scope="module")
def printed(tiny_model_dir, tmp_path_factory):
    """What each command printed into one file, and the value of OMP_WAIT_POLICY that torch found."""
    folder = tmp_path_factory.mktemp("quiet")
    rows = [{"instruction": f"question {i}", "output": "fox dog"[: 3 + i % 4]} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"question {i}", "chosen": "fox", "rejected": "dog"} for i in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    trainer = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "2", "--trainer.default_root_dir", "run"]
    sft = ["--model", "SFTModule", "--data", "InstructionDataModule", "--data.train", "rows.jsonl"]
    rm = ["--model", "RewardModule", "--data", "PreferenceDataModule", "--data.train", "pairs.jsonl"]
    ppo = ["--model", "PPOModule", "--model.reward", FUNCTION, "--data", "PromptDataModule", "--data.train"]
    model = ["--model.pretrained", str(tiny_model_dir), "--data.val_fraction", "0.3", "--data.batch_size", "4"]
    lora = ["--model.lora", "{r: 2}", "--trainer.callbacks+=HFExport", "--trainer.callbacks.when", "end"]
    runs = {
        "fit sft": ["fit", *sft, *model, *lora, *trainer],
        "fit reward": ["fit", *rm, *model, *trainer],
        "fit ppo": ["fit", *ppo, "rows.jsonl", "--model.rollout.sampling.max_new_tokens", "4", *model, *trainer],
        "validate": ["validate", *sft, *model, *trainer],
        "predict": ["predict", *sft, *model, *trainer],
        "inspect": ["inspect", *sft, *model, "--rows", "1"],
        "win-rate": ["win-rate", str(tiny_model_dir), str(tiny_model_dir), "--judge", FUNCTION, "--prompts",
                     "rows.jsonl", "--limit", "2", "--max-new-tokens", "4"],
        "report": ["report", "run"],
    }  # fmt: skip
    # as from a shell: what conftest.py sets is the commands' own business
    ours = ("OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM", "PYTHONWARNINGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    texts = []
    for command in (["-c", SCRIPT, json.dumps(list(runs.values()))], ["-c", PYTHON, str(tiny_model_dir)]):
        with (folder / "out").open("wb") as out:
            done = subprocess.run([sys.executable, *command], stdout=out, stderr=subprocess.STDOUT, cwd=folder,
                                  env=environment, timeout=280)  # fmt: skip
        texts.append((folder / "out").read_bytes().decode())
        assert done.returncode == 0, texts[-1][-4000:]
    *parts, last = texts[0].split("== ")[1:]
    last, policy = last.rstrip().rsplit("\n", 1)
    return dict(zip([*runs, "python"], [*parts, last, texts[1]], strict=True)), policy


@pytest.mark.parametrize(
    "command", ["fit sft", "fit reward", "fit ppo", "validate", "predict", "inspect", "win-rate", "report"]
)
def test_a_command_prints_no_lines_of_libraries_and_no_carriage_returns(command, printed):
    text = printed[0][command]
    assert "\r" not in text
    assert [line for line in text.splitlines() if any(word in line for word in FOREIGN)] == []
    assert len(text.splitlines()) > 1, "it says something of its own"


def test_python_prints_no_lines_of_libraries_and_our_warnings_without_their_source(printed):
    text = printed[0]["python"]
    assert "\r" not in text
    found = [line for line in text.splitlines() if any(word in line for word in FOREIGN)]
    assert len(found) == 1 and found[0].startswith("Warning: HFExport: no 'best' was written: no validation was due")


def test_torch_waits_passively(printed):
    assert printed[1] == "PASSIVE"
