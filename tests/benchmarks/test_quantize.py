"""The study of quantizers at smoke size: the seeds share what knows no seed, and each result is a line."""

import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def study(load_benchmark):
    pytest.importorskip("gptqmodel")
    return load_benchmark("quantize")


@pytest.mark.exhaustive
def test_rounding_knows_no_calibration_seed(study, tmp_path, capsys):
    results = tmp_path / "results" / "quantize.jsonl"
    size = ["--rows", "4", "--group_size", "64", "--seeds", "1", "3", "--results", str(results)]
    study.main(["--methods", "rtn", "gptq", *size])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["seed"], line["method"]) for line in lines] == [
        (seed, method) for seed in (1, 3) for method in ("none", *["rtn", "gptq"] * 2)
    ]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert table[1].startswith("|  | none | ") and table[1].endswith("| 0.0000 |")
    symmetric = next(line for line in table if "symmetric | rtn" in line)
    assert ", " not in symmetric.split("|", 3)[3], "one figure for both seeds"
    assert next(line for line in table if "symmetric | gptq" in line).count(", ") > symmetric.count(", ")


def test_rows_are_the_models_own_and_those_of_their_seed(study, stories_model_dir):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stories_model_dir).eval()
    first, again, other = ([row.tolist() for row in study.sample_rows(model, 2, 20, seed)] for seed in (1, 1, 2))
    assert first == again != other and {len(row) for row in first} == {20} and {row[0] for row in first} == {1}
