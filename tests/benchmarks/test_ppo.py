"""The PPO benchmark at smoke size: whole iterations of full-length completions, and an honest table; no times."""

import importlib.util
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SIZE = ["--width", "32", "--layers", "1", "--vocab-size", "64", "--length", "6", "--new", "4", "--completions", "4"]
SMALL = [*SIZE, "--steps", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def ppo(load_benchmark):
    return load_benchmark("ppo")


@pytest.fixture
def weights(ppo, monkeypatch):
    """The modules that were trained, and what they started from."""
    found = []

    class Watched(ppo.PPOModule):
        def on_train_start(self):
            super().on_train_start()
            found.append((self, [p.detach().clone() for role in self.trainable_parameters().values() for p in role]))

    monkeypatch.setattr(ppo, "PPOModule", Watched)
    return found


@pytest.mark.parametrize("contestant", ["ours", "ours-head", "ours-lora"])
@pytest.mark.parametrize("case", ["four", "samples"])
def test_ours_makes_whole_iterations(ppo, tmp_path, weights, contestant, case):
    task = ppo.make_task(ppo.parse([*SMALL, "--case", case]), tmp_path)
    ppo.CONTESTANTS[contestant](task)
    task.meter.finish()
    assert len(task.meter.losses) == 3
    assert task.meter.tokens == 2 * 4 * (6 + 4), "a completion ended early, or the warm-up was counted"
    ((module, before),) = weights
    trained = module.trainable_parameters()
    starts = [before[: len(trained["policy"])], *([before[-1:]] if "value" in trained else [])]
    for role, start in zip(trained.values(), starts, strict=True):
        assert any(not torch.equal(p, old) for p, old in zip(role[-len(start) :], start, strict=True))
    assert module.trainer.callback_metrics["train/updates"] == 4
    assert module.trainer.callback_metrics["train/length_min"] == 4


def test_prompts_have_their_length_and_the_case_its_samples(ppo, tmp_path):
    for case, prompts in {"one": 4, "samples": 1}.items():
        task = ppo.make_task(ppo.parse([*SMALL, "--case", case]), tmp_path / case)
        assert len(task.prompts) == len(set(task.prompts)) == prompts * 3
        ids = task.tokenizer(task.prompts).input_ids
        assert {len(row) for row in ids} == {6}
        assert all(task.tokenizer.eos_token_id not in row for row in ids)


def test_table_shows_a_shortfall(ppo):
    def meters(*seconds, memory):
        return [ppo.Meter(1, 1000, s, memory, [0.5]) for s in seconds]

    found = {
        "ours": meters(2.0, 4.0, 8.0, memory=60.0),
        "ours-lora": meters(2.0, 2.0, 2.0, memory=20.0),
        "trl": meters(5.0, 6.0, 4.0, memory=40.0),
    }
    ours, lora, trl = ppo.rows(ppo.CASES["four"], found, steps=2)
    assert ours == ["4 epochs", "ours", "2.00", "1.00 to 4.00", "0.80x", "60", "1.50x", "0.6x over by 0.20x"]
    assert lora[4:] == ["0.40x", "20", "0.50x", ""]
    assert trl[2:] == ["2.50", "2.00 to 3.00", "", "40", "", ""]
    found["ours"] = meters(3.0, memory=60.0)
    assert ppo.rows(ppo.CASES["one"], found, steps=1)[0][-1] == "0.6x met"
    assert ppo.rows(ppo.CASES["samples"], found, steps=1)[0][0] == "4 epochs, 4 samples a prompt"
    assert ppo.rows(ppo.CASES["samples"], found, steps=1)[0][-1] == "", "the goal is for prompts of their own"


def test_command_prints_a_table(ppo, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    ppo.main([*SMALL, "--contestants", "ours", "--cases", "one", "--rounds", "2"])
    printed = capsys.readouterr()
    header, _, ours = (line.strip("| ").split(" | ") for line in printed.out.strip().splitlines())
    assert header == list(ppo.COLUMNS)
    assert ours[:2] == ["1 epoch", "ours"]
    assert printed.err.count("MiB") == 2


@pytest.mark.parametrize("there", [set(), {"trl"}])
def test_trl_without_ppo_is_refused(ppo, monkeypatch, there):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in there or None)
    with pytest.raises(SystemExit, match=r"trl==1\.12\.0"):
        ppo.main([])


def test_warmup_is_needed(ppo, capsys):
    with pytest.raises(SystemExit):
        ppo.parse(["--warmup", "0"])
    assert "at least 1" in capsys.readouterr().err
