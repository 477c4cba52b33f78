"""The command: what it writes, what it says, what it refuses."""

import json
import shlex
import shutil
from collections import namedtuple

import lightning.pytorch as L
import pytest
import torch
from exported import STORIES, TEXTS, outputs
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from lightning_rlhf import InstructionDataModule, SFTModule
from lightning_rlhf.cli import main
from lightning_rlhf.models.saving import save_pretrained


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """``export(RUN, *arguments)``: runs the command in a fresh directory; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        main(["export", *map(str, arguments)])
        return capsys.readouterr().out

    return run


@pytest.fixture
def refused(export, capsys):
    """``refused(RUN, *arguments)``: the line with which the command ends, and that it left nothing behind."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stop:
            export(*arguments)
        line = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
        assert line.startswith("lightning-rlhf export: ") and "\n" not in line.strip()
        return line

    return run


def served(out):
    """The arguments of the command that serves the export."""
    [line] = [line for line in out.splitlines() if line.startswith("Serve it: ")]
    return shlex.split(line.removeprefix("Serve it: "))


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------- whole weights


def test_a_full_run_is_handed_on_as_it_was_trained(full_run, export, tmp_path):
    out = export(full_run.folder, "--format", "hf", "--out", "my export")
    close(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "my export")), full_run.outputs())
    assert (full_run.outputs() - outputs(AutoModelForCausalLM.from_pretrained(STORIES))).abs().max() > 0.1
    assert "hf/best: whole weights (the export 'best'; " in out and "also has hf/last" in out
    assert served(out) == ["vllm", "serve", "my export"]
    ours, base = (AutoTokenizer.from_pretrained(path) for path in (tmp_path / "my export", STORIES))
    assert [ours(text).input_ids for text in TEXTS] == [base(text).input_ids for text in TEXTS]


def test_whole_weights_are_copied_only_if_asked(full_run, export, tmp_path):
    out = export(full_run.folder, "--format", "hf")
    assert served(out) == ["vllm", "serve", str(full_run.folder / "hf" / "best")]
    assert "nothing was written" in out and not list(tmp_path.iterdir())


def test_adapters_are_merged(lora_run, adapter_run, export, tmp_path):
    export(lora_run.checkpoint, "--format", "hf", "--out", "whole")
    close(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), lora_run.outputs())
    assert (lora_run.outputs() - outputs(AutoModelForCausalLM.from_pretrained(STORIES))).abs().max() > 0.1
    export(adapter_run.folder / "adapters" / "last", "--format", "hf", "--out", "merged")
    merged, wanted = tmp_path / "merged", adapter_run.folder / "hf" / "last"
    close(*(outputs(AutoModelForCausalLM.from_pretrained(path)) for path in (merged, wanted)))
    stops = [json.loads((p / "generation_config.json").read_text())["eos_token_id"] for p in (merged, wanted)]
    assert stops[0] == stops[1] == [2, 1]


def test_a_checkpoint_gives_the_average_that_the_run_exported(adapter_run, export, tmp_path):
    export(adapter_run.checkpoint, "--format", "hf", "--out", "average")
    exported = outputs(AutoModelForCausalLM.from_pretrained(adapter_run.folder / "hf" / "last"))
    close(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "average")), exported)
    assert (exported - adapter_run.outputs()).abs().max() > 1e-3  # the average is not the last step's


