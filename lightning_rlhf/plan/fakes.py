"""Tensors with shapes and no numbers, and models that are made of them from a config."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Within it, new tensors have no numbers, and modules of them can be moved and cast.

    torch swaps a fake parameter with its moved copy and fails, because its own memo of fake tensors refers to both.
    Here a parameter that changes is replaced instead, as ``torch.__future__`` lets modules do with real ones.
    """
    former = nn.Module._apply
    nn.Module._apply = _replace  # type: ignore[method-assign]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        nn.Module._apply = former  # type: ignore[method-assign]


@contextmanager
def real_tensors() -> Iterator[None]:
    """Within it, new tensors have numbers: those of a batch, by which sequence parallelism deals its tokens to ranks.

    torch has no public way to leave its mode; ``tests/plan/test_shapes.py`` fails if this one goes.
    """
    with unset_fake_temporarily():
        yield


def _replace(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    made: dict[int, Any] = {}
    for module in self.modules() if recurse else (self,):
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    with torch.no_grad():
                        new = function(tensor)
                    if isinstance(tensor, nn.Parameter) and new is not tensor:
                        new = nn.Parameter(new, tensor.requires_grad)
                    made[id(tensor)] = new, tensor  # the old one is kept, so that its id stays its own
                tensors[name] = made[id(tensor)][0]
    return self
