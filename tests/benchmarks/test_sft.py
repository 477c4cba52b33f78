"""The speed benchmark at smoke size: same work for all contestants, and an honest table. No time is asserted."""

import importlib.util
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--steps", "2", "--warmup", "1", "--width", "32", "--layers", "1", "--length", "16"]


@pytest.fixture(scope="module")
def sft(load_benchmark):
    return load_benchmark("sft")


def task(sft, tmp_path, *arguments):
    return sft.make_task(sft.parse([*SMALL, *arguments]), str(tmp_path))


@pytest.mark.parametrize("case", ["fixed", "varied", "vocab"])
def test_contestants_do_the_same_work(sft, tmp_path, case):
    meters = []
    for run in (sft.run_ours, sft.run_bare):
        mine = task(sft, tmp_path, "--case", case, "--vocab-size", "64")
        before = mine.model.lm_head.weight.detach().clone()
        run(mine)
        mine.meter.finish()
        assert not torch.equal(before, mine.model.lm_head.weight)
        meters.append((mine.meter, mine.model))
    (ours, our_model), (bare, bare_model) = meters
    assert len(ours.losses) == len(bare.losses) == 3
    assert sft.common.loss_difference(ours, bare) < 1e-5
    assert ours.tokens == bare.tokens > 0
    for mine, theirs in zip(our_model.parameters(), bare_model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


def test_tokens_are_real_ones(sft, tmp_path):
    mine = task(sft, tmp_path, "--case", "varied", "--vocab-size", "64")
    lengths = [[len(ids) for ids, _ in rows] for rows in sft.batches(mine)]
    assert all(4 <= n <= 16 for step in lengths for n in step)
    assert len({n for step in lengths for n in step}) > 4
    sft.run_bare(mine)
    assert mine.meter.tokens == sum(map(sum, lengths[1:])), "padding or the warm-up was counted"


def test_fixed_rows_are_full_and_scored(sft, tmp_path):
    for rows in sft.batches(task(sft, tmp_path, "--case", "fixed", "--vocab-size", "64")):
        assert [len(ids) for ids, _ in rows] == [16] * 8
        for ids, labels in rows:
            assert labels == [sft.IGNORED, *ids[1:]]


def test_real_rows_score_the_answers(sft, tmp_path, assets, tiny_model_dir):
    mine = task(sft, tmp_path, "--case", "real", "--tokenizer", str(tiny_model_dir), "--length", "256")
    for rows in sft.batches(mine):
        for ids, labels in rows:
            assert len(ids) == len(labels) <= 256
            assert 0 < sum(label != sft.IGNORED for label in labels) < len(ids)


def test_command_prints_a_table(sft, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    sft.main([*SMALL, "--case", "fixed", "--vocab-size", "64", "--peers", "bare", "--rounds", "2"])
    printed = capsys.readouterr()
    header, _, ours, bare = (line.strip("| ").split(" | ") for line in printed.out.strip().splitlines())
    assert header == list(sft.common.COLUMNS)
    assert ours[:2] == ["fixed", "ours"]
    assert bare[:2] == ["fixed", "bare"]
    assert bare[4].endswith("x")
    assert "1.0x" in bare[-1]
    assert printed.err.count("tokens a CPU second") == 4


def test_table_shows_a_shortfall(sft):
    def meters(*speeds, memory):
        return [sft.Meter(1, int(s), 1.0, memory, [1.0, 0.5]) for s in speeds]

    found = {
        "ours": meters(150, 90, 100, memory=60.0),
        "bare": meters(100, 100, 100, memory=100.0),
        "trl": meters(50, 40, 60, memory=100.0),
    }
    found["trl"][0].losses[1] = 0.75
    goals = {"bare": sft.Goal(1.0), "trl": sft.Goal(2.5, 0.5)}
    ours, bare, trl = sft.common.rows("fixed", found, goals)
    assert ours[2:4] == ["100", "90 to 150"]
    assert bare[4] == "1.00x"
    assert bare[-1] == "1.0x met"
    assert trl[4:8] == ["2.00x", "100", "0.60x", "2.5e-01"]
    assert trl[-1] == "2.5x short by 0.50x, memory 0.5x over by 0.10x"


def test_peers_that_are_missing_are_named(sft, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="bench"):
        sft.main(["--peers", "trl"])


def test_failed_worker_says_why(sft, tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit('no such luck')")
    with pytest.raises(RuntimeError, match="no such luck"):
        sft.common.measure(script, [])


def test_warmup_is_needed(sft, capsys):
    with pytest.raises(SystemExit):
        sft.parse(["--warmup", "0"])
    assert "at least 1" in capsys.readouterr().err


def test_parts_of_a_step_are_timed_apart(sft, capsys, monkeypatch):
    kept = [getattr(owner, name) for places in sft.PARTS.values() for owner, name in places]
    sft.main([*SMALL, "--case", "fixed", "--vocab-size", "64", "--profile", "--rounds", "1"])
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    found = {part: (float(ours), float(bare)) for part, ours, bare in lines[2:]}
    assert lines[0] == ["CPU ms", "ours", "bare"] and [*found] == [*sft.PARTS, "the rest", "whole step"]
    for name in ("forward pass", "backward pass", "AdamW", "clipping"):
        assert min(found[name]) > 0, name
    for name in ("gradient norm, to skip a step that is not finite", "Lightning's log", "metrics"):
        assert found[name][0] > 0 == found[name][1], "the bare loop has none"
    now = [getattr(owner, name) for places in sft.PARTS.values() for owner, name in places]
    assert [f.__name__ for f in now] == [f.__name__ for f in kept] and not hasattr(now[0], "__wrapped__")
    with pytest.raises(SystemExit):
        sft.parse(["--profile"])


def test_time_within_another_part_counts_for_the_inner_one(sft, monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    monkeypatch.setattr(sft.time, "process_time", lambda: next(clock))

    class Owner:
        def outer(self):
            self.inner()

        def inner(self):
            pass

    monkeypatch.setattr(sft, "PARTS", {"outer": ((Owner, "outer"),), "inner": ((Owner, "inner"),)})
    meter, profile = sft.Meter(9), sft.Profile()
    with profile.of(meter):
        Owner().outer()
        meter.step(1, torch.zeros(()))
    (step,) = profile.steps
    assert step == {"the rest": 1000 + 5000, "outer": 2000 + 4000, "inner": 3000}
