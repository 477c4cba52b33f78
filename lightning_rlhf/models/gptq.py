"""Weights in the GPTQ format: loads them with gptqmodel's kernels, and computes with what they stand for."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_rlhf.models.exact_linear import exact_linear
from lightning_rlhf.utils.memory import release_pages

INSTALL = (
    "pip install device-smi==0.5.7 tokenicer==0.0.14 pypcre==0.6.4 logbar==0.4.15 threadpoolctl==3.8.0 defuser==0.0.28 "
    "py-cpuinfo==9.0.0 && pip install --no-deps gptqmodel==7.7.0 optimum==2.3.0 auto-round==0.16.1"
)
"""The line that was tested. With their dependencies, gptqmodel would replace torch, although it runs with this one."""

FUSED_GROUPS = (32, 64, 128, 256)
"""Group sizes of the CPU kernel for 4 bits."""


def require(*packages: str) -> None:
    """Checks that packages for the GPTQ format are installed.

    Raises:
        ModuleNotFoundError: One is missing. The message names it and the line that installs it.
    """
    missing = [package.replace("_", "-") for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"GPTQ weights need {' and '.join(missing)}. Install: {INSTALL}", name=missing[0])


def import_gptqmodel() -> Any:
    """Imports gptqmodel quietly.

    Raises:
        ImportError: It does not run with this version of transformers.
        ModuleNotFoundError: It, or what transformers reads its weights with, is not installed.
    """
    require("gptqmodel", "optimum", "logbar")
    silence()
    try:
        return importlib.import_module("gptqmodel")
    except ImportError as error:
        raise ImportError(
            f"gptqmodel does not run with transformers {transformers.__version__} ({error}). Use transformers 5, and "
            f"install gptqmodel again: {INSTALL}"
        ) from error


def silence() -> None:
    """Hides gptqmodel's banner and tips, and keeps it from compiling its packing, which takes minutes and is not used.

    peft imports it, where it is installed, for any adapter.
    """
    os.environ.setdefault("GPTQMODEL_DISABLE_PACK_EXT", "1")
    if importlib.util.find_spec("logbar") is not None:
        from logbar import LogBar

        LogBar.shared().setLevel("ERROR")


@contextmanager
def quick_collections() -> Iterator[None]:
    """Within it, the garbage collector skips what is alive already.

    gptqmodel and auto-round collect garbage in every step, and walking the objects of all imported libraries takes far
    longer than the step.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


# ----------------------------------------------------------------------------------------------------------- loading


def method_of(config: Any) -> str | None:
    """Returns the method that quantized a model: ``gptq``, ``nf4``, ``int8`` ...; None for full precision.

    Args:
        config: The model's config, or what its file holds.
    """
    name = "quantization_config"
    found = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
    if not found:
        return None
    stored = found if isinstance(found, Mapping) else found.to_dict()
    if stored.get("load_in_4bit"):
        return str(stored.get("bnb_4bit_quant_type", "4 bits"))
    method = "int8" if stored.get("load_in_8bit") else stored.get("quant_method")
    return str(getattr(method, "value", method))


@contextmanager
def kernel_arguments(config: Any, dtype: Any, inference: bool) -> Iterator[dict[str, Any]]:
    """Makes the arguments with which ``from_pretrained`` loads GPTQ weights.

    Without them transformers would take a kernel that compiles C++ for minutes on a CPU. They are not saved: which
    kernel is best depends on the machine that reads the weights.

    Args:
        config: The model's config. For a model without GPTQ weights there are no arguments.
        dtype: Data type of activations.
        inference: Take the fastest kernel, even if it has no backward pass.

    Raises:
        ModuleNotFoundError: gptqmodel or optimum is not installed.
        ValueError: The format has a setting that no kernel supports.
    """
    if method_of(config) != "gptq":
        yield {}
        return
    import_gptqmodel()
    from transformers import GPTQConfig

    found = config.quantization_config
    stored = found if isinstance(found, dict) else found.to_dict()
    device = torch.get_default_device()
    if inference and torch.cuda.is_available() and dtype in (torch.float16, torch.bfloat16):
        backend, device = "auto", torch.device("cuda")
    elif device.type == "cpu" and stored["bits"] == 4 and stored["group_size"] in FUSED_GROUPS:
        backend = "gptq_torch_aten"
    else:
        backend = "gptq_torch"
    with warnings.catch_warnings(), quick_collections():
        warnings.filterwarnings("ignore", "You passed `quantization_config` or equivalent", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)  # optimum reads every attribute of every module
        yield {
            "quantization_config": GPTQConfig(bits=stored["bits"], backend=backend),
            "device_map": {"": str(device)},
        }


# ------------------------------------------------------------------------------------------------------------ layers


def is_gptq_layer(module: nn.Module) -> bool:
    """Whether a module is a layer of gptqmodel."""
    layers = sys.modules.get("gptqmodel.nn_modules.qlinear")
    return layers is not None and isinstance(module, layers.BaseQuantLinear)


