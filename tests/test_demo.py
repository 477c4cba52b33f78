"""The demo at smoke size: what it prints, what it leaves behind, and that its config file is the same run."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf import demo
from lightning_rlhf.cli import main

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "sft" / "demo.yaml"
MEASURED = r"loss (\d+\.\d{3})  perplexity \d+\.\d{3}  token accuracy \d\.\d{3}"


@pytest.fixture
def arguments(tiny_model_dir, tmp_path):
    """What makes the demo small; ``out`` under tmp_path is where it writes."""
    rows = tmp_path / "my.jsonl"
    answers = ("fox", "dog", "the lazy dog")
    lines = [{"instruction": f"question {i}", "output": answers[i % 3]} for i in range(24)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--model", str(tiny_model_dir), "--output", str(tmp_path / "out"), "--steps", "2", "--train", str(rows)]


def test_demo_measures_trains_and_exports(arguments, tmp_path, capsys):
    demo.main(arguments)
    printed = capsys.readouterr().out
    [before] = re.findall(rf"before  {MEASURED}", printed)
    [after] = re.findall(rf"after   {MEASURED}", printed)
    assert before != after
    assert printed.index("loss before training") < printed.index(f"   loss {before}") < printed.index("Fine-tuning")
    lines = (tmp_path / "out" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [(row["step"], row["prompt"]) for row in map(json.loads, lines)]
    assert asked == [(step, prompt) for step in (0, 2) for prompt in demo.PROMPTS]

    [directory] = re.findall(r"AutoModelForCausalLM\.from_pretrained\('(.*)'\)", printed)
    assert Path(directory) == tmp_path / "out" / "hf" / "last"
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "question 1"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    answer = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert answer.shape[1] > ids.shape[1] and tokenizer.decode(answer[0])


def test_its_config_file_is_the_same_run(arguments, tiny_model_dir, tmp_path):
    main(["demo", *arguments])
    first, again = tmp_path / "out", tmp_path / "again"
    main(
        [
            "fit", "--config", str(CONFIG), "--model.pretrained", str(tiny_model_dir), "--data.train", arguments[-1],
            "--trainer.max_steps", "2", "--trainer.default_root_dir", str(again),
            "--trainer.logger.init_args.save_dir", str(again),
        ]
    )  # fmt: skip
    want, got = (load_file(folder / "hf" / "last" / "model.safetensors") for folder in (first, again))
    assert want.keys() == got.keys()
    assert [name for name in want if not want[name].equal(got[name])] == []
    assert losses(again) == losses(first) and len(losses(first)) == 2
    assert (again / "samples.jsonl").read_text() == (first / "samples.jsonl").read_text()
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    # what was put in above, and the demo's own default of it
    assert config["data"]["init_args"]["train"] == "bundled"
    assert config["trainer"]["max_steps"] == 30
    assert config["trainer"]["default_root_dir"] == config["trainer"]["logger"]["init_args"]["save_dir"] == "runs/demo"


def losses(folder):
    with (folder / "log" / "version_0" / "metrics.csv").open() as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
