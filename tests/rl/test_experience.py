"""Micro-batches of an experience: within the budget, in order, each token with its numbers."""

import dataclasses

import pytest
import torch

from lightning_rlhf.data.packed import Branch, Tree, pack, unpack, within_budget
from lightning_rlhf.models import Policy, load_causal_lm
from lightning_rlhf.rl import Experience, UpdateStats
from lightning_rlhf.rl import experience as module

CPU = torch.device("cpu")


def experience():
    """Trees of 3, 1 and 4 completions; each token's number says whose it is."""
    sizes = [(4, [3, 1, 2]), (2, [2]), (3, [2, 2, 1, 3])]
    trees, numbers = [], []
    for t, (prompt, completions) in enumerate(sizes):
        branches = [Branch([100 * t + 10 * b + i for i in range(n)]) for b, n in enumerate(completions)]
        trees.append(Tree([7 + t] * prompt, branches))
        numbers += [float(i) for branch in branches for i in branch.input_ids]
    truncated = torch.tensor([len(branch.input_ids) > 2 for tree in trees for branch in tree.branches])
    return Experience(trees, (5, 3, 8), old_logprobs=torch.tensor(numbers), truncated=truncated)


@pytest.mark.parametrize("budget", [None, 100, 11, 10, 7])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [2, 0], [1], []])
def test_every_token_keeps_its_numbers_within_any_budget(budget, chosen):
    e = experience()
    seen, rows = [], []
    for part in e.micro_batches(chosen, budget, CPU):
        batch = part.batch
        assert budget is None or batch.num_tokens <= budget
        assert part.old_logprobs.tolist() == batch.target.tolist()  # made so that they are alike
        assert part.truncated.tolist() == [length > 2 for length in part.lengths]
        assert not len(part.values)  # nobody knows them yet
        seen += [(tree.prompt, branch) for tree in unpack(batch) for branch in tree.branches]
        rows += [row for row, tree in zip(batch.rows, unpack(batch), strict=True) for _ in tree.branches]
    want = [(i, e.trees[i].prompt, b) for i in chosen for b in e.trees[i].branches]
    assert seen == [(prompt, branch) for _, prompt, branch in want]
    assert rows == [e.rows[i] for i, *_ in want]


def test_a_tree_that_fits_is_not_cut():
    e = experience()
    assert sizes(e, 14) == [[10, 4], [11]]
    assert sizes(experience(), 8) == [[8], [6], [4], [8], [6]]


def sizes(e, budget):
    return [[tree.num_tokens for tree in trees] for trees in e.split_by_tokens([0, 1, 2], budget)]


def test_all_trees_are_packed_once(monkeypatch):
    packed = []
    monkeypatch.setattr(module, "pack", lambda trees, **options: (packed.append(trees), pack(trees, **options))[1])
    e = experience()
    for _ in range(3):
        assert len(e.split_by_tokens([0, 1, 2], 14)) == len(list(e.micro_batches([0, 1, 2], 14, CPU))) == 2
    assert len(packed) == 2
    for _ in range(3):  # one micro-batch is the whole
        assert [part.batch.num_tokens for part in e.micro_batches([0, 1, 2], None, CPU)] == [e.batch.num_tokens]
    assert len(packed) == 3


def held(value, seen=None):
    """Bytes of the distinct storages that an object holds."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    elif isinstance(value, dict):
        held([*value.values()], seen)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            held(entry, seen)
    elif dataclasses.is_dataclass(value):
        held(vars(value), seen)
    return sum(seen.values())


def test_attention_masks_are_not_kept(tiny_model_dir):
    """They are (tokens of a branch) x (tokens before and in it), and the rest of a batch goes with its tokens."""
    policy = Policy(load_causal_lm(tiny_model_dir), layout="packed")
    branches = [Branch([1] * (60 + i)) for i in range(6)]
    e = Experience([Tree([2] * 80, branches)], (0,), old_logprobs=torch.zeros(sum(60 + i for i in range(6))))
    list(e.micro_batches([0], None, CPU))
    before, in_use = held(e), []
    with torch.no_grad():
        for _ in range(3):
            for part in e.micro_batches([0], None, CPU):
                policy(part.batch)
                in_use.append(held(part))
    assert held(e) == before
    masks = sum((60 + i) * (80 + 60 + i) for i in range(6))
    assert min(in_use) > masks > before  # bytes: what was held in an iteration, and what is held now


def test_a_filler_counts_for_nothing():
    e = experience()
    e.weight = torch.ones(16)
    *_, filler = e.micro_batches([1], None, CPU, at_least=2)
    assert filler.batch.num_scored == 1 and not filler.weight.any() and not filler.counts.any() and not filler.rows


def test_statistics_are_weighted_sums_and_maxima():
    stats = UpdateStats()
    for values in ([1.0, 3.0], [5.0]):
        stats.add(torch.full((len(values),), 0.5), loss=torch.tensor(values))
        stats.peak(ratio=torch.tensor(values))
    assert stats.reduce(CPU) == {"loss": 4.5, "ratio": 5.0}


def test_what_can_not_be_cut_says_what_would_do():
    with pytest.raises(ValueError, match=r"have 7 tokens, over updates.micro_batch_tokens=6: raise it to at least 7"):
        experience().split_by_tokens([0], 6)
    assert within_budget([], 3) == within_budget([], None) == []
