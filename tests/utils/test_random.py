"""Keys are well-mixed functions of their parts."""

import itertools

from lightning_rlhf.utils.random import sample_key


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
