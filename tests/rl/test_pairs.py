"""Pairs of completions: which are chosen, and how they are cut for micro-batches."""

import math

import pytest
import torch

from lightning_rlhf.data import Branch, Tree, pack
from lightning_rlhf.data.packed import Pair
from lightning_rlhf.rl import Experience
from lightning_rlhf.rl.pairs import choose_pairs, cut_pairs, pair_weight, pairs_of_data


def experience(*groups):
    """Prompts of two tokens, each with completions of these lengths whose tokens are known numbers."""
    trees = [
        Tree([1, 2], [Branch([10 * i + j + 3] * n) for j, n in enumerate(group)]) for i, group in enumerate(groups)
    ]
    count = sum(map(sum, groups))
    return Experience(
        trees,
        tuple(range(5, 5 + len(trees))),
        reference_logprobs=torch.arange(float(count)),
        truncated=torch.zeros(sum(map(len, groups)), dtype=torch.bool),
    )


def named(found):
    """Pairs by the tokens of their completions, and the numbers that are known of those."""
    ends = torch.tensor([0, *found.lengths]).cumsum(0).tolist()
    out, first = [], 0
    for row, tree in zip(found.rows, found.trees, strict=True):
        for pair in tree.pairs:
            places = [first + j for j in (pair.better, pair.worse)]
            known = [found.reference_logprobs[ends[i] : ends[i + 1]].tolist() for i in places]
            tokens = [tree.branches[i - first].input_ids[0] for i in places]
            out.append((row, *zip(tokens, known, strict=True)))
        first += len(tree.branches)
    return out


def test_the_best_and_the_worst_are_a_pair_and_others_are_left_out():
    given = experience((1, 2, 1), (1, 1))
    found = choose_pairs(given, [0.5, -1.0, 2.0, 1.0, 1.0], "best_worst", 0.0)
    assert named(found.experience) == [(5, (5, [3.0]), (4, [1.0, 2.0]))]
    assert [len(tree.branches) for tree in found.experience.trees] == [2]
    assert (found.ties, found.flat) == (1, 1)


@pytest.mark.parametrize(
    ("scores", "choice", "margin", "want", "ties"),
    [
        ([3.0, 1.0, 2.0], "all", 0.0, [(3, 5), (3, 4), (5, 4)], 0),
        ([3.0, 1.0, 2.0], "all", 1.0, [(3, 4)], 2),
        ([3.0, 3.0, 2.0], "all", 0.0, [(3, 5), (4, 5)], 1),
        ([3.0, 1.0, 2.0], "best_worst", 2.0, [], 1),
        ([3.0, math.nan, 2.0], "all", 0.0, [(3, 5)], 0),
        ([math.nan, math.inf, 2.0], "best_worst", 0.0, [], 0),
    ],
)
def test_pairs_above_a_margin(scores, choice, margin, want, ties):
    found = choose_pairs(experience((1, 2, 3)), scores, choice, margin)
    assert [(better, worse) for _, (better, _), (worse, _) in named(found.experience)] == want
    assert (found.ties, found.flat) == (ties, not want)


def test_equal_completions_are_no_pair():
    given = Experience([Tree([1], [Branch([7]), Branch([7])])], (0,), truncated=torch.zeros(2, dtype=torch.bool))
    found = choose_pairs(given, [1.0, 2.0], "best_worst", 0.0)
    assert (len(found.experience.trees), found.ties, found.flat) == (0, 1, 1)


def test_trees_are_cut_between_pairs_and_lose_none():
    given = experience((3, 2, 4, 1), (2, 2))
    whole = choose_pairs(given, [1.0, 2.0, 3.0, 4.0, 1.0, 2.0], "all", 0.0).experience
    assert named(cut_pairs(whole, [0, 1], None)) == named(whole) and pair_weight(whole) == 7
    for limit in (9, 10, 11):
        pieces = cut_pairs(whole, [0, 1], limit)
        assert max(tree.num_tokens for tree in pieces.trees) <= limit
        assert named(pieces) == named(whole) and len(pieces.trees) > 2
        assert pair_weight(pieces) == 7
    assert named(cut_pairs(whole, [1], None)) == named(whole)[6:]
    with pytest.raises(ValueError, match=r"two completions of a pair have 9 tokens, over .*micro_batch_tokens=8"):
        cut_pairs(whole, [0, 1], 8)


def test_pairs_of_data_keep_margins_and_weights_and_drop_fillers():
    trees = [Tree([1], [Branch([2]), Branch([3, 4])], pairs=[Pair(1, 0, 0.5, 0.25)]), Tree([0], [Branch([0])], 0.0)]
    found = pairs_of_data(pack(trees, rows=(8, 9)))
    assert found.rows == (8,) and found.trees[0].pairs == (Pair(1, 0, 0.5, 0.25),)
    assert cut_pairs(found, [0], None).trees[0].pairs == (Pair(1, 0, 0.5, 0.25),)
