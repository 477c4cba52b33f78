"""Packing, unpacking, splitting and padding are one batch seen four ways."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_rlhf.data.packed import Branch, Pair, StepTotals, Tree, pack, pad, split, unpack

ids = st.lists(st.integers(1, 50), min_size=1, max_size=6)


@st.composite
def branch(draw):
    tokens = draw(ids)
    scored = draw(st.lists(st.booleans(), min_size=len(tokens), max_size=len(tokens)))
    return Branch(tokens, None if all(scored) else scored)


@st.composite
def tree(draw):
    t = Tree(draw(ids), draw(st.lists(branch(), min_size=1, max_size=4)))
    if len(t.branches) > 1 and draw(st.booleans()):
        pair = st.permutations(range(len(t.branches))).map(lambda order: Pair(order[0], order[1], 0.5, 0.25))
        t = t._replace(pairs=tuple(draw(st.lists(pair, min_size=1, max_size=3))), origin=draw(st.integers(0, 3)))
    return t._replace(weight=draw(st.sampled_from([0.0, 1.0]))) if all(_count(b) for b in t.branches) else t


def _count(b):
    return len(b.input_ids) if b.scored is None else sum(b.scored)


trees = st.lists(tree(), min_size=1, max_size=5)


@given(trees)
@settings(max_examples=200, deadline=None)
def test_unpack_inverts_pack(rows):
    batch = pack(rows)
    assert unpack(batch) == rows
    assert batch.num_tokens == sum(t.num_tokens for t in rows)
    assert batch.num_scored == sum(t.num_scored for t in rows)
    assert batch.num_sequences == sum(len(t.branches) for t in rows)


@given(trees)
@settings(max_examples=100, deadline=None)
def test_padded_rows_are_prompt_then_completion(rows):
    batch, n = pack(rows), 0
    padded = pad(batch)
    sequences = [(t, b) for t in rows for b in t.branches]
    for i, (t, b) in enumerate(sequences):
        whole = [*t.prompt, *b.input_ids]
        assert padded.attention_mask[i].sum() == len(whole)
        assert padded.input_ids[i, : len(whole)].tolist() == whole
        assert padded.last[i] == len(whole) - 1
        scored = b.scored or [True] * len(b.input_ids)
        for j, read in enumerate(scored):
            if read:
                assert (padded.row[n], padded.column[n]) == (i, len(t.prompt) + j - 1)
                assert batch.target[n] == whole[padded.column[n] + 1]
                n += 1
    assert n == batch.num_scored


@given(trees, st.integers(30, 60))
@settings(max_examples=50, deadline=None)
def test_split_keeps_trees_whole_and_in_order(rows, budget):
    totals = StepTotals(7.0, 3.0, bins=2)
    parts = split(pack(rows, totals), budget)
    assert [t for p in parts for t in unpack(p)] == rows
    assert all(p.num_tokens <= budget and p.totals == totals for p in parts)


def test_prompts_last_token_predicts_the_first_of_every_branch():
    batch = pack([Tree([5, 6], [Branch([7]), Branch([8, 9])])])
    assert batch.predictor.tolist() == [1, 1, 3]
    assert batch.target.tolist() == [7, 8, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 2, 3]
    assert batch.last.tolist() == [2, 4]


def test_equal_lone_sequences_share_one_attention_call():
    batch = pack([Tree([1, 2], [Branch([3])]), Tree([1], [Branch([2, 3])]), Tree([1], [Branch([2])])])
    assert [(c.own.length, c.lengths) for c in batch.forest.calls] == [(6, (3, 3)), (2, (2,))]


def test_moves_with_its_totals_and_a_fresh_mask_cache():
    batch = pack([Tree([1], [Branch([2])])], StepTotals(10.0, 2.0, bins=4))
    batch.forest.mask(0, 1, None, torch.device("cpu"))
    moved = batch.to("cpu")
    assert moved.totals.bins == 4 and not moved.forest.masks
    assert moved.forest.trees == batch.forest.trees


@pytest.mark.parametrize(
    "rows", [[], [Tree([], [Branch([1])])], [Tree([1], [])], [Tree([1], [Branch([])])], [Tree([1], [Branch([1], [])])]]
)
def test_impossible_trees_are_refused(rows):
    with pytest.raises(ValueError, match=r"[Tt]ree|Completion"):
        pack(rows)


def test_a_tree_over_the_budget_is_refused():
    with pytest.raises(ValueError, match="max_tokens=3"):
        split(pack([Tree([1, 2], [Branch([3, 4])])]), 3)


def test_pairs_point_at_the_sequences_of_their_tree():
    rows = [
        Tree([1], [Branch([2]), Branch([3]), Branch([4])], pairs=[Pair(2, 0, 1.5, 0.5), Pair(1, 0)], origin=3),
        Tree([5], [Branch([6])]),
        Tree([7], [Branch([8]), Branch([9])], pairs=[Pair(0, 1)], origin=1),
    ]
    batch = pack(rows, rows=[7, 8, 9])
    first = batch.input_ids[batch.last]
    assert first[batch.pairs.better].tolist() == [4, 3, 8]
    assert first[batch.pairs.worse].tolist() == [2, 2, 9]
    assert batch.pairs.margin.tolist() == [1.5, 0.0, 0.0]
    assert batch.pairs.origin.tolist() == [3, 3, 1]
    assert batch.totals.pairs == 2.5
    parts = split(batch, 5)
    assert [p.rows for p in parts] == [(7,), (8, 9)]
    assert parts[1].pairs.better.tolist() == [1]
    assert parts[1].to("cpu").pairs.worse.tolist() == [2]


def test_nothing_waits_for_a_gpu_to_get_a_batch(monkeypatch):
    """There is no GPU here: what would be copied to one is noted, and stays."""
    batch = pack([Tree([5, 6], [Branch([7]), Branch([8, 9])], pairs=(Pair(0, 1, 0.5, 0.25),))])
    pinned, sent = [], []

    def pin_memory(tensor):
        pinned.append(tensor)
        return tensor.clone()

    def to(tensor, device, **settings):
        sent.append((device, settings))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", to)
    batch.to("cuda")
    assert len(sent) == len(pinned) > 5
    assert all(call == ("cuda", {"non_blocking": True}) for call in sent)
    del pinned[:], sent[:]
    batch.to("cpu")
    assert not pinned and all(call == ("cpu", {"non_blocking": False}) for call in sent)
