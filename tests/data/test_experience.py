"""Micro-batches of an experience: within the budget, in order, each token with its numbers."""

import pytest
import torch

from lightning_rlhf.data.experience import Experience
from lightning_rlhf.data.packed import Branch, Tree, unpack, within_budget

CPU = torch.device("cpu")


def experience():
    """Trees of 3, 1 and 4 completions; each token's number says whose it is."""
    sizes = [(4, [3, 1, 2]), (2, [2]), (3, [2, 2, 1, 3])]
    trees, numbers = [], []
    for t, (prompt, completions) in enumerate(sizes):
        branches = [Branch([100 * t + 10 * b + i for i in range(n)]) for b, n in enumerate(completions)]
        trees.append(Tree([7 + t] * prompt, branches))
        numbers += [float(i) for branch in branches for i in branch.input_ids]
    return Experience(trees, (5, 3, 8), {"number": torch.tensor(numbers)})


@pytest.mark.parametrize("budget", [None, 100, 11, 10, 7])
@pytest.mark.parametrize("chosen", [[0, 1, 2], [2, 0], [1], []])
def test_every_token_keeps_its_numbers_within_any_budget(budget, chosen):
    e = experience()
    seen, rows = [], []
    for batch, columns in e.micro_batches(chosen, budget, CPU):
        assert budget is None or batch.num_tokens <= budget
        assert columns["number"].tolist() == batch.target.tolist()  # made so that they are alike
        seen += [(tree.prompt, branch) for tree in unpack(batch) for branch in tree.branches]
        rows += [row for row, tree in zip(batch.rows, unpack(batch), strict=True) for _ in tree.branches]
    want = [(i, e.trees[i].prompt, b) for i in chosen for b in e.trees[i].branches]
    assert seen == [(prompt, branch) for _, prompt, branch in want]
    assert rows == [e.rows[i] for i, *_ in want]


def test_a_tree_that_fits_is_not_cut():
    e = experience()
    whole = [[tree.num_tokens for tree in part] for part in e.parts([0, 1, 2], 14)]
    assert whole == [[10, 4], [11]]
    assert [[tree.num_tokens for tree in part] for part in e.parts([0, 1, 2], 8)] == [[8], [6], [4], [8], [6]]


def test_what_can_not_be_cut_says_what_would_do():
    with pytest.raises(ValueError, match=r"have 7 tokens, over micro_batch_tokens=6: raise it to at least 7"):
        experience().parts([0], 6)
    assert within_budget([], 3) == within_budget([], None) == []
