"""The benchmark of collecting runs on the small model, and its figures add up."""

import json
import sys
from pathlib import Path

import pytest
from runs import load_script

from lightning_rlhf.collection import Plan


@pytest.fixture(scope="module")
def benchmark():
    before = list(sys.path)
    yield load_script(Path(__file__).resolve().parents[2] / "benchmarks" / "collect.py")
    sys.path[:] = before


def test_figures_of_growth_add_up(benchmark, stories_model_dir, tmp_path):
    plan = Plan({"en": 3}, examples=1, grown=0, tasks=4, pilot=8, requests=8)
    growth, found = benchmark.collect(str(stories_model_dir), plan, tmp_path)
    assert found["rows"] == len(growth.rows) and (found["rows"] == 3 or growth.dried_up == ["en"])
    assert found["asked"] == 4 * found["requests"] and found["tasks"] > 0 and found["reply_tokens"] > 0
    count = growth.counts["en"]
    dropped = sum(sum(reasons.values()) for reasons in found["dropped"]["tasks"].values())
    assert count.tasks == dropped + count.answers + count.surplus
    json.dumps(found)


@pytest.mark.slow
def test_fine_tuning_compares_with_human_rows(benchmark, stories_model_dir, tmp_path):
    human = tmp_path / "human.jsonl"
    lines = [json.dumps({"instruction": f"Say {i}", "output": f"It is {i}."}) for i in range(30)]
    human.write_text("\n".join(lines))
    rows = [{"instruction": f"Tell {i}", "output": "A story.", "lang": "en"} for i in range(16)]
    found = benchmark.fine_tune(str(stories_model_dir), rows, human, 0, tmp_path)
    assert found["held_out_rows"] == 10 and found["human_rows"] == 20 and found["grown_rows"] == 16
    assert found["human"] < found["untrained"] and found["grown"] != found["human"]
