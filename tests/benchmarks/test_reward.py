"""The reward benchmark at smoke size: same pairs for all contestants, speeds in pairs. No time is asserted."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS = [
    {"prompt": [{"role": "user", "content": f"Tell {i}{'!' * i}"}], "chosen": f"Good {i * i}", "rejected": "Bad" * i}
    for i in range(1, 13)
]
LONG = {"prompt": [{"role": "user", "content": "Why?"}], "chosen": "Because. " * 40, "rejected": "No."}


@pytest.fixture(scope="module")
def reward(load_benchmark):
    return load_benchmark("reward")


@pytest.fixture
def small(tmp_path, tiny_model_dir):
    """Arguments of a small run: 3 steps of 2 pairs, and one row over the length."""
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, [LONG, *ROWS])))
    size = ["--steps", "2", "--warmup", "1", "--pairs", "2", "--width", "32", "--layers", "1", "--length", "128"]
    return [*size, "--data", str(data), "--tokenizer", str(tiny_model_dir), "--cache", str(tmp_path)]


@pytest.fixture
def options(reward, small):
    return reward.parse(small)


def scores(model, ids):
    """Of rows one at a time, without padding."""
    with torch.no_grad():
        return torch.stack([model(input_ids=torch.tensor([row])).logits[0, 0] for row in ids])


def test_contestants_do_the_same_work(reward, options):
    meters = []
    for run in (reward.run_ours, reward.run_bare):
        mine = reward.make_task(options)
        before = mine.model.score.weight.detach().clone()
        run(mine)
        mine.meter.finish()
        assert not torch.equal(before, mine.model.score.weight)
        meters.append((mine.meter, mine.model))
    (ours, our_model), (bare, bare_model) = meters
    assert len(ours.losses) == len(bare.losses) == 3
    assert len(set(ours.losses)) == 3
    assert reward.common.loss_difference(ours, bare) < 1e-5
    assert ours.tokens == bare.tokens > 0
    for mine, theirs in zip(our_model.parameters(), bare_model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_first_loss_is_that_of_unpadded_rows(reward, options):
    mine = reward.make_task(options)
    step = next(reward.batches(mine.data, 1))
    assert len({len(row) for row in step.chosen + step.rejected}) > 1, "nothing would be padded"
    margin = scores(mine.model, step.chosen) - scores(mine.model, step.rejected)
    want = torch.nn.functional.softplus(-margin).mean().item()
    reward.run_bare(mine)
    assert float(mine.meter.losses[0]) == pytest.approx(want, abs=1e-5)


def test_steps_are_whole_pairs_within_the_length(reward, options):
    data = reward.make_data(options)
    steps = list(reward.batches(data, 6))
    tokenizer = data.tokenizer
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = set()
    for step in steps:
        assert len(step.chosen) == len(step.rejected) == 2
        together = 0
        for chosen, rejected in zip(step.chosen, step.rejected, strict=True):
            assert max(len(chosen), len(rejected)) <= 128
            assert chosen[-1] == rejected[-1] == tokenizer.eos_token_id
            shared = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
            together += len(chosen) + len(rejected) - shared
            texts.add((tokenizer.decode(chosen).split("assistant\n")[1], tokenizer.decode(rejected).split("\n")[-1]))
        assert step.tokens == together, "a prompt counts once"
    end = tokenizer.eos_token
    assert texts == {(row["chosen"] + end, row["rejected"] + end) for row in ROWS}


def test_rectangle_counts_padding(reward):
    step = reward.Step(7, [[1, 2, 3], [1, 2]], [[1, 2, 3, 4], [1]])
    assert step.rectangle == 16
    assert reward.describe([step, step]) == ("2 steps, 4 pairs, 14 tokens; the padded batches hold 2.29 times as many.")


def test_command_prints_a_table_of_pairs(reward, small, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    reward.main([*small, "--peers", "bare", "--rounds", "2"])
    printed = capsys.readouterr()
    header, _, ours, bare, _, note = (line.strip("| ").split(" | ") for line in printed.out.strip().splitlines())
    assert header == list(reward.COLUMNS)
    assert header[2] == "pairs / CPU s"
    assert ours[:2] == ["preferences", "ours"]
    assert bare[:2] == ["preferences", "bare"]
    assert float(bare[7]) < 1e-5
    assert note[0].startswith("2 steps, 4 pairs, ")
    assert printed.err.count("tokens a CPU second") == 4


def test_speeds_are_pairs_a_second(reward):
    def meters(*seconds, memory):
        return [reward.Meter(1, 1000, s, memory, [0.5]) for s in seconds]

    found = {"ours": meters(2.0, 4.0, 8.0, memory=50.0), "trl": meters(10.0, 6.0, 8.0, memory=40.0)}
    ours, trl = reward.rows(found, pairs=16)
    assert ours[2:4] == ["4.00", "2.00 to 8.00"]
    assert trl[2:5] == ["2.00", "1.60 to 2.67", "2.00x"]
    assert trl[-1] == "2.0x met, memory 1.0x over by 0.25x"


def test_peers_that_are_missing_are_named(reward, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="bench"):
        reward.main(["--peers", "trl"])


def test_more_steps_than_the_data_fills_are_refused(reward, small):
    with pytest.raises(SystemExit, match=r"fills 6 steps of 2 pairs; lower --steps"):
        reward.main([*small, "--peers", "bare", "--steps", "6"])


def test_warmup_is_needed(reward, capsys):
    with pytest.raises(SystemExit):
        reward.parse(["--warmup", "0"])
    assert "at least 1" in capsys.readouterr().err
