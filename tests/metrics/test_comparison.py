"""Rates equal what a loop counts, intervals what the score test says, and they cover the truth as often as they claim.

As a script, ``test_comparison.py STORE RANK``, this file is one process of two.
"""

import json
import math
import os

import pytest
import torch

from lightning_rlhf.metrics import WinRate, win_rate

NAN = float("nan")
# pairs of rank 0 and of rank 1, in updates; None is a rank that never updates
CASES = {"unequal": ([20, 3], [37]), "empty update": ([30, 30], [0]), "no update": (None, [25, 35])}


def verdicts(n=60, seed=0):
    """Verdicts in both orders with ties and gaps, and numbers of prompts of one to a few pairs."""
    g = torch.Generator().manual_seed(seed)
    values = torch.tensor([1.0, 1.0, 0.5, 0.0, NAN])
    a, b = values[torch.randint(0, 5, (2, n), generator=g)]
    return a, b, torch.randint(0, n // 2, (n,), generator=g)


def brute(a, b, prompt):
    """The same, pair by pair; the ends by bisection of the score test."""
    rows = [r for r in zip(a.tolist(), b.tolist(), prompt.tolist(), strict=True) if r[0] == r[0] and r[1] == r[1]]
    scores = [x if x == y else 0.5 for x, y, _ in rows]
    rate = sum(scores) / len(scores)
    groups = {}
    for score, (_, _, p) in zip(scores, rows, strict=True):
        groups.setdefault(p, []).append(score)
    m = len(groups)
    size = len(scores) / m
    variance = sum((sum(s - rate for s in g) / size) ** 2 for g in groups.values()) / m
    first = [v for v in a.tolist() if v == v] + [1 - v for v in b.tolist() if v == v]
    z = 1.959963984540054

    def accepted(p):
        # under p the variance of a prompt's score is p (1 - p), less what scores between 0 and 1 save
        saved = (rate * (1 - rate) - variance) * m / (m + z**2)
        return m * (rate - p) ** 2 <= z**2 * (p * (1 - p) - saved)

    def end(inside, outside):
        if accepted(outside):
            return outside
        for _ in range(100):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if accepted(middle) else (inside, middle)
        return inside

    center = (m * rate + z**2 / 2) / (m + z**2)
    return {
        "win_rate": rate,
        "low": end(center, 0.0),
        "high": end(center, 1.0),
        "wins": scores.count(1.0),
        "ties": scores.count(0.5),
        "losses": scores.count(0.0),
        "no_verdict": len(a) - len(rows),
        "first_place": sum(first) / len(first),
        "agreement": sum(x == y for x, y, _ in rows) / len(rows),
    }


def numbers(rates):
    return {name: value.item() for name, value in (rates if isinstance(rates, dict) else rates._asdict()).items()}


def fed(updates, columns):
    metric = WinRate()
    for part in zip(*(c.split(updates) for c in columns), strict=True):
        metric.update(*part)
    return metric


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("updates", [[60], [1, 59], [0, 20, 0, 39, 1], [1] * 60])
def test_any_split_equals_the_loop(updates, seed):
    columns = verdicts(seed=seed)
    want = brute(*columns)
    assert 0 < want["no_verdict"] < 60 and 0 < want["low"] < want["win_rate"] < want["high"] < 1
    assert numbers(fed(updates, columns).compute()) == pytest.approx(want, abs=1e-6)
    assert numbers(win_rate(*columns)) == pytest.approx(want, abs=1e-6)


def test_a_judge_that_takes_the_first_place_makes_ties():
    rates = numbers(win_rate(torch.ones(7), torch.zeros(7)))
    assert (rates["win_rate"], rates["ties"], rates["agreement"], rates["first_place"]) == (0.5, 7, 0, 1)
    rates = numbers(win_rate(torch.zeros(7), torch.ones(7)))
    assert (rates["win_rate"], rates["first_place"]) == (0.5, 0)


def test_a_win_needs_both_orders():
    rates = numbers(win_rate(torch.tensor([1.0, 1.0, 0.5, 0.0]), torch.tensor([1.0, 0.5, 0.0, 0.0])))
    assert (rates["wins"], rates["ties"], rates["losses"], rates["win_rate"]) == (1, 2, 1, 0.5)


def test_a_pair_without_a_verdict_in_one_order_counts_nowhere():
    rates = numbers(win_rate(torch.tensor([1.0, NAN, 0.0]), torch.tensor([1.0, 0.0, NAN])))
    assert (rates["wins"], rates["losses"], rates["no_verdict"], rates["win_rate"]) == (1, 0, 2, 1)


def test_no_pairs_are_nan():
    for rates in (win_rate(torch.empty(0), torch.empty(0)), win_rate(torch.tensor([NAN]), torch.tensor([1.0]))):
        assert all(math.isnan(rates._asdict()[name]) for name in ("win_rate", "low", "high", "agreement"))
    assert numbers(win_rate(torch.tensor([NAN]), torch.tensor([1.0])))["no_verdict"] == 1


def test_the_interval_of_single_pairs_without_ties_is_wilsons():
    """With figures of Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for wins, n, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    ):  # fmt: skip
        scores = (torch.arange(n) < wins).float()
        rates = win_rate(scores, scores)
        assert rates.low.item() == pytest.approx(low, abs=6e-5) and rates.high.item() == pytest.approx(high, abs=6e-5)


@pytest.mark.parametrize("n", [10, 30, 100])
@pytest.mark.parametrize("probabilities", [(0.5, 0.0), (0.1, 0.1), (0.3, 0.6), (0.2, 0.2), (0.05, 0.0), (0.45, 0.5)])
def test_the_interval_covers_the_truth(probabilities, n):
    """Exactly: the sum of the probabilities of all outcomes whose interval holds the true rate.

    The least of these is that of Wilson's interval at 0.05 of 10, where outcomes are few.
    """
    win, tie = probabilities
    loss = 1 - win - tie
    truth, covered, total = win + tie / 2, 0.0, 0.0
    for wins in range(n + 1):
        for ties in range(n + 1 - wins):
            losses = n - wins - ties
            logs = [
                k * math.log(p) if p else (0.0 if k == 0 else -math.inf)
                for k, p in ((wins, win), (ties, tie), (losses, loss))
            ]
            ways = math.lgamma(n + 1) - sum(math.lgamma(k + 1) for k in (wins, ties, losses))
            probability = math.exp(ways + sum(logs))
            total += probability
            if probability > 1e-12:
                scores = torch.tensor([1.0] * wins + [0.5] * ties + [0.0] * losses)
                rates = win_rate(scores, scores)
                covered += probability * (rates.low - 1e-6 <= truth <= rates.high + 1e-6)
    assert total == pytest.approx(1)
    assert 0.91 < covered <= 1 + 1e-9


def test_pairs_of_one_prompt_are_one_draw():
    """Each verdict ten times over, under one number a prompt, says no more than once."""
    a = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.5, 0.0, 1.0])
    once, often = win_rate(a, a), win_rate(a.repeat(10), a.repeat(10), torch.arange(7).repeat(10))
    assert often.low.item() == pytest.approx(once.low.item()) and often.high.item() == pytest.approx(once.high.item())
    alone = win_rate(a.repeat(10), a.repeat(10))
    assert alone.high - alone.low < 0.5 * (once.high - once.low)


def test_a_wider_interval_is_surer():
    a = verdicts()[0].nan_to_num()
    wide, narrow = win_rate(a, a, confidence=0.99), win_rate(a, a, confidence=0.8)
    assert wide.low < narrow.low < narrow.high < wide.high


def test_a_metric_reset_under_inference_mode_takes_updates_outside_it():
    columns = verdicts()
    metric = WinRate()
    with torch.inference_mode():
        metric.update(*verdicts(seed=2))
        metric.reset()
    metric.update(*columns)
    assert numbers(metric.compute()) == pytest.approx(numbers(win_rate(*columns)), abs=1e-6)


@pytest.fixture(scope="module")
def two_processes():
    """What each of two processes printed: one line per case."""
    from processes import run_ranks  # not at the top, because the processes run this file as a script

    return run_ranks(__file__)


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, two_processes):
    one = numbers(win_rate(*verdicts()))
    for out in two_processes:
        results = dict(json.loads(line) for line in out.splitlines())
        assert results[case] == pytest.approx(one, abs=1e-6)


def one_of_two(rank):
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=rank, world_size=2)
    for case, updates in CASES.items():
        mine = [c.split([sum(part or []) for part in updates])[rank] for c in verdicts()]
        metric = WinRate() if updates[rank] is None else fed(updates[rank], mine)
        print(json.dumps([case, numbers(metric.compute())]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_of_two(int(os.environ["LOCAL_RANK"]))
