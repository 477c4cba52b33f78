"""The command line, from a shell's point of view."""

import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys

import pytest
import torch
import yaml
from docstring_parser import parse

import lightning_rlhf
from lightning_rlhf import PPOModule
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


def test_a_weighted_reward_is_kept_by_a_run(tiny_model_dir, rows, tmp_path):
    parts = [
        {"source": "lightning_rlhf.rewards.functions.length_window", "weight": 0.5, "name": None},
        {"source": "lightning_rlhf.rewards.functions.length_window", "weight": -2.0, "name": "again"},
    ]
    main(
        [
            "fit", "--model", "PPOModule", "--model.pretrained", str(tiny_model_dir), "--model.reward",
            json.dumps(parts), "--model.sampling.max_new_tokens", "4", "--data", "PromptDataModule", "--data.train",
            rows, "--data.val_fraction", "0", "--trainer.max_steps", "1", "--trainer.accelerator", "cpu",
            "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(tmp_path), "--trainer.logger.name", "log",
            "--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false",
        ]
    )  # fmt: skip
    folder = tmp_path / "log" / "version_0"
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved["model"]["init_args"]["reward"] == parts
    assert yaml.safe_load((folder / "hparams.yaml").read_text())["reward"] == parts
    [checkpoint] = folder.rglob("*.ckpt")
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["reward"] == parts
    module = PPOModule.load_from_checkpoint(checkpoint)
    assert dict(zip(module.reward.names, module.reward.weights, strict=True)) == {"length_window": 0.5, "again": -2.0}
    # and the saved file is a run of its own
    main(["fit", "--config", str(folder / "config.yaml")])
    again = yaml.safe_load((tmp_path / "log" / "version_1" / "config.yaml").read_text())
    assert again["model"] == saved["model"]


def test_help_of_an_argument_is_not_that_of_an_attribute():
    """jsonargparse takes a docstring's Attributes for arguments, and the last of one name for its help."""
    clashes = []
    for found in pkgutil.walk_packages(lightning_rlhf.__path__, "lightning_rlhf."):
        if found.name.endswith("__main__"):
            continue
        module = importlib.import_module(found.name)
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__:
                entries = [e for c in cls.__mro__ if c.__module__.startswith("lightning_rlhf") for e in _documented(c)]
                arguments = {name for kind, name in entries if kind == "param"}
                clashes += [f"{name}.{a}" for kind, a in entries if kind == "attribute" and a in arguments]
    assert clashes == []


def _documented(cls):
    return [(e.args[0], name) for e in parse(cls.__doc__ or "").params for name in e.arg_name.split(", ")]


def test_help_of_ppo_says_what_its_arguments_are(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "PPOModule"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--model.kl_coef KL_COEF Weight of the KL penalty" in out
    assert "--model.reward+ REWARD Directory or hub id of a reward model; a function" in out


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
