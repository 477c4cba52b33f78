"""Random generators and keys that depend only on the numbers given."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


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
    return sample_state(*parts) >> 32


def sample_state(*parts: int) -> int:
    """Returns the 64 bits whose upper half is :func:`sample_key`; a further part goes on from there."""
    state = 0
    for part in parts:  # SplitMix64's finalizer, chained
        state = (state ^ part) + 0x9E3779B97F4A7C15 & _64_BITS
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _64_BITS
        state ^= state >> 31
    return state


def next_sample_keys(states: Tensor, parts: Tensor) -> Tensor:
    """Computes ``sample_key(*earlier, part)`` of many on their device.

    Args:
        states: (S,) int64 with the bits of ``sample_state(*earlier)``.
        parts: (S,) int64.

    Returns:
        (S,) int32 with the bits of the keys. Products wrap on all devices.
    """
    x = (states ^ parts) + signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * signed(0x94D049BB133111EB)
    return ((x ^ _shifted(x, 31)) >> 32).to(torch.int32)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifts int64 to the right as unsigned numbers."""
    return (x >> bits) & (1 << 64 - bits) - 1


def signed(bits: int) -> int:
    """Returns the int64 of 64 bits."""
    return bits - (bits >> 63 << 64)


_64_BITS = 2**64 - 1


def rng_state() -> dict[str, Any]:
    """This process's global RNG states, in types that a checkpoint loads safely."""
    name, keys, *rest = np.random.get_state()
    version, internal, gauss = random.getstate()
    cuda: list[Tensor] = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": (name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": (version, list(internal), gauss),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts back what :func:`rng_state` took."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
