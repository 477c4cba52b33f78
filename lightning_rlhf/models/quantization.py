"""Frozen weights in 4 or 8 bits, of bitsandbytes or in the GPTQ format."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any, Literal, NoReturn

import torch
import transformers
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from lightning_rlhf.models import gptq

DTYPE = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
"""Name of ``from_pretrained``'s argument for the data type: transformers 5 deprecates the name that 4.51 needs."""

Quantization = Literal["nf4", "int8"]
"""``nf4``: NormalFloat in blocks of 64 with double quantization (Dettmers et al. 2023), 4.13 bits per weight. ``int8``:
8 bits with a scale per row (Dettmers et al. 2022). Activations are never quantized; see
:class:`~lightning_rlhf.models.quantized_layers.Int8Linear`."""


def require_bitsandbytes() -> None:
    """Checks that bitsandbytes can be used.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
        RuntimeError: This version of transformers does not support it on this machine, like 4.51 on a CPU.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModuleNotFoundError(
            "quantization needs bitsandbytes. Install it: pip install 'lightning_rlhf[quantization]'",
            name="bitsandbytes",
        )
    if not transformers.integrations.validate_bnb_backend_availability():
        raise RuntimeError(
            f"transformers {transformers.__version__} quantizes only on GPUs, and there is none. Use transformers 5 on "
            "a CPU, or quantization: null."
        )


def quantization_arguments(quantization: Quantization, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the arguments with which ``from_pretrained`` quantizes all linear layers except the head.

    Weights are loaded to torch's default device, which inside a Trainer is the training device.

    Args:
        quantization: The format.
        dtype: Data type of products and of layers that are not quantized.

    Raises:
        ModuleNotFoundError: bitsandbytes is not installed.
        RuntimeError: transformers does not support it on this machine.
        ValueError: The format is unknown.
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
        raise ValueError(f"quantization must be nf4, int8 or null; got {quantization!r}.")
    return {"quantization_config": config, "device_map": {"": str(torch.get_default_device())}}


def quantized(model: PreTrainedModel, quantization: Quantization | None, inference: bool = False) -> Any:
    """Returns a model with quantized linear layers, except the head, that is ready for training adapters.

    Args:
        model: A model with quantized weights, or one that is not quantized, which is copied.
        quantization: The format. None: keep the model's.
        inference: Keep kernels that are faster and have no backward pass.

    Raises:
        ValueError: The model is quantized in another way, or by a kernel without a backward pass.
    """
    if quantization is not None and any(map(gptq.is_gptq_layer, model.modules())):
        refuse_again(model.name_or_path, "gptq", quantization)
    if quantization is not None and not is_quantized(model):
        whole, name = model, model.name_or_path
        with torch.random.fork_rng(devices=()):
            arguments: dict[str, Any] = {DTYPE: whole.dtype, **quantization_arguments(quantization, whole.dtype)}
            # a state dict replaces the directory, as documented by transformers
            arguments |= {"config": copy.deepcopy(whole.config), "state_dict": whole.state_dict()}
            model = type(whole).from_pretrained(None, **arguments)
        model.name_or_path = name  # adapters name it as their base
        if whole.can_generate():
            model.generation_config = whole.generation_config
    gptq.prepare(model, inference)
    layers = [module for module in model.modules() if _is_bitsandbytes_layer(module)]
    if layers:
        from lightning_rlhf.models.quantized_layers import prepare

        for layer in layers:
            prepare(layer)
        # On a CPU the other parameters are views of the file or of another model, and would keep all of it in memory.
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.device.type == "cpu":
                parameter.data = parameter.data.clone()
    return model


def refuse_again(name: object, method: str, quantization: Quantization) -> NoReturn:
    """Refuses to quantize a model again.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"load.quantization={quantization!r}: the weights of {name} are already quantized ({method}) and would be "
        "rounded twice. Set it to null."
    )


def _is_bitsandbytes_layer(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and not module.weight.is_floating_point()


def is_quantized_layer(module: nn.Module) -> bool:
    """Whether a module is a linear layer with quantized weights that :func:`dequantized` can read."""
    return _is_bitsandbytes_layer(module) or gptq.is_gptq_layer(module)


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has a quantized layer."""
    return any(map(is_quantized_layer, model.modules()))


def dequantized(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """Converts a quantized layer to a plain layer on the CPU.

    Args:
        layer: A quantized linear layer, which does not change.
        dtype: Data type of the result.
    """
    if gptq.is_gptq_layer(layer):
        values = gptq.weights_of(layer)
    else:
        from lightning_rlhf.models.quantized_layers import weights_of

        values = weights_of(layer.weight)
    plain = nn.Linear(values.shape[1], values.shape[0], bias=False, device="meta")
    plain.weight = nn.Parameter(values.to("cpu", dtype), requires_grad=False)
    bias: Any = layer.bias
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to("cpu", dtype), requires_grad=False)
    return plain
