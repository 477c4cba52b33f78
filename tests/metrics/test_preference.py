"""Agreement with preferences does not depend on how the pairs came, and equals what a loop counts.

As a script, ``test_preference.py STORE RANK``, this file is one process of two.
"""

import json
import math
import os

import pytest
import torch

from lightning_rlhf.metrics import PreferenceAccuracy, calibration, calibration_error, share_won

NAMES = (("web", "en"), ("web", "zh"), ("books", "en"))
# pairs of rank 0 and of rank 1, in updates; None is a rank that never updates
CASES = {"unequal": ([20, 3], [37]), "empty update": ([30, 30], [0]), "no update": (None, [25, 35])}


def pairs(n=60, seed=0):
    """Scores with ties, lengths some of which match, origins."""
    g = torch.Generator().manual_seed(seed)
    chosen, rejected = (torch.randn(n, generator=g) for _ in range(2))
    rejected[::7] = chosen[::7]
    lengths = torch.randint(5, 40, (2, n), generator=g)
    lengths[1, ::3] = lengths[0, ::3] + torch.randint(-4, 5, (len(lengths[1, ::3]),), generator=g)
    lengths[:, 1], lengths[:, 2], lengths[:, 4] = (
        torch.tensor([10, 9]), torch.tensor([30, 33]), torch.tensor([33, 33]),
    )  # fmt: skip
    return chosen, rejected, lengths[0], lengths[1], torch.randint(0, 3, (n,), generator=g)


def share(wins):
    return sum(wins) / len(wins) if wins else math.nan


def won(better, worse):
    return 1.0 if better > worse else 0.5 if better == worse else 0.0


def brute(chosen, rejected, long, short, origin, bins=10):
    """The same, pair by pair."""
    rows = list(zip(*(c.tolist() for c in (chosen, rejected, long, short, origin)), strict=True))
    matched = [r for r in rows if 10 * abs(r[2] - r[3]) <= max(r[2], r[3])]
    table = [[] for _ in range(bins)]
    for c, r, *_ in rows:
        probability = 1 / (1 + math.exp(-abs(c - r)))
        table[min(int((probability - 0.5) * 2 * bins), bins - 1)].append((probability, won(c, r)))
    error = sum(abs(share([p for p, _ in b]) - share([w for _, w in b])) * len(b) for b in table if b) / len(rows)
    out = {
        "accuracy": share([won(c, r) for c, r, *_ in rows]),
        "margin": share([c - r for c, r, *_ in rows]),
        "chosen_score": share([c for c, *_ in rows]),
        "rejected_score": share([r for _, r, *_ in rows]),
        "calibration_error": error,
        "length_accuracy": share([won(a, b) for _, _, a, b, _ in rows]),
        "matched_accuracy": share([won(c, r) for c, r, *_ in matched]),
        "matched_pairs": len(matched),
    }
    for name in {n for names in NAMES for n in names}:
        out[f"accuracy/{name}"] = share([won(c, r) for c, r, _, _, o in rows if name in NAMES[o]])
    return out, table


def fed(updates, columns):
    metric = PreferenceAccuracy()
    metric.names = NAMES
    for part in zip(*(c.split(updates) for c in columns), strict=True):
        metric.update(*part)
    return metric


def found(metric):
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("updates", [[60], [1, 59], [0, 20, 0, 39, 1], [1] * 60])
def test_any_split_equals_the_loop(updates):
    columns = pairs()
    want, _ = brute(*columns)
    assert 0 < want["matched_pairs"] < 60 and want["length_accuracy"] not in (0.0, 0.5, 1.0)
    assert found(fed(updates, columns)) == pytest.approx(want, abs=1e-6)
    assert found(fed(updates, columns)) == found(fed([60], columns))


def test_the_calibration_table_equals_the_loop():
    columns = pairs(400, seed=1)
    margin = columns[0] - columns[1]
    for bins in (1, 5, 10):
        want, table = brute(*columns, bins=bins)
        for got in (calibration(margin, bins), fed([400], columns).calibration(bins)):
            assert got.pairs.tolist() == [len(b) for b in table]
            assert got.won.tolist() == pytest.approx([share([w for _, w in b]) for b in table], nan_ok=True, abs=1e-6)
            probabilities = [share([p for p, _ in b]) for b in table]
            assert got.probability.tolist() == pytest.approx(probabilities, nan_ok=True, abs=1e-6)
        assert calibration_error(margin, bins).item() == pytest.approx(want["calibration_error"], abs=1e-6)


