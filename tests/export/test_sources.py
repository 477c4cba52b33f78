"""What is taken of what a user names."""

import os

import pytest
from exported import STORIES

from lightning_rlhf.export import Source, find_source
from lightning_rlhf.export.sources import quantization_of


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
    assert quantization_of(config) == name
