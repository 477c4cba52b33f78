"""``lightning-rlhf inspect``, from a shell's point of view."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lightning_rlhf.cli import cli, main
from lightning_rlhf.inspection.command import InspectCLI

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
#: Folders of configs of stages that sample.
ONLINE = ("ppo", "online_dpo", "grpo")
STAGES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in ("parallel", "collect"))
#: Configs whose tasks an environment makes, with the column that it reads.
MADE = {"smollm2_calculator": "answer", "smollm2_guess": "high"}


@pytest.fixture(autouse=True)
def columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def no_weights(tiny_model_dir, tmp_path):
    """The tiny model's tokenizer and config alone."""
    folder = tmp_path / "no-weights"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def small(path, model):
    reward = "lightning_rlhf.rewards.verifiers.length"
    rewards = json.dumps([{"source": reward}])  # GDPO wants a list
    few = [
        "--model.rollout.sampling.max_new_tokens",
        "8",
        "--model.reward",
        rewards if path.stem.endswith("gdpo") else reward,
    ]
    return [
        "inspect", "--config", str(path), "--model.pretrained", str(model), "--model.chat_template", "chatml",
        "--data.max_length", "256", "--data.on_bad_row", "skip",
        *(few if path.parent.name in ONLINE else []),
        *(["--data.train", "bundled"] if path.stem == "from_chat" else []),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "path", [path for path in STAGES if path.stem not in MADE], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_config_is_shown_without_a_model_or_trainer(path, no_weights, tmp_path, capsys):
    page = tmp_path / "inspect.html"
    main([*small(path, no_weights), "--rows", "2", "--html", str(page)])
    out = capsys.readouterr().out
    assert out.count("\nrow ") == 2 and "\nrow 0 · " in out and ".jsonl:" in out
    assert "<|im_start|>user⏎" in out and "padding avoided" in out and "too long; first" in out
    assert ("generation starts here" in out) == (path.parent.name in ONLINE)
    assert ("^~~~" in out) == (path.parent.name not in ONLINE) and ("rejected" in out) == (
        path.parent.name in ("reward", "dpo")
    )
    assert (" good, " in out) == (path.parent.name == "kto")
    assert "\x1b" not in out, "not a terminal"
    assert f"The same as a web page: {page}" in out and page.read_text(encoding="utf-8").count("<article>") == 2


@pytest.mark.parametrize("name", MADE)
def test_tasks_of_an_environment_are_shown(name, no_weights, capsys):
    main([*small(CONFIGS / "grpo" / f"{name}.yaml", no_weights), "--rows", "2"])
    out = capsys.readouterr().out
    assert out.count("\nrow ") == 2 and "generation starts here" in out and "left out or cut         none" in out
    assert out.count(f"\ncolumn {MADE[name]}: ") == 2


def test_prompts_are_shown_as_the_environment_begins_them(no_weights, capsys):
    arguments = small(CONFIGS / "grpo" / "smollm2_calculator.yaml", no_weights)
    counts = {}
    for shown in (True, False):
        flag = ["--model.environment.shown", str(shown).lower()]
        main([*arguments, *flag, "--rows", "2"])
        out = capsys.readouterr().out
        counts[shown] = [int(n) for n in re.findall(r"^row \d+ · Calculator\[\d+\] · (\d+) tokens$", out, re.MULTILINE)]
        assert len(counts[shown]) == 2 and "list[" not in out
        text = re.sub(r"\W", "", "".join(line[8:] for line in out.splitlines() if re.match(r"│ +\d+ │", line)))
        assert ("ThecalculatorreplieswithitsvalueThenanswer" in text and "60eggs" in text) == shown
        longest = int(re.search(r"tokens of a prompt .* max (\d+)", out)[1])
        assert longest >= max(counts[shown])
    example = counts[True][0] - counts[False][0]
    assert example > 40 and counts[True][1] - counts[False][1] == example
    main([*arguments, "--row", "Calculator[4]"])
    assert re.findall(r"^row \d+ · (\S+)", capsys.readouterr().out, re.MULTILINE) == ["Calculator[4]"]


def test_ptx_is_shown_beside_prompts(no_weights, capsys):
    main([*small(CONFIGS / "ppo" / "smollm2_lora.yaml", no_weights), "--data.ptx.source", "bundled", "--rows", "1"])
    out = capsys.readouterr().out
    assert (
        out.index("== prompts ==") < out.index("generation starts here") < out.index("== ptx ==") < out.index("^~~~~")
    )


def test_own_rows_split_and_choice(no_weights, tmp_path, capsys):
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"question {i}", "output": "fox"}) + "\n" for i in range(40)))
    sft = [*small(CONFIGS / "sft" / "smollm2_lora.yaml", no_weights), "--data.train", str(path)]
    main([*sft, "--row", "7"])
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("row ")]
    place = line.split(" · ")[1]
    assert line.startswith(f"row 7 · {path}:")
    main([*sft, "--row", place.rsplit("/")[-1]])
    assert line in capsys.readouterr().out.splitlines()
    main([*sft, "--split", "val", "--random", "3", "--rows", "1"])
    out = capsys.readouterr().out
    assert "SFT: InstructionDataModule, val" in out and out.count("\nrow ") == 1
    main([*sft, "--trainer.accumulate_grad_batches", "2", "--trainer.devices", "3", "--trainer.accelerator", "gpu"])
    assert "8 sequences, each dealt into 2 micro-batches x 3 ranks" in capsys.readouterr().out


