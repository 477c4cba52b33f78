"""The GPTQ format: codes in 32-bit words, and the directory that transformers, vLLM and SGLang read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_rlhf import __version__
from lightning_rlhf.quantize.grid import WORD, Grid, Rounded


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Packs codes along the first dimension, the first code in the lowest bits.

    Args:
        codes: (N, M) unsigned integers below ``2 ** bits``. N is a multiple of ``32 / bits``.
        bits: Bits of a code.

    Returns:
        (N * bits / 32, M) int32 words.
    """
    count = WORD // bits
    words = torch.zeros(len(codes) // count, codes.shape[1], dtype=torch.int32, device=codes.device)
    for i in range(count):
        words |= codes[i::count].to(torch.int32) << (bits * i)  # the highest bit becomes the sign
    return words


class PackedLinear(nn.Module):
    """A linear layer's tensors as the GPTQ format names and lays them out. It computes nothing.

    Args:
        rounded: The weights.
        grid: Their grid.
        bias: (D_out,) bias, or None.
    """

    def __init__(self, rounded: Rounded, grid: Grid, bias: Tensor | None) -> None:
        super().__init__()
        inputs = torch.arange(rounded.codes.shape[1], dtype=torch.int32)
        codes, scales, zeros = _without_zeros_of_0(rounded, grid)
        self.register_buffer("qweight", pack_words(codes.T, grid.bits).cpu())
        self.register_buffer("qzeros", pack_words(zeros - 1, grid.bits).T.contiguous().cpu())
        self.register_buffer("scales", scales.T.contiguous().cpu())
        self.register_buffer("g_idx", inputs // grid.group_size)
        if bias is not None:
            self.register_buffer("bias", bias.detach().cpu())


def _without_zeros_of_0(rounded: Rounded, grid: Grid) -> Rounded:
    """Writes groups whose zero is 0 with opposite signs: the same weights, by zeros that the format can hold.

    Its first version, which every reader knows, stores ``zeros - 1``. Of a zero of 0 some readers make 0, others 16,
    and others change the zeros beside it.
    """
    flipped = rounded.zeros == 0
    inner = flipped.repeat_interleave(grid.group_size, 1)
    return Rounded(
        torch.where(inner, grid.top - rounded.codes, rounded.codes),
        torch.where(flipped, -rounded.scales, rounded.scales),
        rounded.zeros.masked_fill(flipped, grid.top),
    )


def gptq_config(grid: Grid, method: str, blocks: str) -> dict[str, Any]:
    """Makes the ``quantization_config`` of a model's config. It names no kernel: that is the reader's choice.

    Args:
        grid: The grid.
        method: What rounded the weights, for the record.
        blocks: Name of the list of decoder layers.
    """
    return {
        "quant_method": "gptq",
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": grid.sym,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "lm_head": False,
        "pack_dtype": "int32",
        "block_name_to_quantize": blocks,
        "meta": {"quantizer": [f"lightning_rlhf:{__version__}"], "method": method},
    }
