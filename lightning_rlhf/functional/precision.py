"""The precision that reductions and exponentials run in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """Half precision becomes fp32; fp32 and fp64 stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def plain(tensor: Tensor) -> Tensor:
    """The same values in a tensor without a subclass: ColossalAI's makes in-place functions of it do nothing."""
    return tensor if type(tensor) in (Tensor, torch.nn.Parameter) else tensor.as_subclass(Tensor)
