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
from lightning_rlhf.config_files import folder

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


@pytest.mark.parametrize(
    "key, value, meant",
    [
        ("model.kl.target", "null", None),
        ("model.rollout.max_total_tokens", "null", None),
        ("model.critic.pretrained", "null", None),
        ("model.tokenizer", "null", None),
        ("data.cache_dir", "null", None),
        ("model.critic.pretrained", "runs/a", "runs/a"),
        ("model.rollout.sampling.stop_strings", r'["\n", "it\u0027s"]', ["\n", "it's"]),
    ],
)
def test_a_value_of_the_shell_is_what_a_file_would_make_of_it(key, value, meant, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *PPO, f"--{key}", value, "--print_config"])
    assert stop.value.code == 0
    section, *names = key.split(".")
    found = yaml.safe_load(capsys.readouterr().out)[section]["init_args"]
    for name in names:
        found = found[name]
    assert found == meant


@pytest.mark.parametrize(
    "setting, value, words",
    [
        (
            "strategy",
            "zero2",
            "trainer.strategy: there is no strategy zero2; did you mean colossalai_zero2? All: auto",
        ),
        ("strategy", "dpp", "trainer.strategy: there is no strategy dpp; did you mean ddp? All: auto, "),
        ("accelerator", "cuda_x", "You selected an invalid accelerator name: `accelerator='cuda_x'`. Available names "),
        ("devices", "two", "`devices` selected with `CPUAccelerator` should be an int > 0."),
    ],
)
def test_hardware_that_there_is_not_is_told_in_a_line(setting, value, words, tiny_model_dir, rows, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([*arguments("fit", tiny_model_dir, rows, tmp_path), f"--trainer.{setting}", value])
    assert stop.value.code.startswith(f"lightning-rlhf fit: {words}") and "\n" not in stop.value.code


def test_a_weighted_reward_is_kept_by_a_run(tiny_model_dir, rows, tmp_path):
    parts = [
        {"source": "lightning_rlhf.rewards.verifiers.length", "weight": 0.5, "name": None, "options": None},
        {"source": "lightning_rlhf.rewards.verifiers.length", "weight": -2.0, "name": "again", "options": {"high": 50}},
    ]
    main(
        [
            "fit", "--model", "PPOModule", "--model.pretrained", str(tiny_model_dir), "--model.reward",
            json.dumps(parts), "--model.rollout.sampling.max_new_tokens", "4", "--data", "PromptDataModule",
            "--data.train", rows, "--data.val_fraction", "0",
            "--trainer.max_steps", "1", "--trainer.accelerator", "cpu",
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
    assert dict(zip(module.reward.names, module.reward.weights, strict=True)) == {"length": 0.5, "again": -2.0}
    # and the saved file is a run of its own
    main(["fit", "--config", str(folder / "config.yaml")])
    again = yaml.safe_load((tmp_path / "log" / "version_1" / "config.yaml").read_text())
    assert again["model"] == saved["model"]


def test_help_of_an_argument_is_not_that_of_an_attribute():
    """jsonargparse takes Attributes for arguments: of one name the last holds, that of a class before its base's."""
    clashes = []
    for found in pkgutil.walk_packages(lightning_rlhf.__path__, "lightning_rlhf."):
        if found.name.endswith("__main__"):
            continue
        try:
            module = importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            assert error.name == "datatrove"  # its extra alone has it
            continue
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__:
                ours = [c for c in reversed(cls.__mro__) if c.__module__.startswith("lightning_rlhf")]
                entries = [entry for c in ours for entry in _documented(c)]
                arguments = {name for name, kind in entries if kind == "param"}
                clashes += [f"{name}.{a}" for a, kind in dict(entries).items() if a in arguments and kind != "param"]
    assert clashes == []


def _documented(cls):
    return [(name, e.args[0]) for e in parse(cls.__doc__ or "").params for name in e.arg_name.split(", ")]


def test_help_of_ppo_says_what_its_arguments_are(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--model.help", "PPOModule"])
    out = " ".join(capsys.readouterr().out.split())
    assert "--model.kl.coef COEF Weight of the penalty" in out
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
        (["--model.pretrained", "org/none"], "org/none is not a directory in "),
        (["--model.pretrained", "runs/none"], "There is no directory runs/none."),
        (
            ["--model.pretrained", "runs/sft"],
            "runs/sft is not a model: it has no config.json; did you mean runs/sft/hf/best?",
        ),
        (["--model.z_loss", "-1"], "Neither may be negative: z_loss=-1.0"),
        (["--data.batch_size", "0"], "batch_size must be at least 1, got 0."),
    ],
    ids=["no such model", "no such path", "a run's folder", "model", "data"],
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


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("micro_batches", "0", "micro_batches must be a whole number from 1 on; got 0."),
        ("sp", "2", "pp and sp do not go together"),
        ("plugin", "gemini", "pp deals layers to ranks"),
        ("checkpoint", "sharded", "checkpoint='sharded' is for whole models"),
    ],
)
def test_settings_of_a_strategy_are_refused_in_a_line(key, value, words, tiny_model_dir, rows, tmp_path):
    """Its key takes names too, and jsonargparse would say that an object is not a name."""
    pipeline = ["--config", str(folder() / "parallel" / "pp2.yaml"), f"--trainer.strategy.init_args.{key}", value]
    with pytest.raises(SystemExit) as stop:
        main([*arguments("fit", tiny_model_dir, rows, tmp_path), *pipeline])
    assert stop.value.code.startswith(f"lightning-rlhf fit: {words}")


def test_what_is_refused_once_a_run_starts_is_told_in_a_line(tiny_model_dir, rows, tmp_path):
    pipeline = ["--config", str(folder() / "parallel" / "pp2.yaml"), "--trainer.accelerator", "cpu"]
    options = ["--trainer.devices", "1", "--trainer.precision", "32-true"]
    with pytest.raises(SystemExit) as stop:
        main([*arguments("fit", tiny_model_dir, rows, tmp_path), *pipeline, *options])
    assert stop.value.code.startswith("lightning-rlhf fit: pp=2 does not divide the 1 processes of the run")


def test_errors_of_values_within_libraries_keep_their_traceback(tiny_model_dir, rows, tmp_path, monkeypatch):
    exec(
        compile("def broken(self):\n    int('none')", lightning_rlhf.cli.__file__, "exec"), made := {}
    )  # a line of ours
    monkeypatch.setattr("lightning_rlhf.stages.sft.SFTModule.configure_model", made["broken"])
    with pytest.raises(ValueError, match="invalid literal"):
        main(arguments("fit", tiny_model_dir, rows, tmp_path))


def test_other_errors_keep_their_traceback(tiny_model_dir, rows, tmp_path, monkeypatch):
    def broken(self):
        raise KeyError("a fault of ours")

    monkeypatch.setattr("lightning_rlhf.stages.sft.SFTModule.configure_model", broken)
    with pytest.raises(KeyError, match="a fault of ours"):
        main(arguments("fit", tiny_model_dir, rows, tmp_path))


def test_a_broken_checkpoint_is_named_in_a_line(tiny_model_dir, rows, tmp_path):
    (tmp_path / "broken.ckpt").write_text("no checkpoint")
    with pytest.raises(
        SystemExit, match=r"^lightning-rlhf fit: .*broken.ckpt is not a checkpoint, or it is damaged: .*$"
    ):
        main([*arguments("fit", tiny_model_dir, rows, tmp_path), "--ckpt_path", str(tmp_path / "broken.ckpt")])


# ------------------------------------------------------------------------------------------------- wrong words

SFT = ["--model", "SFTModule", "--model.pretrained", "a/b", "--data", "InstructionDataModule", "--data.train", "c"]
KTO = ["--model", "KTOModule", "--model.pretrained", "a/b", "--data", "UnpairedDataModule", "--data.train", "c"]
PPO = ["--model", "PPOModule", "--model.pretrained", "a/b", "--model.reward", "d", "--data", "PromptDataModule"]
ALL = (
    "All: fit, validate, test, predict, inspect, plan, configs, demo, collect, data, score-reference, verify, "
    "win-rate, quantize, export, serve, chat, report"
)


@pytest.fixture
def told(capsys):
    """Runs a command that must end with the status of wrong usage; the one line that it leaves."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        out, error = capsys.readouterr()
        assert out == "" and error.count("\n") == 1
        return error.rstrip("\n")

    return run


@pytest.mark.parametrize(
    "word, answer",
    [
        ("fitt", f"there is no command fitt; did you mean fit? {ALL}"),
        ("winrate", f"there is no command winrate; did you mean win-rate? {ALL}"),
        ("xyz", f"there is no command xyz. {ALL}"),
    ],
)
def test_wrong_commands_are_told_with_all_commands(word, answer, told):
    assert told(word) == f"lightning-rlhf: {answer}"


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "inspect"])
@pytest.mark.parametrize(
    "arguments, answer",
    [
        ([*SFT, "--trainer.max_step", "5"], "there is no trainer.max_step; did you mean trainer.max_steps?"),
        ([*SFT, "--modle.lora.r", "5"], "there is no modle.lora.r; did you mean model.lora.r?"),
        ([*SFT, "--model.loraa.r", "5"], "there is no model.loraa.r; did you mean model.lora.r?"),
        ([*SFT, "--model.lora.rr", "5"], "there is no model.lora.rr; did you mean model.lora.r?"),
        ([*SFT, "--model.lora.rank", "8"], "there is no model.lora.rank; did you mean model.lora.r?"),
        (
            [*SFT, "--model.lora.scaling", "8"],
            "there is no model.lora.scaling; --model.help SFTModule --model.lora.help lists all.",
        ),
        ([*SFT, "--data.tain", "x"], "there is no data.tain; did you mean data.train?"),
        ([*SFT, "--model.kl_coef", "1"], "there is no model.kl_coef; --model.help SFTModule lists all."),
        (
            ["--model.pretrained", "x", *SFT],
            "there is no model.pretrained; give its class first: --model CLASS (class_path in a file).",
        ),
        ([*SFT, "--nothing", "1"], "there is no nothing; --help lists all."),
        (
            [*PPO, "--model.rollout.sampling.max_new_token", "3"],  # was taken for max_new_tokens
            "there is no model.rollout.sampling.max_new_token; did you mean model.rollout.sampling.max_new_tokens?",
        ),
        (
            [*SFT, "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lrr", "1"],
            "there is no model.optimizer.lrr; did you mean model.optimizer.lr?",
        ),
        (
            [*SFT, "--trainer.callbacks+=EMA", "--trainer.callbacks.decy", "0.9"],
            "there is no trainer.callbacks.decy; did you mean trainer.callbacks.decay?",
        ),
        ([*PPO, "--model.kl_coef", "1"], "model.kl_coef is model.kl.coef now (docs/moving.md)"),
        (
            [*KTO, "--model.reference_update.every", "3"],
            "there is no model.reference_update: the reference of this stage stays where training starts. Leave it "
            "out, or train with DPOModule, whose reference can move.",
        ),
        ([*SFT, "--model.quantization", "nf4"], "model.quantization is model.load.quantization now (docs/moving.md)"),
        (
            [*PPO, "--model.critic", "runs/reward/hf/best"],
            "model.critic is a group of settings, got runs/reward/hf/best: set model.critic.NAME, see "
            "--model.help PPOModule",
        ),
        (["--model", "SFTMod"], "model: there is no class SFTMod; did you mean SFTModule?"),
        ([*SFT, "--trainer.callbacks+=EMAs"], "trainer.callbacks: there is no class EMAs; did you mean EMA?"),
        ([*SFT, "--trainer.max_steps", "x"], "trainer.max_steps: expected int, got x"),
        (
            [*SFT, "configs/sft/mine.yaml"],
            "configs/sft/mine.yaml does not belong to an option; write --config configs/sft/mine.yaml",
        ),
        (
            ["--config", str(folder() / "dpo" / "smollm2_lora.yml")],
            f"config: there is no file {folder()}/dpo/smollm2_lora.yml; did you mean smollm2_lora.yaml?",
        ),
        ([*SFT, "--model.load.dtype", "half"], "model.load.dtype: expected float32, bfloat16, float16, got half"),
        (
            ["--config", "/dpo/x.yaml"],
            "config: there is no file /dpo/x.yaml; `lightning-rlhf configs` lists those that are shipped",
        ),
        (
            [*SFT, "d.jsonl"],
            "d.jsonl does not belong to an option; quote patterns ('*.jsonl'), and write several files as "
            "'[a.jsonl, b.jsonl]'",
        ),
    ],
    ids=lambda value: value[-2] if isinstance(value, list) else "",
)
def test_wrong_arguments_are_told_in_a_line(command, arguments, answer, told):
    assert told(command, *arguments) == f"lightning-rlhf {command}: {answer}"


@pytest.mark.parametrize("command", ["fit", "predict", "inspect"])
@pytest.mark.parametrize(
    "text, answer",
    [
        ("seed_everythin: 3", "{}, line 1: there is no seed_everythin; did you mean seed_everything?"),
        ("trainer:\n  max_step: 3", "{}, line 2: there is no trainer.max_step; did you mean trainer.max_steps?"),
        (
            "# a\nmodel:\n  init_args:\n    sed: a",
            "{}, line 4: there is no model.sed; did you mean model.seed?",
        ),
        (
            "model:\n  init_args:\n    lora:\n      r: 8\n      rr: 3",
            "{}, line 5: there is no model.lora.rr; did you mean model.lora.r?",
        ),
        (
            "model: {init_args: {rollout: {sampling: {max_new_token: 3}}}}",
            "{}, line 1: there is no model.rollout.sampling.max_new_token; did you mean "
            "model.rollout.sampling.max_new_tokens?",
        ),
        (
            "model:\n  init_args:\n    reward:\n    - source: a\n      weigth: 3",
            "{}, line 5: there is no model.reward.weigth; did you mean model.reward.weight?",
        ),
        (
            "trainer:\n  callbacks:\n  - class_path: EMA\n    init_args:\n      decy: 1",
            "{}, line 5: there is no trainer.callbacks.decy; did you mean trainer.callbacks.decay?",
        ),
        (
            "data:\n  init_args:\n    batch_size: x",
            "{}, line 3: data.batch_size: expected int, got x",
        ),
        ("model: [a", "{}: Problems parsing config: "),
        ("text", "{}: Unexpected config: text"),
    ],
)
def test_wrong_keys_of_a_file_are_told_with_their_line(command, text, answer, told, tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "my.yaml").write_text(text)
    (tmp_path / "first.yaml").write_text("model:\n  class_path: PPOModule\n  init_args: {pretrained: a/b, reward: c}\n")
    monkeypatch.chdir(tmp_path)
    found = told(command, "--config", "first.yaml", "--data", "PromptDataModule", "--config", "own/my.yaml")
    assert found.startswith(f"lightning-rlhf {command}: {answer.format('own/my.yaml')}")


def test_what_must_be_given_is_named(told):
    assert told("fit") == "lightning-rlhf: give --data and --model, or a --config that has it"
    assert told("fit", "--model", "SFTModule", "--data", "InstructionDataModule", "--data.train", "a") == (
        "lightning-rlhf: give --model.pretrained, or a --config that has it"
    )


@pytest.mark.parametrize(
    "arguments, answer",
    [
        (
            ["configs", "ppo/smollm_lora.yaml"],
            "there is no config ppo/smollm_lora.yaml; did you mean ppo/smollm2_lora.yaml? `lightning-rlhf configs` "
            "lists all.",
        ),
        (["demo", "--step", "3"], "there is no option --step; did you mean --steps?"),
        (["demo", "sftt"], "there is no stage sftt; did you mean sft? All: sft, dpo, reward, ppo"),
        (
            ["win-rate", "a", "b", "--judge", "c", "--promts", "d"],
            "there is no option --promts; did you mean --prompts?",
        ),
        (["report", "a", "--tittle=b"], "there is no option --tittle; did you mean --title?"),
        (["report"], "the following arguments are required: RUN"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_options_of_tools_are_told_in_a_line(arguments, answer, told):
    assert told(*arguments) == f"lightning-rlhf {arguments[0]}: {answer}"


def test_configs_are_listed_and_copied_but_never_over_a_file(told, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["configs"])
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert listed["sft/smollm2_lora.yaml"] == "SmolLM2-135M-Instruct with LoRA: a laptop CPU is enough"
    assert listed["grpo/smollm2_dr_grpo.yaml"].startswith("Dr. GRPO: ")
    assert listed["parallel/sp2.yaml"].endswith("whose activations do not fit into one GPU"), "a sentence of two lines"
    for arguments in (["sft/smollm2_lora.yaml"], ["configs/sft/smollm2_lora.yaml", "mine"]):
        main(["configs", *arguments])
    assert capsys.readouterr().out.split() == ["configs/sft/smollm2_lora.yaml", "mine/sft/smollm2_lora.yaml"]
    copy = tmp_path / "configs/sft/smollm2_lora.yaml"
    assert copy.read_bytes() == (folder() / "sft/smollm2_lora.yaml").read_bytes()
    copy.write_text("mine")
    assert "configs/sft/smollm2_lora.yaml exists" in told("configs", "sft/smollm2_lora.yaml")
    assert copy.read_text() == "mine"


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", *TOOLS])
def test_help_is_for_people(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: lightning-rlhf {'[options] ' if command not in TOOLS else ''}{command} ")
    assert "Args:" not in out and "args:" not in out and "Raises:" not in out


@pytest.mark.parametrize("command", ["fit", "demo"])
def test_ctrl_c_where_nothing_runs_yet_is_one_line_and_its_status(command, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lightning_rlhf.cli.cli", interrupted)
    monkeypatch.setattr("lightning_rlhf.demo.main", interrupted)
    with pytest.raises(SystemExit) as end:
        main([command])
    assert end.value.code == 130 and capsys.readouterr().err == "SIGINT: stopped.\n"
