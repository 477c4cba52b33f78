"""The benchmark of DPO and KTO at smoke size: same pairs for all contestants, honest tables. No time is asserted."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from lightning_rlhf.data.reference import ReferenceLogprobs

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--steps", "2", "--warmup", "1", "--pairs", "2", "--width", "32", "--layers", "1", "--vocab-size", "64"]
ROWS = [
    {"prompt": [{"role": "user", "content": f"Tell {i}{'!' * i}"}], "chosen": f"Good {i * i}", "rejected": "Bad" * i}
    for i in range(1, 9)
]
LONG = {"prompt": [{"role": "user", "content": "Why?"}], "chosen": "Because. " * 40, "rejected": "No."}


@pytest.fixture(scope="module")
def dpo(load_benchmark):
    return load_benchmark("dpo")


@pytest.fixture
def real(tmp_path, tiny_model_dir):
    """Arguments of a small run on pairs of several lengths, one of them over the limit."""
    data = tmp_path / "real.jsonl"
    data.write_text("\n".join(map(json.dumps, [LONG, *ROWS])))
    return [*SMALL, "--case", "real", "--length", "128", "--data", str(data), "--tokenizer", str(tiny_model_dir)]


@pytest.fixture
def make_task(dpo, real, tmp_path):
    def make(algorithm, cache=tmp_path):
        cache.mkdir(exist_ok=True)
        return dpo.make_task(dpo.parse([*real, "--algorithm", algorithm, "--cache", str(cache)]))

    return make


def run(contestant, task):
    contestant(task)
    task.meter.finish()
    return task.meter


def mean_logprob(model, prompt, answer):
    """Of an answer's tokens, without padding."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        found = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    return found[len(prompt) - 1 :].mean().item()


@pytest.mark.parametrize("algorithm", ["dpo", "precomputed"])
def test_contestants_do_the_same_work(dpo, make_task, algorithm):
    tasks = [make_task(algorithm) for _ in range(2)]
    before = tasks[0].model.lm_head.weight.detach().clone()
    ours, bare = (run(*pair) for pair in zip((dpo.run_ours, dpo.run_bare), tasks, strict=True))
    assert not torch.equal(before, tasks[0].model.lm_head.weight)
    assert len(ours.losses) == len(bare.losses) == 3
    assert len(set(ours.losses)) == 3
    assert dpo.common.loss_difference(ours, bare) < 1e-5
    assert ours.tokens == bare.tokens > 0
    for mine, theirs in zip(tasks[0].model.parameters(), tasks[1].model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("algorithm", ["lora", "kto", "orpo", "simpo"])
def test_first_loss_is_the_formulas(dpo, make_task, algorithm):
    task = make_task(algorithm)
    step = next(dpo.batches(task))
    want = {"lora": math.log(2), "kto": 0.5}.get(algorithm)
    if want is None:
        losses = []
        for prompt, *answers in step.pairs():
            better, worse = (mean_logprob(task.model, prompt, answer) for answer in answers)
            if algorithm == "simpo":
                losses.append(math.log1p(math.exp(1.0 - 2.0 * (better - worse))))
            else:
                odds = [p - math.log1p(-math.exp(p)) for p in (better, worse)]
                losses.append(-better + 0.1 * math.log1p(math.exp(odds[1] - odds[0])))
        want = sum(losses) / len(losses)
    meter = run(dpo.run_ours, task)
    assert meter.losses[0] == pytest.approx(want, abs=1e-5)
    assert meter.losses[1] != meter.losses[0], "nothing was learned"


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own settings
@pytest.mark.parametrize(
    "algorithm",
    ["dpo", "kto", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("precomputed", "lora", "simpo"))],
)
def test_trl_does_the_same_work(dpo, make_task, algorithm):
    pytest.importorskip("trl")
    ours, theirs = (run(who, make_task(algorithm)) for who in (dpo.run_ours, dpo.PEERS["trl-fast"]))
    assert len(theirs.losses) == 3
    assert dpo.common.loss_difference(ours, theirs) < 1e-5
    assert ours.tokens == theirs.tokens


