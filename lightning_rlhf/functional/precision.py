"""The precision that reductions and exponentials run in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(values: Tensor) -> Tensor:
    """Half precision becomes fp32; fp32 and fp64 stay."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