def test_calibration_of_scores_that_mean_what_they_say():
    g = torch.Generator().manual_seed(0)
    strength = 2 * torch.randn(20_000, generator=g)
    margin = torch.where(torch.rand(20_000, generator=g) < strength.sigmoid(), strength, -strength)
    assert calibration_error(margin) < 0.015
    assert calibration_error(4 * margin) > 0.1  # too sure
    assert calibration_error(margin / 4) > 0.1  # not sure enough
    certain = calibration(torch.tensor([200.0, -200.0]))
    assert certain.pairs.tolist() == [0] * 9 + [2] and certain.won[-1] == 0.5 and certain.won[:-1].isnan().all()


def test_ties_count_half_and_nothing_is_nan():
    assert share_won(torch.zeros(5)).item() == 0.5
    assert share_won(torch.tensor([1.0, 0.0, -1.0, -1.0])).item() == 0.375
    assert share_won(torch.empty(0)).isnan()


def test_lengths_match_within_a_tenth():
    chosen, length = torch.ones(6), torch.tensor([10, 10, 100, 100, 19, 20])
    other = torch.tensor([9, 8, 90, 89, 21, 20])
    metric = PreferenceAccuracy()
    metric.update(chosen, torch.zeros(6), length, other)
    assert metric.compute()["matched_pairs"] == 4  # 10 9, 100 90, 19 21, 20 20
    assert metric.compute()["length_accuracy"].item() == pytest.approx(4.5 / 6)


def test_a_name_without_pairs_is_nan_and_no_other_name_is_told():
    metric = PreferenceAccuracy()
    metric.names = (("web", "en"), ("rare",))
    metric.update(torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([5]), torch.tensor([5]), torch.tensor([0]))
    result = found(metric)
    assert {k for k in result if "/" in k} == {"accuracy/web", "accuracy/en", "accuracy/rare"}
    assert result["accuracy/web"] == result["accuracy/en"] == 0 and math.isnan(result["accuracy/rare"])


@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric:UserWarning")
def test_no_pairs_are_nan(updates):
    metric = PreferenceAccuracy()
    for _ in range(updates):
        metric.update(*(c[:0] for c in pairs()))
    result = found(metric)
    assert result.pop("matched_pairs") == 0
    assert len(result) == 7 and all(math.isnan(value) for value in result.values())


def test_half_precision_margins_are_taken_in_fp32():
    metric = PreferenceAccuracy()
    better, worse = torch.tensor([256.0, 257.0]).bfloat16(), torch.tensor([255.0, 3.015625]).bfloat16()
    metric.update(better, worse, torch.tensor([5, 5]), torch.tensor([5, 5]))
    assert metric.compute()["margin"].item() == (1 + 256 - 3.015625) / 2


def test_a_metric_reset_under_inference_mode_takes_updates_outside_it():
    columns = pairs()
    metric = PreferenceAccuracy()
    metric.names = NAMES
    with torch.inference_mode():
        metric.update(*pairs(seed=2))
        metric.reset()
    metric.update(*columns)
    assert found(metric) == found(fed([60], columns))


@pytest.fixture(scope="module")
def two_processes():
    """What each of two processes printed: one line per case."""
    from processes import run_ranks  # not at the top, because the processes run this file as a script

    return run_ranks(__file__)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, two_processes):
    one = found(fed([60], pairs()))
    for out in two_processes:
        results = dict(json.loads(line) for line in out.splitlines())
        assert results[case] == pytest.approx(one, abs=1e-6)


def one_of_two(rank):
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=2)
    for case, updates in CASES.items():
        mine = [c.split([sum(part or []) for part in updates])[rank] for c in pairs()]
        metric = PreferenceAccuracy() if updates[rank] is None else fed(updates[rank], mine)
        metric.names = NAMES
        print(json.dumps([case, found(metric)]), flush=True)
    dist.destroy_process_group()


def test_scores_that_are_no_numbers_are_not_counted_as_lost():
    """A reward model that diverged has no accuracy of 0, and is not well calibrated."""
    margin = torch.tensor([1.0, math.nan, -2.0])
    assert share_won(margin).isnan() and calibration_error(margin).isnan()
    metric = PreferenceAccuracy()
    metric.update(margin, torch.zeros(3), torch.tensor([5, 5, 5]), torch.tensor([9, 9, 9]))
    result = metric.compute()
    assert result["accuracy"].isnan() and result["matched_accuracy"].isnan() and result["length_accuracy"] == 0


@pytest.mark.parametrize("margin", [0.0, 3.0])
def test_one_pair_and_equal_pairs_are_defined(margin):
    for count in (1, 5):
        same = torch.full((count,), margin)
        assert share_won(same) == (1.0 if margin else 0.5)
        want = 1 - 1 / (1 + math.exp(-margin)) if margin else 0.0
        assert calibration_error(same).item() == pytest.approx(want, abs=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_of_two(int(os.environ["LOCAL_RANK"]))
