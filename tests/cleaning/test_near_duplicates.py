"""The index against brute force."""

import random

import pytest

from lightning_rlhf.cleaning import near_duplicates
from lightning_rlhf.cleaning.near_duplicates import NearDuplicates, shingles, similarity, sketch
from lightning_rlhf.cleaning.text import tokens

pytest.importorskip("rensa")


def texts(count, seed=0):
    """Texts of 20 words of a small vocabulary, a third of them with up to three words changed."""
    random.seed(seed)
    words = [f"w{i}" for i in range(400)]
    made = []
    for _ in range(count):
        if made and random.random() < 0.33:
            text = list(random.choice(made))
            for _ in range(random.randrange(4)):
                text[random.randrange(len(text))] = random.choice(words)
        else:
            text = random.choices(words, k=20)
        made.append(text)
    return made


def by_hand(one, other):
    a, b = set(shingles(one)), set(shingles(other))
    return len(a & b) / len(a | b)


@pytest.mark.parametrize("table", [near_duplicates._TABLE, 100])
def test_it_finds_what_brute_force_finds_but_for_what_minhash_misses(table, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_TABLE", table)
    rows = texts(600)
    index, kept, found, missed = NearDuplicates(), [], 0, 0
    for row, new in zip(rows, sketch(rows), strict=True):
        best = max(((by_hand(row, other), -i) for i, other in enumerate(kept)), default=(0.0, 0))
        match = index.find(new)
        if match is None:
            missed += best[0] >= 0.8
        else:  # what is found is really that similar
            assert match.similarity == pytest.approx(by_hand(row, kept[match.number]), abs=1e-9)
            assert match.similarity >= 0.8
            found += 1
            continue
        index.add(new)
        kept.append(row)
    assert len(index) == len(kept) > 400  # past the texts that are in memory
    assert found > 50 and missed <= 0.06 * (found + missed)


def test_equal_texts_are_found_whatever_their_length():
    index = NearDuplicates()
    rows = [tokens(text) for text in ("hello", "你好", "write a poem", "x " * 4000 + "y")]
    for new in sketch(rows):
        assert index.find(new) is None
        index.add(new)
    assert [index.find(new) for new in sketch(rows)] == [(i, 1.0) for i in range(4)]


def test_texts_without_tokens_are_like_no_other():
    index = NearDuplicates()
    for new in sketch([[], []]):
        assert index.find(new) is None
        index.add(new)
    assert len(index) == 2
    assert similarity(frozenset(), frozenset()) == 0


def test_a_sketch_does_not_depend_on_its_company():
    rows = texts(40)
    together = sketch(rows)
    for row, one in zip(rows, together, strict=True):
        (alone,) = sketch([row])
        assert alone.shingles == one.shingles and alone.values.digest() == one.values.digest()


@pytest.mark.parametrize("threshold", [0, -1, 1.5])
def test_thresholds_are_shares(threshold):
    with pytest.raises(ValueError, match="threshold"):
        NearDuplicates(threshold)
