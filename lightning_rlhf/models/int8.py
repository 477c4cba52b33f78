"""Linear layers over 8-bit weights that compute in the activations' dtype; imports bitsandbytes."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from bitsandbytes.functional import int8_vectorwise_dequant
from torch import Tensor


class Int8Linear(bnb.nn.Linear8bitLt):
    """bitsandbytes' 8-bit weights under products in the activations' dtype.

    LLM.int8() quantises activations too, by way of fp16, but for features that are outliers anywhere in the batch. So
    what a token gives would depend on what shares its batch: ratios of PPO would not start at 1, and packed, padded
    and cached passes would differ. It also keeps the inputs of all layers beside gradient checkpointing, and on a CPU
    computes otherwise in training than in evaluation. Here a weight is what it is stored as, and nothing else rounds.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) to (..., D_out)."""
        weight: Any = self.weight
        if weight.SCB.device != weight.device:  # Module.to moves the parameter alone
            weight.SCB = weight.SCB.to(weight.device)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out: Tensor = _Linear.apply(x, weight.data, weight.SCB, bias)
        return out


class _Linear(torch.autograd.Function):
    """Keeps the 8-bit weights for the backward pass, not their copy in full precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, int8_vectorwise_dequant(weight, scale).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return gradient @ int8_vectorwise_dequant(weight, scale).to(gradient.dtype), None, None, None
