"""Every shipped config is parsed, and run for a step with a tiny model and the CPU put in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_rlhf.cli import cli
from lightning_rlhf.strategies import ColossalAIStrategy

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))
PARALLEL = [path for path in FILES if path.parent.name == "parallel"]
STAGES = [path for path in FILES if path not in PARALLEL]


def name(path):
    return str(path.relative_to(CONFIGS))


@pytest.fixture(autouse=True)
def no_command_line(monkeypatch):
    """Lightning warns where a call has arguments and the process has too."""
    monkeypatch.setattr(sys, "argv", ["lightning-rlhf"])


def options(model_dir, out, stage, trainer=("--trainer.strategy", "auto", "--trainer.precision", "32-true")):
    """What makes a stage's config small enough to run here."""
    few = ["--model.sampling.max_new_tokens", "8", "--model.reward", "lightning_rlhf.rewards.functions.length_window"]
    return [
        "--model.pretrained", str(model_dir), "--model.dtype", "float32",
        "--model.chat_template", "chatml", "--data.max_length", "256", "--data.on_bad_row", "skip",
        "--data.batch_size", "4", "--data.val_fraction", "0.05", "--trainer.accelerator", "cpu",
        "--trainer.devices", "1", "--trainer.num_nodes", "1", *trainer,
        "--trainer.max_steps", "1", "--trainer.default_root_dir", str(out), "--trainer.logger", "false",
        "--trainer.limit_val_batches", "2", "--trainer.enable_progress_bar", "false",
        *(few if stage == "ppo" else []),
    ]  # fmt: skip


@pytest.mark.parametrize("path", STAGES, ids=name)
def test_config_runs_a_step(path, tiny_model_dir, tmp_path):
    if yaml.safe_load(path.read_text())["model"]["init_args"].get("quantization"):
        pytest.importorskip("bitsandbytes", reason="bitsandbytes isn't installed")
    cli(["fit", "--config", str(path), *options(tiny_model_dir, tmp_path, path.parent.name)])
    found = {file.name for file in tmp_path.rglob("*config.json")}
    assert found & {"config.json", "adapter_config.json"}, "no Hugging Face directory was exported"


@pytest.mark.parametrize("path", PARALLEL, ids=name)
def test_parallel_config_wins_over_each_stage(path, tiny_model_dir, tmp_path):
    text = yaml.safe_load(path.read_text())
    assert list(text) == ["trainer"], "it describes parallelism alone"
    wanted = text["trainer"]
    # the last one has a strategy, devices and a precision of its own
    for stage in ("sft/smollm2_lora", "reward/smollm2_lora", "ppo/smollm2_lora", "sft/llama2_13b_full"):
        own = CONFIGS / f"{stage}.yaml"
        both = ["--config", str(own), "--config", str(path)]
        made = cli([*both, *options(tiny_model_dir, tmp_path, own.parent.name, trainer=())], run=False)
        trainer, strategy = made.trainer, wanted["strategy"]
        assert trainer.precision == wanted["precision"]
        assert isinstance(trainer.strategy, ColossalAIStrategy) == isinstance(strategy, dict)
        for key, value in strategy["init_args"].items() if isinstance(strategy, dict) else ():
            assert getattr(trainer.strategy, "plugin_name" if key == "plugin" else key) == value
        stages_own = yaml.safe_load(own.read_text())
        assert made.config.model.class_path.endswith(stages_own["model"]["class_path"])
        assert len(made.config.trainer.callbacks) == len(stages_own["trainer"]["callbacks"])


def test_parallel_configs_run_a_step(tiny_model_dir, tmp_path):
    # ColossalAI's CPU mode replaces parts of it, and a process group stays: all in one process that isn't this one
    pairs = [("sft", path) for path in PARALLEL] + [("ppo", CONFIGS / "parallel" / "gemini_offload.yaml")]
    # generation in bf16 is slow on a CPU
    callbacks = [{"class_path": "HFExport"}]
    callbacks += [{"class_path": "SampleCompletions", "init_args": {"num_prompts": 1, "max_new_tokens": 4}}]
    outs = [tmp_path / f"{stage}_{path.stem}" for stage, path in pairs]
    runs = []
    for (stage, path), out in zip(pairs, outs, strict=True):
        both = ["--config", str(CONFIGS / stage / "smollm2_lora.yaml"), "--config", str(path)]
        small = options(tiny_model_dir, out, stage, trainer=("--trainer.callbacks", json.dumps(callbacks)))
        runs.append(["fit", *both, *small])
    script = "import json, sys; from lightning_rlhf.cli import main; [main(args) for args in json.loads(sys.argv[1])]"
    done = subprocess.run([sys.executable, "-c", script, json.dumps(runs)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert [out.name for out in outs if not list(out.rglob("config.json"))] == []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_key_is_explained(path):
    unexplained = []
    for line in path.read_text().splitlines():
        value = line.split(":", 1)[1].strip() if ":" in line and not line.lstrip().startswith("#") else ""
        if value and "#" not in value and "class_path" not in line:
            unexplained.append(line.strip())
    # what the name says in full
    plain = "accelerator devices lr betas default_root_dir strategy max_epochs log_every_n_steps monitor"
    plain += " max_new_tokens val_fraction precision chat_template"
    allowed = tuple(f"{key}:" for key in plain.split())
    assert [x for x in unexplained if not x.startswith(allowed)] == []
