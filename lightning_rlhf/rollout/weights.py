"""A policy's weights as static decoding reads them: adapters merged, and cast once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


@contextmanager
def decoding_weights(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Within it, linear layers hold copies of the weights that they compute with.

    Active LoRA adapters are merged, in fp32, into layers of floating-point weights; a merged weight then has the type
    that the layer computes in, where it is rounded. Under autocast linear layers hold weights of autocast's type, which
    it would otherwise make in each pass. Adapters of quantized layers stay apart, and so do those that cannot be
    merged. Weights of other layers do not change, also if a linear layer shares them: tied embeddings stay.

    Afterwards the model has its own parameters again, which nothing has written to.

    Args:
        model: A transformers model, or a peft model around one, in eval mode.
        device: Where it is.
    """
    cast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    with ExitStack() as restore, torch.no_grad():
        with torch.autocast(device.type, enabled=False):
            for layer in model.modules():
                if _merges(layer):
                    _merge(layer, cast, restore)
            for layer in model.modules() if cast is not None else ():
                if _is_plain(layer):
                    for name, parameter in list(layer.named_parameters(recurse=False)):
                        if parameter.dtype == torch.float32:
                            _replace(layer, name, parameter.to(cast), restore)
        yield


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer is a linear one of torch or transformers: quantized ones have types of their own."""
    return type(layer) in (nn.Linear, Conv1D) and all(p.is_floating_point() for p in layer.parameters(recurse=False))


def _merges(layer: Any) -> bool:
    """Whether a layer has LoRA adapters that are active and not merged."""
    if not hasattr(layer, "merged_adapters"):
        return False
    from peft.tuners.lora import LoraLayer

    runs = isinstance(layer, LoraLayer) and not layer.disable_adapters and not layer.merged
    return runs and _is_plain(layer.get_base_layer())


def _merge(layer: Any, cast: torch.dtype | None, restore: ExitStack) -> None:
    base = layer.get_base_layer()
    with ExitStack() as undo:
        own = list(base.named_parameters(recurse=False))
        for name, parameter in own:
            _replace(base, name, parameter.to(torch.promote_types(parameter.dtype, torch.float32), copy=True), undo)
        try:
            layer.merge()
        except (NotImplementedError, RuntimeError, ValueError):  # some variants can't: they stay apart
            return
        undo.callback(layer.unmerge)  # its arithmetic is on the copy, which is left then
        for name, parameter in own:
            kind = cast if parameter.dtype == torch.float32 and cast is not None else parameter.dtype
            setattr(base, name, nn.Parameter(getattr(base, name).to(kind), requires_grad=False))
        restore.push(undo.pop_all())


def _replace(layer: nn.Module, name: str, tensor: torch.Tensor, restore: ExitStack) -> None:
    restore.callback(setattr, layer, name, getattr(layer, name))
    setattr(layer, name, nn.Parameter(tensor, requires_grad=False))
