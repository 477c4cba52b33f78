"""Random generators and keys that depend on nothing but the numbers they are named by."""

from __future__ import annotations

import torch


def generator(*keys: int) -> torch.Generator:
    """A generator of its own for a tuple of keys; the global one is never touched."""
    seed = 0
    for key in keys:
        seed = (seed * 6364136223846793005 + key + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)


def sample_key(*parts: int) -> int:
    """A key for a :class:`Request`.

    Args:
        parts: What names the sample, such as seed, iteration, row of the prompt, number of the sample.

    Returns:
        A well-mixed hash of the parts, in their order, in 32 bits.
    """
    state = 0
    for part in parts:  # SplitMix64's finalizer, chained
        state = (state ^ part) + 0x9E3779B97F4A7C15 & _64_BITS
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _64_BITS
        state ^= state >> 31
    return state >> 32


_64_BITS = 2**64 - 1
