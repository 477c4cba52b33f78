"""Linear layers that compute exactly with bitsandbytes' weights. This module imports bitsandbytes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import Tensor

from lightning_rlhf.models.exact_linear import exact_linear


def prepare(layer: Any) -> None:
    """Makes a quantized layer compute with its dequantized weights, in training and evaluation, on any device.

    Args:
        layer: A ``Linear4bit`` or ``Linear8bitLt``. Its class may be replaced by a subclass.
    """
    weight = layer.weight
    if weight.dtype == torch.int8:
        if weight.SCB is None:  # after a forward pass the scales are in its state
            weight.SCB = layer.state.SCB
        layer.__class__ = Int8Linear
    elif layer.in_features % weight.blocksize:
        layer.__class__ = NF4Linear
    else:
        # In evaluation on a CPU with AVX512-BF16, bitsandbytes would convert the weights for a kernel that rounds
        # activations to bf16 and has no backward pass, so that later training would fail.
        layer.support_avx512bf16_for_cpu = False


def weights_of(parameter: Any) -> Tensor:
    """Returns the (D_out, D_in) dequantized weights, in fp32 or in their original data type.

    Args:
        parameter: bitsandbytes' ``Params4bit`` or ``Int8Params``.
    """
    if parameter.dtype == torch.int8:
        if parameter.SCB.device != parameter.device:  # Module.to only moves the parameter
            parameter.SCB = parameter.SCB.to(parameter.device)
        return cast(Tensor, bnb.functional.int8_vectorwise_dequant(parameter.data, parameter.SCB))
    # on a CPU bitsandbytes starts a new block in each row, but blocks continue over rows; so pass blocks as rows
    rows = copy.copy(parameter.quant_state)
    rows.shape = torch.Size((parameter.quant_state.shape.numel() // rows.blocksize, rows.blocksize))
    return bnb.functional.dequantize_4bit(parameter.data, rows).view(parameter.quant_state.shape)


class Int8Linear(bnb.nn.Linear8bitLt):
    """A linear layer with bitsandbytes' 8-bit weights and products in the data type of activations.

    LLM.int8() also quantizes activations, through fp16, except features that are outliers anywhere in the batch. So the
    result of a token would depend on the other tokens of the batch: PPO's ratios would not start at 1, and packed,
    padded and cached passes would differ. It also stores the inputs of all layers despite gradient checkpointing, and
    on a CPU training and evaluation differ. This layer only dequantizes the weights.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D_in) to (..., D_out)."""
        return exact_linear(x, partial(weights_of, self.weight), self.bias)


class NF4Linear(bnb.nn.Linear4bit):
    """A linear layer with 4-bit weights whose rows are not whole blocks: bitsandbytes reads these wrongly on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., D_in) to (..., D_out)."""
        return exact_linear(x, partial(weights_of, self.weight), self.bias)