def gptq_names(model: nn.Module) -> list[str]:
    """Returns the last parts of the names of a model's GPTQ layers, such as ``q_proj``."""
    return sorted({name.rpartition(".")[2] for name, module in model.named_modules() if is_gptq_layer(module)})


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Unpacks codes along the first dimension.

    Args:
        words: (N, M) int32 words, the first code in the lowest bits.
        bits: Bits of a code, which divide 32.

    Returns:
        (N * 32 / bits, M) int32 codes.
    """
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)[None, :, None]
    return (words[:, None] >> shifts).bitwise_and_((1 << bits) - 1).flatten(0, 1)


def weights_of(layer: Any) -> Tensor:
    """Returns the (D_out, D_in) weights of a GPTQ layer in fp32.

    Args:
        layer: The layer.

    Raises:
        ValueError: Its kernel has brought the weights into an order of its own.
    """
    if not _in_standard_order(layer):
        raise ValueError(
            f"{type(layer).__name__} has repacked its weights, which cannot be read again. Load the model again."
        )
    zeros = unpack_words(layer.qzeros.T, layer.bits).T + (1 if layer.qzero_format() == 1 else 0)
    scales, order = layer.scales.float(), layer.g_idx.long()
    values = unpack_words(layer.qweight, layer.bits).float()
    # in place: the largest layer's weights are the most memory that a pass takes
    if torch.equal(order, torch.arange(len(order), device=order.device) // layer.group_size):
        groups = values.unflatten(0, (len(scales), -1))
        groups.sub_(zeros[:, None]).mul_(scales[:, None])
    else:  # groups of inputs that do not lie side by side
        values.sub_(zeros[order]).mul_(scales[order])
    return values.T


def _in_standard_order(layer: Any) -> bool:
    words: Tensor = layer.qweight
    inputs: int = layer.in_features
    return words.dtype == torch.int32 and words.shape == (inputs * layer.bits // 32, layer.out_features)


class ExactGPTQ:
    """A GPTQ layer that computes with the dequantized weights, in training and evaluation, on any device.

    gptqmodel's CPU kernel for 4 bits repacks its weights in the first half-precision pass of an evaluation, and has no
    backward pass from then on: gradients would silently end there. In other passes it rounds the weights to fp16 and
    keeps them for the backward pass. Its kernel for 8 bits compiles its code in the first pass.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        """Maps (..., D_in) to (..., D_out)."""
        return exact_linear(x, partial(weights_of, self), self.bias)


def prepare(model: Any, inference: bool) -> None:
    """Makes GPTQ layers compute exactly, with a backward pass, unless their kernel is for inference in half precision.

    Args:
        model: A model with GPTQ layers.
        inference: Keep the kernels of half-precision models, which are faster.

    Raises:
        ValueError: A layer's kernel has no backward pass. The message names both.
    """
    layers = [(name, layer) for name, layer in model.named_modules() if is_gptq_layer(layer)]
    for name, layer in layers:
        kind: Any = type(layer)
        if isinstance(layer, ExactGPTQ):
            continue
        if inference and not _compiles(layer) and _halves(model):
            _repack(layer, model.dtype)
            continue
        if not (kind.SUPPORTS_TRAINING and _in_standard_order(layer)):
            raise ValueError(
                f"{name} has the kernel {kind.__name__}, which has no backward pass. Load the model from its "
                "directory, or with the backend gptq_torch."
            )
        layer.__class__ = _exact(kind)


def _repack(layer: Any, dtype: Any) -> None:
    """Brings the weights of a CPU kernel into its order, which it would do in its first pass.

    Here the file's own copy of the weights can be given back one layer after another. Later it stays resident beside
    the kernel's until the last tensor of the file is gone, and a model needs twice the memory.

    Args:
        layer: The layer. Kernels of GPUs have no such order.
        dtype: Data type of activations.
    """
    if not hasattr(layer, "transform_cpu") or layer.qweight.device.type != "cpu":
        return
    if _in_standard_order(layer):
        words = layer.qweight
        layer.transform("cpu", dtype)
        release_pages(words)
        layer.scales = layer.qzeros = None  # the kernel has made one tensor of both
    layer.linear_mode = "inference"  # else a pass in training mode would read the weights in their former order


def _halves(model: Any) -> bool:
    return getattr(model, "dtype", None) in (torch.float16, torch.bfloat16)


def _compiles(layer: Any) -> bool:
    return type(layer).__name__ == "TorchLinear"


_KINDS: dict[type, type] = {}


def _exact(kind: type) -> type:
    """Returns a kernel's class with the exact forward pass, the same one for all layers."""
    if kind not in _KINDS:
        _KINDS[kind] = type(f"Exact{kind.__name__}", (ExactGPTQ, kind), {})
    return _KINDS[kind]
