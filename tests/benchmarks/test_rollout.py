"""The rollout benchmark at smoke size: same work for both, and an honest table. No time is asserted."""

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--repeats", "1", "--width", "32", "--layers", "1", "--new", "5", "--rows", "24"]


@pytest.fixture(scope="module")
def rollout(load_benchmark):
    return load_benchmark("rollout")


@pytest.mark.parametrize("case", ["llama", "stories"])
def test_contestants_make_as_many_completions_of_the_same_prompts(rollout, case):
    task = rollout.make_task(rollout.parse([*SMALL, "--case", case]))
    sizes = sorted(map(len, task.prompts))
    assert (sizes[0], sizes[-1]) == (4, 60) and len(set(sizes)) == len(sizes)
    ours, theirs = rollout.rollout_ours(task, 0), rollout.rollout_generate(task, 0)
    assert len(ours) == len(theirs) == len(task.prompts) * task.case.samples
    assert {len(ids) for ids in theirs} <= {1, 2, 3, 4, 5} and max(map(len, ours)) == 5
    assert rollout.rollout_ours(task, 1) != ours  # iterations differ


def test_what_generate_made_after_the_end_is_not_counted(rollout):
    task = rollout.make_task(rollout.parse([*SMALL, "--case", "llama"]))._replace(stops=list(range(2000)))
    for contestant in (rollout.rollout_ours, rollout.rollout_generate):
        for ids in contestant(task, 0):
            assert not any(token in task.stops for token in ids[:-1])
            assert ids[-1] in task.stops or len(ids) == 5


def test_generate_draws_from_the_whole_distribution(rollout):
    """As ours does: transformers' default top_k of 50 would be less work, and another distribution."""
    task = rollout.make_task(rollout.parse([*SMALL, "--case", "llama"]))
    tokens = torch.tensor(rollout.rollout_generate(task, 0)).flatten()
    with torch.no_grad(), task.policy.native_attention() as model:
        ids = torch.tensor([task.prompts[0]])
        rank = model(input_ids=ids).logits[0, -1].argsort(descending=True).argsort()
    assert len(set(tokens.tolist())) > 200 and max(rank[tokens[:40]]) > 1000


def test_command_prints_a_table(rollout, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    rollout.main([*SMALL, "--case", "llama", "--rounds", "1"])
    header, _, ours, generate = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.strip().splitlines())
    assert header == [column for column in rollout.common.COLUMNS if column != "loss differs by"]
    assert ours[:2] == ["llama", "ours"] and generate[:2] == ["llama", "generate"]
    assert generate[4].endswith("x") and generate[-1].startswith(f"{rollout.CASES['llama'].goal}x")


def test_warmup_is_needed(rollout, capsys):
    with pytest.raises(SystemExit):
        rollout.parse(["--warmup", "0"])
    assert "at least 1" in capsys.readouterr().err
