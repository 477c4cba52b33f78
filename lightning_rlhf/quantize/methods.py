"""Quantizes a model layer by layer and writes it as a directory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.models.gptq import method_of, require
from lightning_rlhf.models.loading import Dtype, load_config, load_exported, load_tokenizer
from lightning_rlhf.models.quantization import Quantization, quantized, require_bitsandbytes
from lightning_rlhf.models.saving import no_progress_bars, save_pretrained
from lightning_rlhf.quantize.autoround import STEPS, AutoRounder, of_one_length
from lightning_rlhf.quantize.calibration import check_tokens, shapes_of
from lightning_rlhf.quantize.gptq import solve
from lightning_rlhf.quantize.grid import (
    CALIBRATED,
    GRIDLESS,
    Grid,
    Rounded,
    blocks_of,
    check_method,
    check_shapes,
    linear_layers,
    weight_of,
)
from lightning_rlhf.quantize.layerwise import LayerwiseRun
from lightning_rlhf.quantize.packing import PackedLinear, gptq_config
from lightning_rlhf.quantize.sizes import stored_bytes
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
    steps: int = STEPS,
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
        steps: Steps of ``autoround`` for each layer. More are more exact and take longer.
        trust_remote_code: Run code that comes with the model.

    Returns:
        The directory.

    Raises:
        FileExistsError: ``out`` holds something else.
        ModuleNotFoundError: A package that the method needs is not installed; the message says how to install it.
        OSError: The model cannot be read, or the disk is full.
        ValueError: There is no such method, the model is quantized already, a layer does not fit the grid, or there are
            too few calibration tokens.
    """
    check_method(method)
    check_out(out)
    check_not_quantized(source, trust_remote_code)
    if method in CALIBRATED and not rows:
        raise ValueError(f"{method} needs calibration rows, and there are none.")
    if method == "gptq":
        require("gptqmodel")
    elif method == "autoround":
        require("auto_round")
    elif method in GRIDLESS:
        require_bitsandbytes()
    if method not in GRIDLESS:
        shapes = shapes_of(source, trust_remote_code)
        check_shapes(shapes, grid)
        if method in CALIBRATED:
            check_tokens(rows, shapes)
    tokenizer = load_tokenizer(source, trust_remote_code)
    model = load_exported(source, dtype, trust_remote_code)
    if method in GRIDLESS:
        with no_progress_bars():
            model = quantized(model, cast(Quantization, method))
        return save_pretrained(model, tokenizer, out, keep_quantized=True)
    _check_disk(model, grid, Path(out))
    with torch.no_grad():
        _round_layers(model, method, grid, rows, steps)
    model.config.quantization_config = gptq_config(grid, method, blocks_of(model)[0])
    return save_pretrained(model, tokenizer, out)


def check_out(out: str | os.PathLike[str]) -> None:
    """Checks that an output directory does not exist, is empty, or holds another quantized model.

    Raises:
        FileExistsError: It holds something else, such as the model in full precision.
    """
    check_replaceable(out)
    config = Path(out) / "config.json"
    if config.exists() and "quantization_config" not in json.loads(config.read_text(encoding="utf-8")):
        raise FileExistsError(f"{out} holds a model in full precision, which would be lost. Choose another --out.")


def check_not_quantized(source: str | os.PathLike[str], trust_remote_code: bool = False) -> None:
    """Checks that a model is in full precision.

    Raises:
        OSError: The model does not exist.
        ValueError: It is quantized. Quantizing it again would round it twice.
    """
    if (method := method_of(load_config(source, trust_remote_code))) is not None:
        raise ValueError(f"{source} is already quantized ({method}). Give the model that it was made from.")


def _check_disk(model: PreTrainedModel, grid: Grid, out: Path) -> None:
    """Checks that the result fits the disk."""
    need = stored_bytes(model, grid, dtype=None).total
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if (free := shutil.disk_usage(folder).free) < need:
        raise OSError(
            f"{out} needs {need / 1e6:,.0f} MB, but {folder} has {free / 1e6:,.0f} MB free. Free some, or choose "
            "another disk."
        )


def _round_layers(model: PreTrainedModel, method: str, grid: Grid, rows: Sequence[Tensor], steps: int) -> None:
    """Replaces the linear layers of one decoder layer after another by packed weights."""
    name, blocks = blocks_of(model)
    progress = ProgressLine(f"{method}: layers", len(blocks))
    device = compute_device()
    if method == "rtn":
        for i, block in enumerate(blocks):
            _replace(
                f"{name}.{i}",
                block,
                {n: grid.round(weight_of(x).to(device)) for n, x in linear_layers(block).items()},
                grid,
            )
            progress(i + 1)
        return
    run = LayerwiseRun(model, of_one_length(rows) if method == "autoround" else rows, device)
    quantize_layer = AutoRounder(steps) if method == "autoround" else solve
    for i, block in enumerate(blocks):
        with run.layer(i):
            rounded = quantize_layer(run, i, block, grid)
        _replace(f"{name}.{i}", block, rounded, grid)
        progress(i + 1)


def compute_device() -> torch.device:
    """Returns the device on which layers are quantized."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _replace(name: str, block: nn.Module, rounded: Mapping[str, Rounded], grid: Grid) -> None:
    """Replaces linear layers of a decoder layer by their packed weights, so that their memory is free."""
    for layer, weights in rounded.items():
        if not weights.scales.isfinite().all():
            raise ValueError(f"{name}.{layer} has weights that are not finite or too large for scales in fp16.")
        parent, _, leaf = layer.rpartition(".")
        bias: Any = block.get_submodule(layer).bias
        setattr(block.get_submodule(parent), leaf, PackedLinear(weights, grid, bias))
