"""Random numbers of ranks that run a model together.

They draw alike, so that samples and dropout on activations that they share are the same, and apart where each has a
part of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_rlhf.utils.collectives import Ranks, gather_objects
from lightning_rlhf.utils.random import rng_state, set_rng_state

_State = tuple[Tensor, Tensor | None]


def draw_alike(ranks: Ranks) -> None:
    """Lets ranks draw the same random numbers from now on. All of them must call it."""
    set_rng_state(gather_objects(rng_state(), ranks)[0])


class BlockNoise:
    """Random numbers of one block of layers, between those that are cut by outputs and those that are cut by inputs.

    All ranks draw the same random numbers. Within a block with dropout each rank draws from a stream of its own, whose
    seed comes from the common stream. So it needs no state in checkpoints, and layers that are recomputed draw again
    what they drew.

    Args:
        ranks: Ranks that share a copy of the model.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._common: _State | None = None  # the other stream, while the block runs

    def install(self, block: nn.Module) -> tuple[Callable[[], Any], ...]:
        """Gives a block a stream of its own. Returns functions that undo it."""

        def enter(module: nn.Module, args: Any) -> None:
            self._common = None
            if module.training and has_dropout(module):
                seed = int(torch.randint(2**62, ()))
                self._common = _state()
                torch.manual_seed(seed + self._ranks.place)

        def leave(*call: Any) -> None:
            if self._common is not None:
                _set_state(self._common)
            self._common = None

        first = block.register_forward_pre_hook(enter)
        last = block.register_forward_hook(leave, always_call=True)
        return first.remove, last.remove

    def exclude(self, layer: nn.Module) -> tuple[Callable[[], Any], ...]:
        """Lets a layer within the block draw from the common stream. Returns functions that undo it."""

        def swap(*call: Any) -> None:
            if self._common is not None:
                self._common, own = _state(), self._common
                _set_state(own)

        first = layer.register_forward_pre_hook(swap)
        last = layer.register_forward_hook(swap, always_call=True)
        return first.remove, last.remove


def has_dropout(block: nn.Module) -> bool:
    """Whether a block, or a layer in it, draws random numbers in training."""
    for module in block.modules():
        own = {"dropout": module.p} if isinstance(module, nn.Dropout) else vars(module)
        if any("dropout" in name and isinstance(value, float) and value > 0 for name, value in own.items()):
            return True
    return False


@contextmanager
def own_stream(number: int) -> Iterator[None]:
    """Within it, random numbers come from a stream of its own, which the common stream and ``number`` determine."""
    seed, common = int(torch.randint(2**62, ())), _state()
    torch.manual_seed(seed + number)
    try:
        yield
    finally:
        _set_state(common)


def _state() -> _State:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_state(state: _State) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
