"""Plans: every row once, balanced, repeatable, the same from any place."""

import dataclasses
import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlhf.data.packed import Branch, Size, StepTotals, Tree, unpack
from lightning_rlhf.data.planner import PlannedLoader, Planner, balance


def size(num_tokens, tokens, sequences, pairs=0.0):
    return Size(num_tokens, StepTotals(tokens, sequences, pairs))


def make_row(lengths, i):
    return Tree([i + 1], [Branch([i + 1] * lengths[i])])


def loaders(n=13, ranks=1, micro_batches=1, batch_size=4, workers=0):
    lengths = [3 + 5 * i % 11 for i in range(n)]
    planner = Planner([size(x + 1, x, 1) for x in lengths], batch_size, micro_batches, ranks, seed=3)
    return [PlannedLoader(functools.partial(make_row, lengths), planner, r, workers) for r in range(ranks)]


def seen(batch):
    return [t.prompt[0] - 1 for t in unpack(batch) if t.weight]


@pytest.mark.parametrize(("ranks", "micro"), list(itertools.product((1, 2, 3), (1, 3))))
def test_every_row_is_seen_once_an_epoch_over_ranks(ranks, micro):
    group = loaders(ranks=ranks, micro_batches=micro)
    epochs = []
    for epoch in range(3):
        for loader in group:
            loader.set_epoch(epoch)
        assert len({len(loader) for loader in group}) == 1 and len(group[0]) % micro == 0
        rows = [i for loader in group for b in loader for i in seen(b)]
        assert sorted(rows) == list(range(13))
        epochs.append(rows)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (2, 1), (2, 3)])
def test_steps_hold_the_same_rows_and_totals_for_any_split(ranks, micro):
    def steps(ranks, micro):
        group = [list(loader) for loader in loaders(ranks=ranks, micro_batches=micro)]
        out = []
        for start in range(0, len(group[0]), micro):
            bins = [b for g in group for b in g[start : start + micro]]
            assert {b.totals.bins for b in bins} == {ranks * micro}
            assert sum(float(b.weight.sum()) for b in bins) == bins[0].totals.tokens
            out.append((sorted(i for b in bins for i in seen(b)), bins[0].totals.tokens))
        return out

    assert steps(ranks, micro) == steps(1, 1)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_balance_is_within_the_known_bound_of_the_best(tokens, bins):
    dealt = balance(tokens, bins)
    assert sorted(i for b in dealt for i in b) == list(range(len(tokens)))
    loads = [sum(tokens[i] for i in b) for b in dealt]
    lower = max(max(tokens), sum(tokens) / bins)  # no deal can do better; Graham's bound for any list is 2 - 1/m
    assert max(loads) <= (2 - 1 / bins) * lower


def test_a_bin_over_the_budget_names_the_accumulation_that_fits():
    planner = Planner([size(10, 9, 1)] * 8, batch_size=8, max_tokens=20)
    with pytest.raises(ValueError, match="accumulate_grad_batches=4"):
        planner.steps(0)
    assert all(len(b.rows) == 2 for b in Planner([size(10, 9, 1)] * 8, 8, 4, max_tokens=20).steps(0)[0])
    with pytest.raises(ValueError, match="one row alone has 30"):
        Planner([size(30, 29, 1)], 8, max_tokens=20).steps(0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2])
def test_resume_from_any_place_gives_the_rest(workers, ranks):
    for place in (0, 1, 3):
        for rank in range(ranks):
            whole = loaders(ranks=ranks, micro_batches=2, workers=workers)[rank]
            whole.set_epoch(1)
            it = iter(whole)
            for _ in range(place):
                next(it)
            state = whole.state_dict()
            rest = [seen(b) for b in it]
            other = loaders(ranks=ranks, micro_batches=2)[rank]
            other.load_state_dict(state)
            other.set_epoch(1)
            assert len(other) == len(whole)
            assert [seen(b) for b in other] == rest
            other.set_epoch(2)
            assert len(list(other)) == len(other)


def test_another_plan_is_refused_on_resume():
    state = loaders(batch_size=4)[0].state_dict()
    with pytest.raises(ValueError, match="batch_size"):
        loaders(batch_size=2)[0].load_state_dict(state)


def test_the_global_rng_is_never_drawn_from():
    before = torch.get_rng_state()
    for workers in (0, 2):
        list(loaders(workers=workers)[0])
    assert torch.equal(torch.get_rng_state(), before)


