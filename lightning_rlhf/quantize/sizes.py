"""Bytes of a quantized model by formula: from shapes alone, so a model of any size can be planned without weights."""

from __future__ import annotations

from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from lightning_rlhf.quantize.grid import Grid, blocks_of, linear_layers, weight_of


class StoredBytes(NamedTuple):
    """Bytes of a model in the standard GPTQ format.

    Attributes:
        weights: Packed weights, ``bits`` each.
        grids: What belongs to groups: scales (fp16), packed zero points, and the group of each input (int32).
        rest: Embeddings, head, norms and biases.
    """

    weights: int
    grids: int
    rest: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def stored_bytes(model: PreTrainedModel, grid: Grid, dtype: torch.dtype | None = torch.float16) -> StoredBytes:
    """Counts the bytes that a model takes once it is quantized.

    Args:
        model: The model before it is quantized. Only shapes are read, so it may be on the ``meta`` device.
        grid: Bits and group size.
        dtype: Data type of what is not quantized. None: as the model has it.

    Example:
        Llama-2-7B takes 3.89 GB with groups of 128, of which 0.52 GB are embeddings and head::

            config = AutoConfig.from_pretrained("meta-llama/Llama-2-7b-hf")
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
            stored_bytes(model, Grid(bits=4, group_size=128)).total
    """
    layers = list(linear_layers(blocks_of(model)[1]).values())
    inside = {id(layer.weight) for layer in layers}
    shapes = [weight_of(layer).shape for layer in layers]
    return StoredBytes(
        weights=sum(outputs * inputs for outputs, inputs in shapes) * grid.bits // 8,
        grids=sum(
            inputs // grid.group_size * (outputs * 2 + outputs * grid.bits // 8) + inputs * 4
            for outputs, inputs in shapes
        ),
        rest=sum(p.numel() * (dtype or p.dtype).itemsize for p in model.parameters() if id(p) not in inside),
    )
