"""The benchmark of collecting runs on the small model, and its figures add up."""

import json

import pytest

from lightning_rlhf.collection import Plan


@pytest.fixture(scope="module")
def benchmark(load_benchmark):
    return load_benchmark("collect")


def test_figures_of_growth_add_up(benchmark, stories_model_dir, tmp_path):
    plan = Plan({"en": 3}, examples=1, grown=0, tasks=4, pilot=8, requests=8)
    growth, found = benchmark.collect(str(stories_model_dir), plan, tmp_path / "run")
    assert found["rows"] == len(growth.rows) and (found["rows"] == 3 or growth.dried_up == ["en"])
    assert found["asked"] == 4 * found["requests"] and found["tasks"] > 0 and found["reply_tokens"] > 0
    count = growth.counts["en"]
    dropped = sum(sum(reasons.values()) for reasons in found["dropped"]["tasks"].values())
    assert count.tasks == dropped + count.answers + count.surplus
    json.dumps(found)
    again, counted = benchmark.collect(str(stories_model_dir), plan, tmp_path / "run")
    assert again.rows == growth.rows and counted["cpu_minutes"] >= found["cpu_minutes"] > 0
    bigger = Plan({"en": 4}, examples=1, grown=0, tasks=4, pilot=8, requests=8)
    before = counted["reply_tokens"]
    assert benchmark.collect(str(stories_model_dir), bigger, tmp_path / "more")[1]["reply_tokens"] >= before


@pytest.mark.slow
def test_fine_tuning_compares_with_human_rows(benchmark, stories_model_dir, tmp_path):
    human = tmp_path / "human.jsonl"
    lines = [
        json.dumps({"instruction": f"Say {i}", "instances": [{"input": "", "output": f"It is {i}."}]})
        for i in range(30)
    ]
    human.write_text("\n".join(lines))
    rows = [{"instruction": f"Tell {i}", "output": "A story.", "lang": "en"} for i in range(40)]
    found = benchmark.fine_tune(str(stories_model_dir), rows, human, 0, tmp_path)
    rows = {name: found[f"{name} rows"] for name in ("held out", "human", "grown", "all grown")}
    assert rows == {"held out": 10, "human": 20, "grown": 20, "all grown": 40}
    assert found["human"] < found["untrained"] and len({found[name] for name in rows if name != "held out"}) == 3