def test_trees_stay_whole_and_count_their_branches():
    planner = Planner([size(9, 6, 3)] * 4, batch_size=6, shuffle=False)
    assert [b.rows for step in planner.steps(0) for b in step] == [(0, 1), (2, 3)]


SIZES = [size(2 + i % 7, 1 + i % 7, 1 + i % 3, 0.5) for i in range(200)]


@pytest.mark.parametrize("window", [None, 1, 7, 64, 150, 1000])
@pytest.mark.parametrize("sources", [None, [(150, 1), (50, 3)], [(150, 0.3), (50, 1.25)]])
@pytest.mark.parametrize("shuffle", [False, True])
def test_windows_start_anywhere_and_give_the_same_steps(window, sources, shuffle):
    planner = Planner(SIZES, 10, 2, 2, sources=sources, window=window, shuffle=shuffle, seed=1)
    for epoch in (0, 3):
        steps = planner.steps(epoch)
        assert len(steps) == planner.num_steps and all(any(b.rows for b in step) for step in steps)
        assert sum(len(b.rows) for step in steps for b in step) == planner.num_trees
        for start in (0, 1, 7, len(steps) - 1):
            assert [step for some in planner.windows(epoch, start) for step in some] == steps[start:]
        for step in steps:
            rows = [SIZES[i] for b in step for i in b.rows]
            sums = [sum(numbers) for numbers in zip(*(size.numbers for size in rows), strict=True)]
            assert {b.totals for b in step} == {dataclasses.replace(Size.of_numbers(sums).totals, bins=4)}
    if window and window < 150 and shuffle:  # a window mixes what lies far apart
        (first, *_) = planner.windows(0)
        rows = [i for step in first for b in step for i in b.rows]
        assert len(rows) <= max(64, window) + 64


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=60),
    st.integers(1, 12),
    st.sampled_from([None, 3, 64]),
    st.sampled_from([1.0, 2.0, 0.5, 0.37, 1.1]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_epochs_are_equally_long_and_lose_nothing(sequences, batch_size, window, weight, drop_last):
    sizes = [size(3, 2, n) for n in sequences]
    planner = Planner(sizes, batch_size, sources=[(len(sizes), weight)], window=window, drop_last=drop_last)
    counts = [0] * len(sizes)
    for epoch in range(6):
        steps = planner.steps(epoch)
        assert len(steps) == planner.num_steps
        assert all(bin.rows for step in steps for bin in step)
        for i in (i for step in steps for b in step for i in b.rows):
            counts[i] += 1
    if not drop_last:
        assert sum(counts) == 6 * planner.num_trees and max(counts) - min(counts) <= 1


@pytest.mark.parametrize(
    ("sequences", "steps"), [([1] * 13, [4, 4, 4, 1]), ([2] * 7, [4, 4, 4, 2]), ([3] * 4, [3] * 4)]
)
def test_trees_alike_fill_steps_exactly(sequences, steps):
    planner = Planner([size(3, 2, n) for n in sequences], 4, seed=2)
    assert [step[0].totals.sequences for step in planner.steps(0)] == steps
    dropped = Planner([size(3, 2, n) for n in sequences], 4, seed=2, drop_last=True).steps(0)
    assert [step[0].totals.sequences for step in dropped] == [n for n in steps if n == steps[0]]


def test_a_half_is_exact_and_the_next_epoch_brings_the_other():
    planner = Planner([size(3, 2, 1)] * 100, 8, sources=[(100, 0.5)], window=64, seed=4)
    halves = [{i for step in planner.steps(e) for b in step for i in b.rows} for e in range(4)]
    assert [len(h) for h in halves] == [50] * 4
    assert halves[0] | halves[1] == halves[2] | halves[3] == set(range(100))
    assert halves[0] != halves[2]
    assert halves[:2] == [{i for step in planner.steps(e) for b in step for i in b.rows} for e in (0, 1)]


def test_decimal_weights_are_exact():
    assert Planner([size(3, 2, 1)] * 10, 8, sources=[(10, 1.1)]).num_trees == 11  # 1.1 * 10 > 11 in floats


def test_a_source_may_be_empty():
    planner = Planner([size(3, 2, 2)] * 4, 4, sources=[(0, 2.0), (4, 0.5), (0, 1)])
    assert planner.num_steps == 1 and planner.num_trees == 2
    assert Planner([], 4, sources=[(0, 1.0)]).steps(0) == [] == Planner([], 4, window=8).steps(0)
