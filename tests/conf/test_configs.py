"""Every shipped config is parsed, and run for a step with a tiny model and the CPU put in."""

from pathlib import Path

import pytest

from lightning_rlhf.cli import cli

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_config_runs_a_step(path, tiny_model_dir, tmp_path):
    online = path.parent.name == "ppo"
    few = ["--model.sampling.max_new_tokens", "8", "--model.reward", "lightning_rlhf.rewards.functions.length_window"]
    cli(
        [
            "fit", "--config", str(path), "--model.pretrained", str(tiny_model_dir), "--model.dtype", "float32",
            "--model.chat_template", "chatml", "--data.max_length", "256", "--data.on_bad_row", "skip",
            "--data.batch_size", "4", "--data.val_fraction", "0.05", "--trainer.accelerator", "cpu",
            "--trainer.devices", "1", "--trainer.strategy", "auto", "--trainer.precision", "32-true",
            "--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path), "--trainer.logger", "false",
            "--trainer.limit_val_batches", "2", "--trainer.enable_progress_bar", "false",
            *(few if online else []),
        ]
    )  # fmt: skip
    assert list(tmp_path.rglob("config.json")), "no Hugging Face directory was exported"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
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
