"""A linear layer over weights that are dequantized in each pass and not kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def exact_linear(x: Tensor, weights: Callable[[], Tensor], bias: Any = None) -> Tensor:
    """Maps (..., D_in) to (..., D_out), and sends gradients to its input alone.

    The backward pass dequantizes the weights again, so that a graph holds them in no layer.

    Args:
        x: Activations. Products are in their data type.
        weights: Returns the (D_out, D_in) weights.
        bias: (D_out,) bias, or None.
    """
    bias = None if bias is None else bias.to(x.dtype)
    return cast(Tensor, _Linear.apply(x, weights, bias))  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Callable[[], Tensor], bias: Tensor | None) -> Tensor:
        ctx.weights = weights
        return F.linear(x, weights().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.weights().to(gradient.dtype), None, None
