"""The command line, from a shell's point of view."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from lightning_rlhf.cli import TOOLS, cli, main

ROWS = [
    {"instruction": f"question {i}", "output": "fox dog"[: 3 + i % 4]} for i in range(12)
]  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    return str(path)


def arguments(command, model, rows, out):
    return [
        command, "--model", "SFTModule", "--model.pretrained", str(model), "--data", "InstructionDataModule",
        "--data.train", rows, "--trainer.accelerator", "cpu", "--trainer.default_root_dir", str(out),
        "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_trainer_methods_run_with_bare_class_names(command, tiny_model_dir, rows, tmp_path, capsys):
    extra = ["--trainer.max_steps", "1", "--trainer.enable_checkpointing", "false"] if command == "fit" else []
    cli([*arguments(command, tiny_model_dir, rows, tmp_path), *extra])
    assert (tmp_path / "predictions.jsonl").exists() == (command == "predict")


def test_help_names_commands_and_tools(capsys):
    for args in ([], ["--help"]):
        main(args)
        out = capsys.readouterr().out
        assert all(word in out for word in ("fit", "validate", "predict", *TOOLS))


def test_module_help_explains_its_arguments(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model.help", "SFTModule"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "chat_template" in out and "Hugging Face directory, hub id" in out


def test_print_config_is_yaml_with_every_key(tiny_model_dir, rows, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([*arguments("fit", tiny_model_dir, rows, tmp_path), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["class_path"] == "lightning_rlhf.stages.sft.SFTModule" or "SFTModule" in str(config["model"])
    assert config["data"]["init_args"]["train"] == rows


def test_python_dash_m(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lightning_rlhf", "--version"],
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout.strip()


@pytest.mark.parametrize("command", ["fit", "inspect"])
@pytest.mark.parametrize(
    "setting, words",
    [
        (["--model.pretrained", "runs/none"], "runs/none is no directory here ("),
        (
            ["--model.pretrained", "runs/sft"],
            "runs/sft holds no model: there is no config.json in it; perhaps runs/sft/hf/best is meant.",
        ),
        (["--model.z_loss", "-1"], "Neither may be negative: z_loss=-1.0"),
        (["--data.batch_size", "0"], "batch_size must be at least 1, got 0."),
    ],
    ids=["no such model", "a run's folder", "model", "data"],
)
def test_settings_of_which_nothing_can_be_made_are_told_in_a_line(
    command, setting, words, tiny_model_dir, rows, tmp_path, monkeypatch
):
    (tmp_path / "runs" / "sft" / "hf").mkdir(parents=True)
    (tmp_path / "runs" / "sft" / "hf" / "best").symlink_to(tiny_model_dir)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([*arguments(command, tiny_model_dir, rows, tmp_path), *setting])
    assert str(stop.value.code).startswith(f"lightning-rlhf {command}: {words}")


@pytest.mark.parametrize(
    "text, words",
    [
        (None, "my.jsonl: no such file or directory"),
        ('{"instruction": "one"}\n', "my.jsonl:1: "),
    ],
)
def test_bad_data_is_told_in_a_line(text, words, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text:
        (tmp_path / "my.jsonl").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main([*arguments("fit", tiny_model_dir, "my.jsonl", tmp_path), "--data.val_fraction", "0"])
    assert str(stop.value.code).startswith("lightning-rlhf fit: ") and words in stop.value.code


def test_lightnings_own_refusals_are_told_in_a_line(tiny_model_dir, rows, tmp_path):
    with pytest.raises(SystemExit, match=r"lightning-rlhf fit: .*profiler"):
        main([*arguments("fit", tiny_model_dir, rows, tmp_path), "--trainer.profiler", "none such"])


def test_other_errors_keep_their_traceback(tiny_model_dir, rows, tmp_path):
    (tmp_path / "broken.ckpt").write_text("no checkpoint")
    with pytest.raises(Exception, match=r"(?i)pickle|unpickl|weights_only|zip|load"):
        main([*arguments("fit", tiny_model_dir, rows, tmp_path), "--ckpt_path", str(tmp_path / "broken.ckpt")])
