"""What is taken of what a user names."""

import os
from pathlib import Path

import pytest
from exported import STORIES

from lightning_rlhf.models.gptq import method_of
from lightning_rlhf.models.loading import load_config, load_tokenizer
from lightning_rlhf.models.runs import Source, check_name, exports_of, find_model, find_source


@pytest.fixture
def run(tmp_path):
    """``run(*names)``: a run's folder with these exports and checkpoints, the later newer."""

    def make(*names):
        for age, name in enumerate(names):
            path = tmp_path / "run" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".ckpt":
                path.touch()
                os.utime(path, (age, age))
            else:
                path.mkdir()
                file = "adapter_config.json" if name.startswith("adapters") else "config.json"
                (path / file).write_text("{}")
        return str(tmp_path / "run")

    return make


WHOLE = ("hf/last", "hf/best", "ema/best", "checkpoints/a.ckpt", "checkpoints/b.ckpt")


@pytest.mark.parametrize(
    "names, adapters, taken, kind, why",
    [
        (WHOLE, False, "hf/best", "model", "the export 'best'; RUN also has hf/last, ema/best"),
        (("hf/last", "ema/best"), False, "hf/last", "model", "the export 'last'; RUN also has ema/best"),
        (("hf/last",), False, "hf/last", "model", "the export 'last'"),
        (("ema/last", "ema/best"), False, "ema/best", "model", "the export 'best'; RUN also has ema/last"),
        (("adapters/best", "hf/last"), False, "hf/last", "model", "the export 'last'; RUN also has adapters/best"),
        (("adapters/best",), False, "adapters/best", "adapters", "the export 'best'"),
        (("b.ckpt", "a.ckpt"), False, "a.ckpt", "checkpoint", "the newest checkpoint; RUN also has b.ckpt"),
        (WHOLE, True, "checkpoints/b.ckpt", "checkpoint", "the newest checkpoint; RUN also has checkpoints/a.ckpt"),
        (("adapters/last", *WHOLE), True, "adapters/last", "adapters", "the export 'last'; RUN also has hf/best, hf/l"),
        (("hf/best",), True, "hf/best", "model", "the export 'best'"),
    ],
)
def test_what_a_run_gives(run, names, adapters, taken, kind, why):
    folder = run(*names)
    found = find_source(folder, adapters)
    assert (str(found.path), found.kind, found.name) == (f"{folder}/{taken}", kind, "run")
    assert found.why.startswith(why.replace("RUN", folder))


def test_a_directory_is_taken_as_it_is():
    assert find_source(str(STORIES)) == Source(STORIES, "model", "stories260K")


def test_a_name_has_no_sign_that_servers_split_at(tmp_path):
    (tmp_path / "epoch=1-step=4.ckpt").touch()
    assert find_source(str(tmp_path / "epoch=1-step=4.ckpt")).name == "epoch1-step4"


def test_from_pretrained_gets_a_directory_or_a_hub_id(run, tmp_path):
    folder = run("hf/last", "checkpoints/a.ckpt")
    assert str(find_model(folder)) == f"{folder}/hf/last" and find_model(str(STORIES)) == STORIES
    assert find_model("org/model") == "org/model" and find_model("gpt2") == "gpt2"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.ckpt").touch()
    for name in ("other", "other/a.ckpt"):
        with pytest.raises(OSError, match=r"other/a.ckpt is a checkpoint. .*lightning-rlhf export .*a.ckpt --format"):
            find_model(str(tmp_path / name))


def test_an_export_has_the_name_of_its_run(run):
    folder = Path(run("hf/best", "ema/last"))
    assert [export.name for export in exports_of(folder)] == ["run", "run"]
    assert find_source(str(folder / "hf" / "best")) == Source(folder / "hf" / "best", "model", "run")


@pytest.mark.parametrize("find", [find_source, find_model, check_name, load_config, load_tokenizer])
def test_a_path_is_not_looked_for_on_the_hub(find, run, tmp_path, monkeypatch):
    run("hf/best")
    (tmp_path / "short" / "hf" / "last").mkdir(parents=True)
    (tmp_path / "cut").mkdir()
    monkeypatch.chdir(tmp_path)
    for name, near in (
        (f"{tmp_path}/rnu/hf/best", f"; did you mean {tmp_path}/run?"),
        ("run/hf/bset", "; did you mean run/hf/best?"),
        ("short/hf/best", "; did you mean short/hf/last?"),
        ("cut/hf/best", ": the run in cut has exported no model. HFExport writes hf/best and hf/last."),
        ("./nothing", "."),
        ("/no/such/folder", "."),
    ):
        with pytest.raises(FileNotFoundError) as caught:
            find(name)
        assert str(caught.value) == f"There is no directory {name}{near}"


@pytest.mark.parametrize(
    "config, name",
    [
        ({}, None),
        ({"quantization_config": None}, None),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "int8"),
        ({"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}, "nf4"),
    ],
)
def test_the_method_of_quantized_weights(config, name):
    assert method_of(config) == name
