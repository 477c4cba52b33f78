"""The memory benchmark of 4-bit models at toy size: no size is asserted but that of the files."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def four_bits(load_benchmark):
    return load_benchmark("four_bits")


@pytest.mark.parametrize("shape", ["llama-2-7b", "qwen2.5-7b"])
def test_the_checkpoint_is_written_as_large_as_the_formula_says(four_bits, shape, tmp_path):
    config, grid = four_bits.make_config(shape, tiny=True), four_bits.Grid(4, 32)
    total = four_bits.write_checkpoint(config, grid, tmp_path)
    assert abs(total / four_bits.stored_bytes(four_bits.empty_model(config), grid).total - 1) < 1e-3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    held = {}
    for shard in set(index.values()):
        with safe_open(tmp_path / shard, "pt") as file:
            held |= {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    assert held.keys() == index.keys() and sum(held.values()) == total
    assert len(set(index.values())) == config.num_hidden_layers + 1  # one layer at a time


def test_published_sizes(four_bits):
    """The table of the docs: groups of 128, embeddings in fp16."""
    sizes = {
        name: four_bits.stored_bytes(four_bits.empty_model(four_bits.make_config(name)), four_bits.Grid(4, 128)).total
        for name in four_bits.SHAPES
    }
    gigabytes = {name: round(size / 1e9, 2) for name, size in sizes.items()}
    assert gigabytes == {"llama-2-7b": 3.89, "llama-3-8b": 5.73, "mistral-7b": 4.16, "qwen2.5-7b": 5.58}


@pytest.mark.slow
@pytest.mark.parametrize("path, more", [("exact", 0.02), ("fused", 0.3)])  # that kernel's zeros are not packed
def test_command_prints_a_table(four_bits, path, more, capfd, monkeypatch):
    pytest.importorskip("gptqmodel")
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    four_bits.main(["--tiny", "--tokens", "3", "--path", path])
    out = capfd.readouterr().out
    rows = dict(line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("|"))
    formula, stored = (float(rows[name]) for name in ("by formula", "stored (storages of the loaded model)"))
    assert stored == pytest.approx(formula, rel=more) and f"peak, {path}: loading and 3 tokens" in rows
