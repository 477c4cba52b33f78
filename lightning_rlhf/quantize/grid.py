"""Grids: the numbers that a quantized weight can be, and the layers that have such weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.arguments import did_you_mean

METHODS = ("gptq", "autoround", "rtn", "nf4", "int8")
"""``gptq``: Frantar et al. 2022, by gptqmodel. ``autoround``: Cheng et al. 2023, by auto-round. ``rtn``: each weight to
the nearest number of its grid. These three write the GPTQ format. ``nf4`` and ``int8``: bitsandbytes, as in QLoRA."""

CALIBRATED = ("gptq", "autoround")
"""The methods that need calibration rows."""
GRIDLESS = ("nf4", "int8")
"""The methods with a format of their own instead of a grid."""

BITS = (4, 8)
GROUP_SIZES = (32, 64, 128, 256)
"""The group sizes that every CPU kernel for 4 bits can read."""

WORD = 32
"""Bits of a word of packed codes."""


class Rounded(NamedTuple):
    """A layer's weights on a grid: ``(codes - zeros) * scales``.

    Attributes:
        codes: (D_out, D_in) unsigned integers below ``2 ** bits``.
        scales: (D_out, G) step of each group, in fp16, as it is stored.
        zeros: (D_out, G) the code that stands for 0.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def values(self) -> Tensor:
        """Returns the (D_out, D_in) weights in fp32."""
        group = self.codes.shape[1] // self.scales.shape[1]
        scales, zeros = (t.float().repeat_interleave(group, 1) for t in (self.scales, self.zeros))
        return (self.codes.float() - zeros) * scales


@dataclass(frozen=True)
class Grid:
    """A grid: equal steps between the least and the greatest weight of each group.

    Args:
        bits: Bits of a code, 4 or 8.
        group_size: Number of inputs of a layer that share a scale. A smaller value is more exact and takes more memory:
            with 4 bits, 4.25 bits a weight in groups of 64, 4.13 in groups of 128 (a symmetric grid's zeros included).
        sym: Center the grid on 0, which all kernels can read. False: fit it to each group's range, which is more exact.

    Raises:
        ValueError: A value is not one of the choices.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"bits must be 4 or 8; got {self.bits}.")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(f"group_size must be one of {', '.join(map(str, GROUP_SIZES))}; got {self.group_size}.")

    def __str__(self) -> str:
        return f"{self.bits} bits, groups of {self.group_size}, {'symmetric' if self.sym else 'asymmetric'}"

    @property
    def top(self) -> int:
        """The greatest code."""
        return (1 << self.bits) - 1

    def fit(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Fits the grid to groups of weights.

        Args:
            groups: (..., N) weights, a group in each row.

        Returns:
            (...) scales and (...) zeros, both in fp32. Scales are numbers of fp16, because they are stored so.
        """
        groups = groups.float()
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        if self.sym:
            high = torch.maximum(high, -low)
            low = -high
        empty = high == low
        low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
        scales = ((high - low) / self.top).half().clamp(min=2.0**-24).float()
        zeros = (-low / scales).round().clamp(0, self.top)
        return scales, torch.full_like(zeros, (self.top + 1) // 2) if self.sym else zeros

    def encode(self, weight: Tensor, scales: Tensor, zeros: Tensor) -> Rounded:
        """Rounds weights to a fitted grid.

        Args:
            weight: (D_out, D_in) weights.
            scales: (D_out, G) scales.
            zeros: (D_out, G) zeros.
        """
        groups = weight.float().unflatten(1, (-1, self.group_size))
        scales = scales.half()
        codes = ((groups / scales.float()[..., None]).round() + zeros[..., None]).clamp(0, self.top)
        return Rounded(codes.flatten(1).to(torch.uint8), scales, zeros.to(torch.uint8))

    def round(self, weight: Tensor) -> Rounded:
        """Rounds each weight to the nearest number of its group's grid.

        Args:
            weight: (D_out, D_in) weights.
        """
        return self.encode(weight, *self.fit(weight.unflatten(1, (-1, self.group_size))))


# ------------------------------------------------------------------------------------------------------------ layers


def blocks_of(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Returns the name and the list of a model's decoder layers.

    Raises:
        ValueError: The model has no such list.
    """
    count = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return name, module
    raise ValueError(f"{type(model).__name__} has no list of {count} decoder layers, so it cannot be quantized.")


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Returns the linear layers of a decoder layer, by name. Subclasses of ``nn.Linear`` are not quantized."""
    return {n: m for n, m in module.named_modules() if type(m) is nn.Linear}


def weight_of(layer: nn.Linear) -> Tensor:
    """Returns a layer's (D_out, D_in) weights."""
    return layer.weight.detach()


def check_method(method: str) -> None:
    """Checks the name of a method.

    Raises:
        ValueError: There is no such method.
    """
    if method not in METHODS:
        near = did_you_mean(method, METHODS)
        raise ValueError(f"there is no method {method}{near} All: {', '.join(METHODS)}.")


def check_shapes(model: PreTrainedModel, grid: Grid) -> None:
    """Checks that all layers can be packed. It needs no weights, only shapes.

    Raises:
        ValueError: A layer cannot be packed. The message names it, and the group sizes that fit all layers.
    """
    name, blocks = blocks_of(model)
    layers = {f"{name}.{n}": weight_of(layer).shape for n, layer in linear_layers(blocks).items()}
    if not layers:  # GPT-2's are of another class, which transformers cannot read back in this format
        raise ValueError(f"{type(model).__name__} has no layers of the class Linear in {name}: it cannot be quantized.")
    for parameter, tensor in blocks.named_parameters():
        if tensor.dim() > 2 and parameter.rpartition(".")[0] not in linear_layers(blocks):
            raise ValueError(
                f"{name}.{parameter} holds several layers in one tensor, as experts do, so it would stay in full "
                "precision. Such models cannot be quantized here."
            )
    instead = "Use nf4 or int8, which take any shape, or add zero rows to"
    for layer, (outputs, inputs) in layers.items():  # what fits no grid comes first: another group size helps nobody
        if outputs % (WORD // grid.bits):
            raise ValueError(
                f"{layer} has {outputs} outputs, but {grid.bits}-bit codes need a multiple of {WORD // grid.bits}. "
                f"{instead} this layer."
            )
        if inputs % GROUP_SIZES[0]:
            raise ValueError(f"{layer} has {inputs} inputs, which no group size divides. {instead} the layer before.")
    for layer, (_, inputs) in layers.items():
        if inputs % grid.group_size:
            fit = [size for size in GROUP_SIZES if not any(shape[1] % size for shape in layers.values())]
            raise ValueError(
                f"{layer} has {inputs} inputs, which groups of {grid.group_size} do not divide. Sizes that fit all "
                f"layers: {', '.join(map(str, fit))}."
            )
