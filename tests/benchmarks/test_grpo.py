"""The GRPO benchmark at smoke size: whole steps on given tokens, a gradient that is the rows', an honest table."""

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--width", "32", "--layers", "1", "--vocab-size", "64", "--steps", "2", "--warmup", "1"]


@pytest.fixture(scope="module")
def grpo(load_benchmark):
    return load_benchmark("grpo")


def make(grpo, folder, **case):
    case = grpo.Case(**{"prompts": 2, "samples": 3, "length": 12, "new": 8, "update": 2.0, "iteration": 1.5} | case)
    return grpo.make_task(case, grpo.parse(SMALL), folder)


def gradient(grpo, task, prompts):
    """Norm of DAPO's first gradient, row by row and without padding."""
    total, tokens = 0.0, 0
    for prompt in prompts:
        given = task.completions[prompt]
        scores = torch.tensor(grpo.by_words([""] * len(given), [task.tokenizer.decode(ids) for ids in given]))
        opening = task.tokenizer(prompt).input_ids
        for ids, advantage in zip(given, (scores - scores.mean()) / (scores.std() + 1e-4), strict=True):
            logits = task.model(input_ids=torch.tensor([[*opening, *ids]])).logits[0, len(opening) - 1 : -1]
            total = total - advantage * logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()
            tokens += len(ids)
    grads = torch.autograd.grad(total / tokens, list(task.model.parameters()))
    return torch.cat([g.flatten() for g in grads]).norm().item()


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_ours_learns_from_the_given_tokens(grpo, tmp_path, varied, layout):
    task = make(grpo, tmp_path, varied=varied, sampled=not varied)
    want = gradient(grpo, task, task.batches()[0])
    before = [p.detach().clone() for p in task.model.parameters()]
    grpo.run_ours(task, layout)
    task.meter.finish()
    assert task.meter.losses[0] == pytest.approx(want, rel=1e-5)
    assert len(set(task.meter.losses)) == 3
    assert task.meter.tokens == 2 * task.tokens
    assert (task.meter.sampling > 0) == (not varied)
    assert task.meter.sampling < task.meter.seconds
    assert any(not torch.equal(p, old) for p, old in zip(task.model.parameters(), before, strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL's own settings
def test_trl_takes_the_same_steps(grpo, tmp_path):
    pytest.importorskip("trl")
    meters = []
    for name, run in grpo.CONTESTANTS.items():
        task = make(grpo, tmp_path / name, varied=True)
        run(task)
        task.meter.finish()
        meters.append(task.meter)
    ours, trl = meters
    assert len(trl.losses) == 3 and trl.sampling > 0
    assert grpo.common.loss_difference(ours, trl) < 1e-5


def test_lengths_are_the_cases(grpo, tmp_path):
    task = make(grpo, tmp_path, varied=True)
    sizes = {len(prompt.split()) for prompt in task.prompts}
    assert len(task.prompts) == len(set(task.prompts)) == 2 * 3 and min(sizes) >= 4 and max(sizes) <= 12
    assert {len(ids) for group in task.completions.values() for ids in group} <= set(range(1, 9))
    assert sorted(prompt for batch in task.batches() for prompt in batch) == sorted(task.prompts)
    fixed = make(grpo, tmp_path / "fixed")
    assert fixed.tokens == 2 * (12 + 3 * 8)


def test_table_shows_a_shortfall(grpo):
    def meters(*seconds, memory, norm):
        return [grpo.Meter(1, 1000, s, memory, [0.5, norm], sampling=s / 2) for s in seconds]

    case = grpo.Case(1, 16, 384, 64, 4.0, 2.8)
    found = {
        "ours": meters(2.0, 4.0, 8.0, memory=50.0, norm=0.25),
        "trl": meters(12.0, 12.0, 12.0, memory=100.0, norm=0.5),
    }
    update, iteration = grpo.rows(case, found, steps=2)
    assert update[:6] == ["1 x 16 of 384 + 64", "update", "1.00", "3.00", "3.00x", "1.50 to 6.00"]
    assert update[6:] == ["4.0x short by 1.00x, memory 0.33x over by 0.17x", "50, 100", "0.50x", "2e-01"]
    assert iteration[1:7] == ["iteration", "2.00", "6.00", "3.00x", "1.50 to 6.00", "2.8x met"]
    assert len(update) == len(iteration) == len(grpo.COLUMNS)
    assert [line[1] for line in grpo.rows(case._replace(sampled=False), found, steps=2)] == ["update"]


@pytest.mark.parametrize("trl", [True, False])
def test_costs_are_measured_in_both_layouts_and_drawn(grpo, tmp_path, monkeypatch, trl):
    import plots

    def stand_in(task):
        task.meter.seconds = 3.0

    monkeypatch.setattr(grpo, "run_trl", stand_in)
    found = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name if trl else None))
    monkeypatch.setattr(grpo, "importlib", found)

    sizes = {"completions": (1, 2), "prompt": (6, 12), "vocabulary": (40,), "width": (32,)}
    monkeypatch.setattr(grpo, "SIZES", sizes)
    monkeypatch.setattr(grpo, "RESULTS", tmp_path / "costs.jsonl")
    monkeypatch.setattr(plots, "IMAGES", tmp_path)
    labels, save = [], plots.save

    def watched_save(figure, image):
        labels.extend(panel.get_xlabel() for panel in figure.axes)
        save(figure, image)

    monkeypatch.setattr(plots, "save", watched_save)
    seen, run = [], grpo.run_ours

    def watched(task, *more):
        embeddings = task.model.get_input_embeddings().weight
        seen.append((task.case.samples, task.case.length, *embeddings.shape))
        run(task, *more)

    monkeypatch.setattr(grpo, "run_ours", watched)
    grpo.main([*SMALL, "--plot", "--rounds", "1"])
    points = json.loads((tmp_path / "costs.jsonl").read_text())["costs"]
    assert [(p["varied"], p["size"]) for p in points] == [(name, size) for name in sizes for size in sizes[name]]
    assert all(p["tree"] > 0 and p["padded"] > 0 for p in points)
    given = [1.5 / p["size"] if p["varied"] == "completions" else 1.5 / 8 for p in points]
    want = [None, *given[1:]] if trl else [None] * 6  # it takes no group of one
    assert [p.get("trl") for p in points] == want
    (_, _, vocabulary, width), other = seen[0], seen[::2]
    assert other == seen[1::2] and [row[0] for row in other] == [1, 2, 8, 8, 8, 8]
    assert [row[1] for row in other] == [384, 384, 6, 12, 384, 384]
    assert other[4][2] < vocabulary and other[4][3] == width and other[5][2:] == (vocabulary, 32)
    assert labels == [*plots.SIZES.values()]
    assert (tmp_path / "costs.svg").read_text().startswith("<?xml")


def test_a_worker_hands_over_its_sampling(grpo, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(BENCHMARKS.parent))
    (meter,) = grpo.common.alternate(grpo.__file__, ["ours"], 1, [*SMALL, "--case", "short"], "short")["ours"]
    assert 0 < meter.sampling < meter.seconds and len(meter.losses) == 3


def test_trl_that_is_missing_is_named(grpo, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="bench"):
        grpo.main([])