def test_merged_weights_have_the_type_of_their_base(lora_run, export, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(STORIES).to(torch.bfloat16)
    save_pretrained(base, AutoTokenizer.from_pretrained(STORIES), tmp_path / "base")
    export(lora_run.checkpoint, "--format", "adapter", "--out", "adapters")
    config = tmp_path / "adapters" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    export("adapters", "--format", "hf", "--out", "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("source", ["folder", "checkpoint"])
def test_a_reward_model_scores_as_it_was_trained(reward_run, export, tmp_path, source):
    out = export(getattr(reward_run, source), "--format", "hf", "--out", "rm")
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    offset = reward_run.module.model_to_export.score_offset
    if source == "checkpoint":
        close(outputs(found), reward_run.outputs())
        assert found.config.score_offset == offset
    else:
        close(
            outputs(found), outputs(AutoModelForSequenceClassification.from_pretrained(reward_run.folder / "hf/best"))
        )
    *command, pooler = served(out)
    assert command == ["vllm", "serve", "rm", "--runner", "pooling", "--pooler-config"]
    assert json.loads(pooler) == {"pooling_type": "LAST", "use_activation": False}
    assert f"subtract {found.config.score_offset:.6g} from its scores" in out and found.config.score_offset


# ------------------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("source", ["folder", "checkpoint"])
def test_adapters_alone_are_peft_s(lora_run, export, tmp_path, source):
    out = export(getattr(lora_run, source), "--format", "adapter", "--out", "lora")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(STORIES), tmp_path / "lora")
    close(outputs(model), lora_run.outputs())
    name = "lora" if source == "folder" else "epoch1-step4"
    command = ["vllm", "serve", str(STORIES), "--enable-lora", "--lora-modules", f"{name}=lora"]
    assert served(out) == [*command, "--chat-template", "lora/chat_template.jinja"]
    assert ("the newest checkpoint; " in out) == (source == "folder" and len(list(lora_run.folder.rglob("*.ckpt"))) > 1)


def test_exported_adapters_are_found_in_a_run(adapter_run, export):
    out = export(adapter_run.folder, "--format", "adapter")
    assert "adapters/best: adapters (the export 'best'; " in out and "nothing was written" in out


def test_a_reward_model_s_adapters_score_the_same(reward_run, export, tmp_path):
    out = export(reward_run.checkpoint, "--format", "adapter", "--out", "lora")
    base = AutoModelForSequenceClassification.from_pretrained(STORIES, num_labels=1)
    close(outputs(PeftModel.from_pretrained(base, tmp_path / "lora")), reward_run.outputs())
    assert served(out) == ["lightning-rlhf", "export", "lora", "--format", "hf"]
    assert "a score head" in out
    again = export("lora", "--format", "hf", "--out", "whole")
    close(outputs(AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")), reward_run.outputs())
    assert "--runner" in served(again) and f"{reward_run.module.model_to_export.score_offset:.6g}" in again


# ------------------------------------------------------------------------------------------------- refusals


def test_whole_weights_have_no_adapters(full_run, refused, tmp_path):
    assert "adapters cannot be taken out again" in refused(full_run.folder / "hf" / "best", "--format", "adapter")
    line = refused(full_run.folder, "--format", "adapter")  # its checkpoint has none either
    assert "needs a model with adapters" in line
    assert not list(tmp_path.iterdir())


def test_a_reward_model_is_no_gguf(reward_run, refused):
    assert "llama.cpp has no form for its score head" in refused(reward_run.folder, "--format", "gguf")


@pytest.fixture
def quantized(tmp_path):
    """A directory whose config says that its weights are quantized."""

    def make(name, **config):
        shutil.copytree(STORIES, tmp_path / name)
        file = tmp_path / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    "said, config",
    [
        ("nf4", dict(quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4")),
        ("int8", dict(quant_method="bitsandbytes", load_in_8bit=True)),
        ("gptq", dict(quant_method="gptq", bits=4, group_size=32)),
    ],
)
def test_quantized_weights_are_copied_and_never_rounded_again(quantized, export, refused, tmp_path, said, config):
    source = quantized(said, **config)
    assert f"is quantized ({said})" in refused(source, "--format", "gguf")
    export(source, "--format", "hf", "--out", "copy")
    assert (tmp_path / "copy" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_adapters_are_not_merged_into_quantized_weights(lora_run, quantized, export, refused, tmp_path):
    export(lora_run.checkpoint, "--format", "adapter", "--out", "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    base = str(quantized("gptq", quant_method="gptq", bits=4))
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": base}))
    line = refused("lora", "--format", "hf")
    assert base in line and "gptq" in line and "--format adapter" in line


def test_an_output_that_exists_is_kept(full_run, refused, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    assert "mine exists." in refused(full_run.folder, "--format", "hf", "--out", "mine")
    best = full_run.folder / "hf" / "best"
    assert "exists." in refused(full_run.folder, "--format", "hf", "--out", best)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it" and (best / "config.json").exists()


def test_a_full_disk_leaves_nothing(lora_run, refused, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000, 1000, 0))
    for source in (lora_run.folder, lora_run.checkpoint):
        line = refused(source, "--format", "hf", "--out", "out")
        assert "No space left on device" in line and "Make room" in line
    assert not list(tmp_path.iterdir())


def test_a_failure_in_the_middle_leaves_nothing(lora_run, refused, tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError("the network disk is gone")

    monkeypatch.setattr(shutil, "copyfile", fail)
    assert "the network disk is gone" in refused(lora_run.folder, "--format", "hf", "--out", "out")
    assert not list(tmp_path.iterdir())


def test_checkpoints_that_are_none(refused, tmp_path):
    (tmp_path / "empty.ckpt").touch()
    assert "is an empty file" in refused(tmp_path / "empty.ckpt", "--format", "hf")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    assert "torch cannot read it" in refused(tmp_path / "text.ckpt", "--format", "hf")
    torch.save({"pytorch-lightning_version": "2.6", "state_dict": {}}, tmp_path / "other.ckpt")
    assert "is no checkpoint of a stage" in refused(tmp_path / "other.ckpt", "--format", "hf")


def test_a_checkpoint_with_objects_says_how_to_load_it(refused, tmp_path):
    module = SFTModule(str(STORIES), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    trainer = L.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_progress_bar=False,
                        enable_model_summary=False, default_root_dir=tmp_path)  # fmt: skip
    rows = [{"prompt": "Say", "completion": "dog"}] * 2
    trainer.fit(module, InstructionDataModule(rows, val_fraction=0, batch_size=2, cache_dir=tmp_path))
    line = refused(trainer.checkpoint_callback.best_model_path, "--format", "hf")
    assert "SFTModule.load_from_checkpoint(..., optimizer=...)" in line and "save_pretrained(" in line


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["nobody/nothing", "--format", "hf"], "is no file or directory in"),
        (["a b", "--format", "hf"], "There is no directory a b."),
        (["/no/such/folder", "--format", "hf"], "There is no directory /no/such/folder."),
        (["empty", "--format", "hf"], "neither an export (hf/best, hf/last) nor a checkpoint"),
        (["model.gguf", "--format", "gguf"], "is a GGUF file already"),
        ([STORIES, "--format", "gguf", "--quant", "q5_1"], "invalid choice: 'q5_1'"),
        ([STORIES, "--format", "hf", "--quant", "q8_0"], "--quant is for --format gguf, not hf."),
        ([STORIES, "--format", "gguf", "--out", "x.gguf"], "--out is a directory"),
        ([STORIES], "required: --format"),
    ],
)
def test_bad_input_is_one_line(refused, tmp_path, arguments, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.gguf").touch()
    assert said in refused(*arguments)
