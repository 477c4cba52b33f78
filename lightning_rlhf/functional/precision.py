"""The precision of reductions and exponentials."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """Casts half precision to fp32, and leaves fp32 and fp64 unchanged."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def without_subclass(tensor: Tensor) -> Tensor:
    """Returns the tensor without its subclass: in-place functions have no effect on ColossalAI's subclass."""
    return tensor if type(tensor) in (Tensor, torch.nn.Parameter) else tensor.as_subclass(Tensor)
