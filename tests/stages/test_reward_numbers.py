"""What a reward returns beside its score is logged, in plain iterations and in those of a refill."""

import csv
from pathlib import Path

import pytest
from runs import load_script

from lightning_rlhf.rewards import WeightedReward

run = load_script(Path(__file__).parent / "run_grpo.py").run


@pytest.mark.parametrize("groups", [{}, {"flat_groups": "refill", "spare": 1, "rounds": 1}], ids=["plain", "refill"])
def test_further_numbers_and_iterations(groups, tiny_model_dir, tmp_path):
    seen = []

    async def judged(prompts, completions, iteration):
        seen.append(iteration)
        return [
            {"score": float(i), "long": 2.0, "timeout": i == 0} if i % 2 == 0 else {"score": i + 0.5, "error": True}
            for i in range(len(completions))
        ]

    def plain(prompts, completions):
        return [0.0] * len(completions)

    reward = [WeightedReward(judged, name="mine"), WeightedReward(plain)]
    run(tiny_model_dir, tmp_path, reward=reward, max_steps=2, groups=groups, val_fraction=0.2)
    assert set(seen) == {0, 1, None}  # None: validation
    with (tmp_path / "log" / "version_0" / "metrics.csv").open() as file:
        row = next(row for row in csv.DictReader(file) if row["train/score"])
    assert float(row["train/reward/mine/long"]) == 2.0
    completions = (4 if not groups else 3) * 3
    assert float(row["train/verifier_timeouts"]) == 1 and float(row["train/verifier_errors"]) == completions // 2
    assert not [name for name in row if "mine/timeout" in name or "mine/error" in name]
