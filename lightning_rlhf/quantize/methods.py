"""Quantizes a model layer by layer and writes it as a directory."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.models.loading import Dtype, load_config, load_exported, load_tokenizer
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.quantize.grid import (
    Grid,
    Rounded,
    blocks_of,
    check_method,
    check_shapes,
    linear_layers,
    weight_of,
)
from lightning_rlhf.quantize.packing import PackedLinear, gptq_config
from lightning_rlhf.utils.filesystem import check_replaceable
from lightning_rlhf.utils.progress import ProgressLine


def quantize(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    method: str,
    grid: Grid,
    rows: Sequence[Tensor] = (),
    *,
    dtype: Dtype | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Quantizes the linear layers of a model's decoder layers, and writes the model with its tokenizer.

    Embeddings, norms and heads keep their values. The model is held once, and each layer's weights only until they are
    packed.

    Args:
        source: Directory or hub id of a causal LM or a reward model. Adapters are merged first.
        out: Directory to write. It gets its name when it is complete.
        method: One of :data:`~lightning_rlhf.quantize.grid.METHODS`.
        grid: The grid of ``gptq``, ``autoround`` and ``rtn``.
        rows: Calibration rows, each a one-dimensional tensor of token ids. ``gptq`` and ``autoround`` need them.
        dtype: Data type of everything that is not quantized, except a reward model's head, which is fp32. Default: the
            one that the model was saved in.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The directory.

    Raises:
        FileExistsError: ``out`` holds something else.
        ModuleNotFoundError: A package that the method needs is not installed; the message says how to install it.
        OSError: The model cannot be read, or the disk is full.
        ValueError: There is no such method, the model is quantized already, or a layer does not fit the grid.
    """
    check_method(method)
    check_replaceable(out)
    check_not_quantized(source, trust_remote_code)
    tokenizer = load_tokenizer(source, trust_remote_code)
    model = load_exported(source, dtype, trust_remote_code)
    check_shapes(model, grid)
    _check_disk(model, grid, Path(out))
    _round_layers(model, grid)
    model.config.quantization_config = gptq_config(grid, method, blocks_of(model)[0])
    return save_pretrained(model, tokenizer, out)


def check_not_quantized(source: str | os.PathLike[str], trust_remote_code: bool = False) -> None:
    """Checks that a model is in full precision.

    Raises:
        OSError: The model does not exist.
        ValueError: It is quantized. Quantizing it again would round it twice.
    """
    found = getattr(load_config(source, trust_remote_code), "quantization_config", None)
    if found is not None:
        method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
        raise ValueError(
            f"{source} is already quantized ({getattr(method, 'value', method)}). Give the model that it was made from."
        )


def _check_disk(model: PreTrainedModel, grid: Grid, out: Path) -> None:
    """Checks that the result fits the disk."""
    layers = {id(layer.weight): weight_of(layer).shape for layer in linear_layers(blocks_of(model)[1]).values()}
    need = 0
    for parameter in model.parameters():
        if (shape := layers.get(id(parameter))) is None:
            need += parameter.nbytes
        else:
            need += shape.numel() * grid.bits // 8 + shape.numel() // grid.group_size * (2 + grid.bits // 4)
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(folder).free) < need:
        raise OSError(
            f"{out} needs {need / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB free. Free some, or choose "
            "another disk."
        )


def _round_layers(model: PreTrainedModel, grid: Grid) -> None:
    """Rounds each weight to its nearest number."""
    _, blocks = blocks_of(model)
    progress = ProgressLine("layers", len(blocks))
    device = compute_device()
    for i, block in enumerate(blocks):
        for name, layer in linear_layers(block).items():
            replace(block, name, grid.round(weight_of(layer).to(device)), grid)
        progress(i + 1)


def compute_device() -> torch.device:
    """Returns the device on which layers are quantized."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def replace(block: nn.Module, name: str, rounded: Rounded, grid: Grid) -> None:
    """Replaces a linear layer by its packed weights, so that its memory is free.

    Args:
        block: The decoder layer that has it.
        name: The layer's name in the block.
        rounded: Its weights.
        grid: Their grid.

    Raises:
        ValueError: A weight is not finite.
    """
    layer: Any = block.get_submodule(name)
    if not rounded.scales.isfinite().all():
        raise ValueError(f"{name} has weights that are not finite or too large for fp16 scales, so it has no grid.")
    parent, _, leaf = name.rpartition(".")
    setattr(block.get_submodule(parent), leaf, PackedLinear(rounded, grid, layer.bias))
