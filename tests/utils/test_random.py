"""Keys are well-mixed functions of their parts."""

import itertools
import random

import torch

from lightning_rlhf.utils.random import next_sample_keys, sample_key, sample_state, signed


def test_keys_are_functions_of_all_parts_in_order():
    assert sample_key(1, 2, 3) == sample_key(1, 2, 3)
    assert len({sample_key(*p) for p in [(1, 2), (2, 1), (1, 2, 0), (0, 1, 2), (-1, 2), (2**40, 2)]}) == 6


def test_keys_of_neighbors_are_well_mixed():
    keys = [sample_key(0, i, j) for i in range(100) for j in range(100)]
    assert all(0 <= key < 2**32 for key in keys) and len(set(keys)) > 9_995
    for bit in range(32):
        assert abs(sum(key >> bit & 1 for key in keys) - 5_000) < 5 * 50  # five standard deviations
    flips = [(a ^ b).bit_count() for a, b in itertools.pairwise(keys)]
    assert abs(sum(flips) / len(flips) - 16) < 0.2


def test_a_device_goes_on_from_a_key_with_the_same_bits():
    draw = random.Random(0)
    keys, steps = [draw.randrange(-(2**40), 2**70) for _ in range(300)], [draw.randrange(10_000) for _ in range(300)]
    found = next_sample_keys(torch.tensor([signed(sample_state(key)) for key in keys]), torch.tensor(steps))
    assert found.dtype == torch.int32
    assert [bits % 2**32 for bits in found.tolist()] == [sample_key(*pair) for pair in zip(keys, steps, strict=True)]
