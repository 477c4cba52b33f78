"""``lightning-rlhf plan``, from a shell's point of view."""

import contextlib
import logging
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import GPT2Config

from lightning_rlhf import SFTModule
from lightning_rlhf.cli import main
from lightning_rlhf.plan import Device, Layout, Planner, Settings
from lightning_rlhf.plan.command import count_devices, parse_memory, strategy_arguments

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def no_weights(tiny_model_dir, tmp_path):
    """The tiny model's tokenizer and config alone."""
    folder = tmp_path / "no-weights"
    shutil.copytree(tiny_model_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def sft(model, *more):
    config = ["--config", str(CONFIGS / "sft" / "smollm2_lora.yaml"), "--model.pretrained", str(model)]
    return ["plan", *config, "--model.chat_template", "chatml", "--data.max_length", "64", *more]


def test_it_tells_parts_and_speed(no_weights, capsys):
    main(sft(no_weights, "--devices", "1", "--memory", "1GB"))
    out = capsys.readouterr().out
    assert "one device; 1 x 953.7 MiB; 32-true; checkpointing off" in out and "It fits." in out
    parts = dict(re.findall(r"^  (\w+) +([\d.,]+) MiB$", out, re.M))
    assert {"weights", "states", "activations", "all"} <= parts.keys() and re.search(r"tokens a second +[\d,]+ \(", out)
    assert (
        "312 TFLOP/s, 40% of which training reaches, memory of 2,000 GB/s, a link of 300 GB/s: an A100 in bf16" in out
    )
    assert sum(float(v) for k, v in parts.items() if k != "all") == pytest.approx(float(parts["all"]), abs=0.3)


def test_speed_is_told_for_the_device_that_is_given(no_weights, capsys):
    main(sft(no_weights, "--devices", "1", "--flops", "6e13", "--utilization", "0.5"))
    out = capsys.readouterr().out
    assert "60 TFLOP/s, 50% of which training reaches" in out and "A100" not in out


def test_help_begins_with_the_options_of_its_own(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    listed = re.findall(r"^  (--\w+(?:\.\w+)?)", capsys.readouterr().out.partition("\noptions:\n")[2], re.M)
    own = ["devices", "memory", "margin", "search", "out", "flops", "bandwidth", "link", "utilization"]
    listed.remove("--print_config")  # of every command
    assert listed[: len(own)] == [f"--{name}" for name in own]


def test_a_plan_of_too_little_memory_says_how_much(no_weights, capsys):
    main(sft(no_weights, "--devices", "1", "--memory", "100KB"))
    assert re.search(r"It does not fit: [\d.]+ MiB too much\.", capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("devices", "layouts"),
    [(1, {"one device"}), pytest.param(2, {"ddp", "zero1", "zero2"}, marks=pytest.mark.exhaustive)],
)
def test_search_writes_a_config_that_fit_takes(no_weights, tmp_path, capsys, devices, layouts):
    path = tmp_path / "found.yaml"
    given = ("--data.batch_size", str(4 * devices))
    main(sft(no_weights, "--devices", str(devices), *given, "--search", "--out", str(path)))
    out, told = capsys.readouterr()
    for name in layouts:
        assert len(re.findall(rf"^{name}, [\d,]+ tokens(?:, checkpointing)?: [\d.]+ MiB, fits$", told, re.M)) >= 2
    rows = [line for line in out.splitlines() if line.endswith("fits")]
    assert {line.split("  ")[0].strip() for line in rows} >= layouts and f"A config of it: {path}" in out
    speeds = [float(re.findall(r"([\d,]+)  fits", line)[0].replace(",", "")) for line in rows]
    assert speeds == sorted(speeds, reverse=True)
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert found["trainer"]["devices"] == devices and path.read_text(encoding="utf-8").startswith("# ")
    main(sft(no_weights, "--config", str(path), *given))
    again = capsys.readouterr().out
    assert again.splitlines()[0] == out[out.index("\n\n") :].strip().splitlines()[0], "the same plan"


def test_a_pipeline_is_planned_from_its_config(no_weights, tmp_path, capsys):
    path, pipeline = tmp_path / "found.yaml", CONFIGS / "parallel" / "pp2.yaml"
    given = ["--config", str(pipeline), "--data.batch_size", "8", "--trainer.accumulate_grad_batches", "1"]
    main(sft(no_weights, *given, "--out", str(path)))
    out = capsys.readouterr().out
    assert out.startswith("zero1, pp 2; 2 x ") and "\nin 8 parts; a rank waits 11% of the time for others\n" in out
    found = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"]
    arguments = {"plugin": "zero1", "tp": 1, "pp": 2, "micro_batches": 8}
    assert found["devices"] == 2 and found["strategy"]["init_args"] == arguments


def test_stretches_of_rows_are_planned_from_their_config(no_weights, tmp_path, capsys):
    path = tmp_path / "found.yaml"
    main(sft(no_weights, "--config", str(CONFIGS / "parallel" / "sp2.yaml"), "--out", str(path)))
    assert capsys.readouterr().out.startswith("zero1, sp 2; 2 x ")
    found = yaml.safe_load(path.read_text(encoding="utf-8"))["trainer"]
    assert found["devices"] == 2 and found["strategy"]["init_args"] == {"plugin": "zero1", "tp": 1, "sp": 2}


@pytest.mark.parametrize("memory", ["1GB", "none"])
def test_it_leaves_the_levels_of_logs(no_weights, memory):
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning_rlhf", "transformers")]
    before = [logger.level for logger in loggers]
    with contextlib.suppress(SystemExit):
        main(sft(no_weights, "--devices", "1", "--memory", memory))
    assert [logger.level for logger in loggers] == before and logging.ERROR not in before


def test_errors_are_one_line(no_weights):
    with pytest.raises(SystemExit) as error:
        main(sft(no_weights, "--memory", "80 gigs"))
    assert str(error.value) == (
        "lightning-rlhf plan: --memory 80 gigs: give a number and a unit, such as 80GB or 24GiB."
    )
    with pytest.raises(SystemExit) as error:
        main(sft("nobody/nothing"))
    assert "nobody/nothing is not a directory in" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--margin", "1"), ("--margin", "-0.1"), ("--utilization", "5"), ("--flops", "inf"), ("--link", "0")],
)
def test_numbers_that_make_no_sense_are_refused(no_weights, option, value, capsys):
    with pytest.raises(SystemExit):
        main(sft(no_weights, option, value))
    told = capsys.readouterr().err
    assert option.strip("-") in told and value in told and told.count("\n") == 1


def test_where_the_config_goes_is_checked_first(no_weights, tmp_path, monkeypatch):
    monkeypatch.setattr("lightning_rlhf.plan.command.plan", None)
    with pytest.raises(SystemExit) as error:
        main(sft(no_weights, "--out", str(tmp_path)))
    assert str(error.value) == (
        f"lightning-rlhf plan: the config: {tmp_path} can't be written: it is a directory. Set --out to another path."
    )


def layout(model, devices=8, precision="bf16-mixed", **arguments):
    settings = Settings(devices, 10**9, Device(), precision)
    data = SimpleNamespace(max_length=64, batch_size=8, max_tokens=None)
    return Planner(SFTModule(model), data, settings).layout(**arguments)


def test_layouts_that_cannot_be(no_weights):
    with pytest.raises(ValueError, match=r"tp=2 does not divide 3 devices\. Set tp to one of 1, 3\."):
        layout(no_weights, 3, tp=2)
    with pytest.raises(ValueError, match=r"tp=8 does not divide the .* attention heads"):
        layout(no_weights, tp=8)
    with pytest.raises(ValueError, match=r"gemini does not support trainer\.precision='32-true'"):
        layout(no_weights, precision="32-true", plugin="gemini")
    with pytest.raises(ValueError, match=r"pp=3 does not divide 8 devices for tp=1\. Set pp to one of 1, 2, 4, 8\."):
        layout(no_weights, pp=3)
    with pytest.raises(ValueError, match=r"pp=8 is more than the 2 layers of .*\. Set pp to at most 2\."):
        layout(no_weights, pp=8)
    with pytest.raises(ValueError, match=r"Gemini's chunks span the layers"):
        layout(no_weights, plugin="gemini", pp=2)
    with pytest.raises(ValueError, match=r"sp=3 does not divide 8 devices for tp=2\. Set sp to one of 1, 2, 4\."):
        layout(no_weights, tp=2, sp=3)
    with pytest.raises(ValueError, match=r"sp=8 does not divide the .* attention heads"):
        layout(no_weights, sp=8)
    with pytest.raises(ValueError, match=r"sp does not support Gemini's chunks"):
        layout(no_weights, plugin="gemini", sp=2)
    with pytest.raises(ValueError, match=r"pp and sp do not go together"):
        layout(no_weights, pp=2, sp=2)
    assert layout(no_weights, plugin="zero2", pp=2).copies == 4
    assert layout(no_weights, plugin="zero2", sp=2).replicas == 8
    assert layout(no_weights, plugin="zero2") == Layout("zero2", 1, 8, False, 1, masters=True)


def test_a_family_without_a_tensor_parallel_plan_is_named(no_weights):
    GPT2Config(architectures=["GPT2LMHeadModel"]).save_pretrained(no_weights)
    with pytest.raises(ValueError, match=r"^GPT2LMHeadModel cannot be cut: .* Leave out tp\.$"):
        layout(no_weights, tp=2)


def test_strategies_and_devices():
    assert strategy_arguments("auto") == strategy_arguments("ddp") == {"plugin": "ddp"}
    assert strategy_arguments("colossalai_hybrid") == {"plugin": "zero1", "tp": 2}
    with pytest.raises(
        ValueError, match=r"trainer\.strategy=fsdp can't be planned: give auto, ddp, one of colossalai,"
    ):
        strategy_arguments("fsdp")
    assert count_devices(SimpleNamespace(devices=[0, 1], num_nodes=2)) == 4
    with pytest.raises(ValueError, match=r"trainer\.devices=auto asks the machine that it runs on: give --devices\."):
        count_devices(SimpleNamespace(devices="auto", num_nodes=1))


def test_memory_for_people():
    assert parse_memory("80GB") == 80_000_000_000 and parse_memory("1.5 GiB") == 3 * 2**29