def test_colors_are_for_terminals_that_want_them(no_weights, monkeypatch, capsys):
    arguments = [*small(CONFIGS / "sft" / "smollm2_lora.yaml", no_weights), "--rows", "1"]
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for environment, colored in (({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
        with monkeypatch.context() as context:
            context.delenv("NO_COLOR", raising=False)
            context.setenv("TERM", "xterm")
            for name, value in environment.items():
                context.setenv(name, value)
            main(arguments)
        out = capsys.readouterr().out
        assert ("\x1b[30;42m" in out) == colored != ("│^" in out)


def test_a_bad_row_is_named_by_file_and_line(no_weights, tmp_path, capsys):
    path = tmp_path / "my.jsonl"
    path.write_text('{"instruction": "a", "output": "fox"}\n{"instruction": "a", "output": ""}\n')
    arguments = [*small(CONFIGS / "sft" / "smollm2_lora.yaml", no_weights), "--data.train", str(path)]
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--data.on_bad_row", "raise"])
    assert str(stop.value.code).startswith(f"lightning-rlhf inspect: {path}:2: ")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--data.no_such_key", "1"], "no_such_key"),
        (["--no_such_option", "1"], "no_such_option"),
        (["--split", "dev"], "dev"),
        (["--rows", "-1"], "rows"),
    ],
)
def test_unknown_keys_and_values_are_refused_by_name(extra, message, no_weights, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*small(CONFIGS / "sft" / "smollm2_lora.yaml", no_weights), *extra])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--data.train", "nothing.jsonl"], "nothing.jsonl: no such file"),
        (["--model.pretrained", "no/such/folder"], "no/such/folder"),
        (["--data.max_length", "3"], "all 240 were skipped: 240 x too long (first: "),
        (["--row", "9999"], "There is no row 9999"),
        (["--split", "val", "--data.val_fraction", "0"], "There are no val rows"),
    ],
)
def test_what_cannot_be_shown_is_said_in_a_line(extra, message, no_weights):
    with pytest.raises(SystemExit) as stop:
        main([*small(CONFIGS / "sft" / "smollm2_lora.yaml", no_weights), *extra])
    assert str(stop.value.code).startswith("lightning-rlhf inspect: ") and message in str(stop.value.code)


def test_it_takes_what_fit_takes(no_weights, tmp_path, capsys):
    """All keys of a config that ``fit`` would have saved, ``ckpt_path`` among them."""
    path = CONFIGS / "sft" / "smollm2_lora.yaml"
    arguments = small(path, no_weights)[1:]
    with pytest.raises(SystemExit):
        main(["fit", *arguments, "--print_config"])
    saved = tmp_path / "config.yaml"
    saved.write_text(capsys.readouterr().out)
    keys = set(yaml.safe_load(saved.read_text()))
    assert {"ckpt_path", "trainer", "model", "data"} <= keys
    main(["inspect", "--config", str(saved), "--rows", "0", "--ckpt_path", "last"])
    out = capsys.readouterr().out
    assert "padding avoided" in out and "\nrow " not in out


def test_no_trainer_callback_or_strategy_is_made(no_weights):
    both = ["--config", str(CONFIGS / "parallel" / "zero2_offload.yaml")]
    made = cli([*small(CONFIGS / "sft" / "smollm2_lora.yaml", no_weights)[1:], *both], run=False, kind=InspectCLI)
    assert vars(made.trainer).keys() == {"micro_batches", "ranks"}
    assert not hasattr(made.model, "policy")
    initialized = {name: made.config_init.trainer[name] for name in ("strategy", "callbacks", "logger", "plugins")}
    assert set(initialized.values()) == {None}


@pytest.mark.parametrize(
    "devices, accelerator, ranks",
    [("2", "gpu", 4), ("[0, 1, 2]", "gpu", 6), ("0,3", "gpu", 4), ("auto", "cpu", 2), ("-1", "auto", 6)],
)
def test_ranks_are_devices_times_nodes(devices, accelerator, ranks, no_weights, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    trainer = ["--trainer.devices", devices, "--trainer.accelerator", accelerator, "--trainer.num_nodes", "2"]
    made = cli([*small(CONFIGS / "sft" / "smollm2_lora.yaml", no_weights)[1:], *trainer], run=False, kind=InspectCLI)
    assert made.trainer.ranks == ranks


@pytest.mark.parametrize("strategy", ["tp2_dp2.yaml", "sp2.yaml", "colossalai_hybrid", "tp2_pp2_zero1.yaml"])
def test_ranks_that_share_a_model_read_the_same_rows(strategy, no_weights):
    trainer = ["--trainer.devices", "4", "--trainer.strategy", strategy]
    if strategy.endswith(".yaml"):
        trainer = ["--config", str(CONFIGS / "parallel" / strategy), *trainer[:2]]
    made = cli([*small(CONFIGS / "sft" / "smollm2_lora.yaml", no_weights)[1:], *trainer], run=False, kind=InspectCLI)
    assert made.trainer.ranks == (1 if "pp2" in strategy else 2)


def test_help_explains_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["inspect", "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "usage: lightning-rlhf inspect" in out
    assert all(option in out for option in ("--rows", "--row ", "--random", "--split", "--html", "--data", "--trainer"))


@pytest.mark.slow
def test_colossalai_is_not_imported(no_weights):
    both = ["--config", str(CONFIGS / "parallel" / "gemini.yaml")]
    arguments = [*small(CONFIGS / "sft" / "smollm2_lora.yaml", no_weights), *both, "--rows", "1"]
    script = "import json, sys; from lightning_rlhf.cli import main; main(json.loads(sys.argv[1]))"
    script += "; assert not {'colossalai', 'peft', 'bitsandbytes'} & set(sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "padding avoided" in done.stdout
