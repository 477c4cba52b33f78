"""Frozen weights in 4 or 8 bits, by bitsandbytes: the backbone of QLoRA."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

DTYPE = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
"""``from_pretrained``'s name of a dtype: transformers 5 deprecates the one that 4.51 needs."""

Quantization = Literal["nf4", "int8"]
"""``nf4``: NormalFloat in blocks of 64 with double quantization (Dettmers et al. 2023), 4.13 bits a weight. ``int8``: 8
bits and a scale a row (Dettmers et al. 2022); activations are never quantized, see
:class:`~lightning_rlhf.models.quantized_layers.Int8Linear`."""


def require_bitsandbytes() -> None:
    """Says what to install.

    Raises:
        ModuleNotFoundError: bitsandbytes isn't.
        RuntimeError: transformers doesn't let it run here, as 4.51 on a CPU.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            "quantization needs bitsandbytes: pip install 'lightning_rlhf[quantization]'", name="bitsandbytes"
        )
    if not transformers.integrations.validate_bnb_backend_availability():
        raise RuntimeError(
            f"transformers {transformers.__version__} quantizes on GPUs alone, and finds none here: use transformers 5 "
            "on a CPU, or quantization: null."
        )


def quantization_arguments(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """What ``from_pretrained`` takes to quantize linear layers, but for the head, as it loads them.

    Weights go to torch's default device, which inside a Trainer is the one that it trains on.

    Args:
        quantization: Which.
        dtype: That products are computed in, and of what is not quantized.

    Raises:
        ModuleNotFoundError: bitsandbytes isn't installed.
        RuntimeError: transformers doesn't let it run here.
        ValueError: Another name.
    """
    require_bitsandbytes()
    if quantization == "nf4":
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        raise ValueError(f"quantization={quantization!r} is neither nf4 nor int8.")
    return {"quantization_config": config, "device_map": {"": str(torch.get_default_device())}}


def quantized(model: PreTrainedModel, quantization: Quantization | None) -> Any:
    """A model whose linear layers, but for the head, are quantized and ready to be trained over.

    Args:
        model: As :func:`quantization_arguments` loaded it, or whole; then it stays as it is, and the result is another.
        quantization: Which; None: as the model is.
    """
    if quantization is not None and not is_quantized(model):
        whole, name = model, model.name_or_path
        with torch.random.fork_rng(devices=()):
            arguments: dict[str, Any] = {DTYPE: whole.dtype, **quantization_arguments(quantization, whole.dtype)}
            # a state dict serves in place of a directory, as its documentation says
            arguments |= {"config": copy.deepcopy(whole.config), "state_dict": whole.state_dict()}
            model = type(whole).from_pretrained(None, **arguments)
        model.name_or_path = name  # what adapters are adapters of
        if whole.can_generate():
            model.generation_config = whole.generation_config
    layers = [module for module in model.modules() if is_quantized_layer(module)]
    if layers:
        from lightning_rlhf.models.quantized_layers import prepare

        for layer in layers:
            prepare(layer)
        # On a CPU the rest are views of the file, and hold all of it in memory, or another model's own.
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
    return model


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether it is a linear layer of bitsandbytes that holds quantized weights."""
    return isinstance(module, nn.Linear) and not module.weight.is_floating_point()


def is_quantized(model: nn.Module) -> bool:
    """Whether any layer is."""
    return any(map(is_quantized_layer, model.modules()))


def dequantized(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A plain layer on the CPU with the weights that a quantized one stands for.

    Args:
        layer: A quantized linear layer, which stays as it is.
        dtype: Of the result.
    """
    from lightning_rlhf.models.quantized_layers import weights_of

    values = weights_of(layer.weight)
    plain = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(values.to("cpu", dtype), requires_grad=False)
    bias: Any = layer.bias
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to("cpu", dtype), requires_grad=False)
    return plain
