"""Linear layers over bitsandbytes' weights, where its own would compute something else; imports bitsandbytes."""

from __future__ import annotations

import copy
from typing import Any, cast

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def prepare(layer: Any) -> None:
    """Has a quantized layer compute with what its weights stand for: in training and in evaluation, on any device.

    Args:
        layer: A ``Linear4bit`` or ``Linear8bitLt``, which becomes a subclass of it where need be.
    """
    weight = layer.weight
    if weight.dtype == torch.int8:
        if weight.SCB is None:  # one that has run keeps its scales elsewhere
            weight.SCB = layer.state.SCB
        layer.__class__ = Int8Linear
    elif layer.in_features % weight.blocksize:
        layer.__class__ = NF4Linear
    else:
        # In evaluation, on a CPU with AVX512-BF16, bitsandbytes would pack the weights for a kernel that rounds
        # activations to bf16 and has no backward pass, which training would then meet.
        layer.support_avx512bf16_for_cpu = False


def weights_of(parameter: Any) -> Tensor:
    """(D_out, D_in) what quantized weights stand for, in fp32 or in the dtype that they had.

    Args:
        parameter: bitsandbytes' ``Params4bit`` or ``Int8Params``.
    """
    if parameter.dtype == torch.int8:
        if parameter.SCB.device != parameter.device:  # Module.to moves the parameter alone
            parameter.SCB = parameter.SCB.to(parameter.device)
        return cast(Tensor, bnb.functional.int8_vectorwise_dequant(parameter.data, parameter.SCB))
    # on a CPU bitsandbytes begins a block with every row, though blocks go on from row to row: here a row is a block
    rows = copy.copy(parameter.quant_state)
    rows.shape = torch.Size((parameter.quant_state.shape.numel() // rows.blocksize, rows.blocksize))
    return bnb.functional.dequantize_4bit(parameter.data, rows).view(parameter.quant_state.shape)


class Int8Linear(bnb.nn.Linear8bitLt):
    """bitsandbytes' 8-bit weights under products in the activations' dtype.

    LLM.int8() quantizes activations too, by way of fp16, but for features that are outliers anywhere in the batch. So
    what a token gives would depend on what shares its batch: ratios of PPO would not start at 1, and packed, padded
    and cached passes would differ. It also keeps the inputs of all layers beside gradient checkpointing, and on a CPU
    computes otherwise in training than in evaluation. Here a weight is what it is stored as, and nothing else rounds.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) to (..., D_out)."""
        return _linear(x, self)


class NF4Linear(bnb.nn.Linear4bit):
    """bitsandbytes' 4-bit weights where rows are no whole number of blocks, which it reads wrongly on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) to (..., D_out)."""
        return _linear(x, self)


def _linear(x: Tensor, layer: nn.Linear) -> Tensor:
    bias: Any = layer.bias
    bias = None if bias is None else bias.to(x.dtype)
    return cast(Tensor, _Linear.apply(x, layer.weight, bias))  # type: ignore[no-untyped-call]


class _Linear(torch.autograd.Function):
    """Keeps the quantized weights for the backward pass, not their copy in full precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: nn.Parameter, bias: Tensor | None) -> Tensor:
        ctx.parameter = parameter
        return F.linear(x, weights_of(parameter).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ weights_of(ctx.parameter).to(gradient.dtype), None, None