def test_prompts_count_once(dpo, make_task):
    for step in dpo.batches(make_task("dpo")):
        pairs = list(step.pairs())
        assert len(pairs) == 2
        assert step.tokens == sum(len(part) for pair in pairs for part in pair)
        for prompt, chosen, rejected in pairs:
            assert len(prompt) + max(len(chosen), len(rejected)) <= 128
            assert chosen[-1] == rejected[-1] == 1


def test_both_answers_are_kto_rows(dpo, make_task):
    for step in dpo.batches(make_task("kto")):
        answers = list(step.answers())
        assert sorted(good for _, _, good, _ in answers) == [False, False, True, True]
        own = {tuple(prompt): [a for p, a, *_ in answers if p == prompt] for prompt, *_ in answers}
        assert all(mismatch not in own[tuple(prompt)] for prompt, _, _, mismatch in answers)


def test_rows_have_the_lengths_of_real_ones(dpo, real):
    options = dpo.parse(real)
    rows = dpo.make_rows(options)
    texts = [(row["prompt"][0]["content"], row["chosen"], row["rejected"]) for row in rows]
    sizes = [[len(text.split()) for text in row] for row in texts]
    assert sizes == list(dpo.real_lengths(options))[:6]
    assert len({tuple(size) for size in sizes}) > 1


def test_short_rows_are_all_alike(dpo, tmp_path):
    options = dpo.parse([*SMALL, "--case", "short", "--cache", str(tmp_path)])
    for step in dpo.batches(dpo.make_task(options)):
        assert [[len(part) for part in pair] for pair in step.pairs()] == [[64, 64, 64]] * 2


def test_more_steps_than_the_data_fills_are_refused(dpo, real):
    with pytest.raises(SystemExit, match=r"has 8 pairs within the length, not 10; lower --steps"):
        dpo.make_rows(dpo.parse([*real, "--steps", "4"]))


def test_command_prints_two_tables(dpo, real, capsys, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    dpo.main([*real, "--algorithms", "precomputed", "--peers", "sft", "--rounds", "1"])
    lines = capsys.readouterr().out.strip().splitlines()
    header, _, ours, sft, _, scoring, _, first, again = (line.strip("| ").split(" | ") for line in lines)
    assert header == list(dpo.common.COLUMNS)
    assert ours[:2] == ["real, precomputed", "ours"]
    assert sft[:2] == ["real, precomputed", "sft"]
    assert sft[-1].startswith("memory 1.05x")
    assert scoring == list(dpo.SCORING_COLUMNS)
    assert (first[0], again[0]) == ("first", "again")
    assert float(first[1]) > 0


def test_log_probs_are_computed_once(dpo, make_task, tmp_path, monkeypatch):
    made = []
    make = ReferenceLogprobs.make
    monkeypatch.setattr(ReferenceLogprobs, "make", lambda self, *rest: (made.append(self), make(self, *rest)))
    for worker in ("first", "again"):
        task = make_task("precomputed", tmp_path / worker)
        run(dpo.SCORING[worker], task)
        assert len(made) == 1
        made.clear()
        assert task.meter.tokens == sum(step.tokens for step in dpo.batches(task))
        assert task.meter.seconds > 0


def test_precomputing_is_a_share_of_an_epoch(dpo):
    def meters(tokens, *seconds):
        return [dpo.Meter(1, tokens, s, 0.0, [0.5]) for s in seconds]

    found = {"ours": meters(80, 8.0, 7.0, 30.0), "first": meters(100, 5.0, 4.0), "again": meters(100, 0.04)}
    first, again = dpo.describe_precomputing(found)
    assert first == ["first", "4.50", "10.00", "0.45", "0.4 over by 0.05"]
    assert again == ["again", "0.04", "10.00", "0.00", "0.0 met"]


def test_memory_alone_may_be_the_goal(dpo):
    found = {name: [dpo.Meter(1, 100, 1.0, mib, [1.0])] for name, mib in (("ours", 52.0), ("sft", 50.0))}
    _, sft = dpo.common.rows("real", found, dpo.CASES["real"].goals["precomputed"])
    assert sft[-1] == "memory 1.05x met"


def test_peers_that_are_missing_are_named(dpo, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="bench"):
        dpo.main(["--peers", "trl"])


def test_warmup_is_needed(dpo, capsys):
    with pytest.raises(SystemExit):
        dpo.parse(["--warmup", "0"])
    assert "at least 1" in capsys.readouterr().err
