"""Random generators and keys that depend only on the numbers given."""

from __future__ import annotations

import torch


def generator(*keys: int) -> torch.Generator:
    """Makes a generator from a tuple of keys. The global generator does not change."""
    seed = 0
    for key in keys:
        seed = (seed * 6364136223846793005 + key + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)


def sample_key(*parts: int) -> int:
    """Computes a key for a :class:`Request`.

    Args:
        parts: Numbers that identify the sample, such as seed, iteration, row of the prompt, index of the sample.

    Returns:
        A well-mixed 32-bit hash of the parts in their order.
    """
    state = 0
    for part in parts:  # SplitMix64's finalizer, chained
        state = (state ^ part) + 0x9E3779B97F4A7C15 & _64_BITS
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _64_BITS
        state ^= state >> 31
    return state >> 32


_64_BITS = 2**64 - 1
