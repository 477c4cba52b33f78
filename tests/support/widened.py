"""stories260K in a width that packs: its 172 wide MLP gets zero rows up to 192, which is the same function."""

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_rlhf.models.quantization import DTYPE
from lightning_rlhf.models.saving import save_pretrained

WIDTH = 192


def widen(model, width=WIDTH):
    """Adds zero rows to the gates and ups of a Llama's MLPs, and zero columns to the downs."""
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(layer.mlp, name)
            shape = (old.out_features, width) if name == "down_proj" else (width, old.in_features)
            new = nn.Linear(shape[1], shape[0], bias=False, dtype=old.weight.dtype)
            with torch.no_grad():
                new.weight.zero_()[: old.out_features, : old.in_features] = old.weight
            setattr(layer.mlp, name, new)
    model.config.intermediate_size = width
    return model


def save_widened(source, directory):
    """Writes the widened model with its tokenizer, as a stage exports it."""
    model = AutoModelForCausalLM.from_pretrained(source, **{DTYPE: torch.float32})
    return save_pretrained(widen(model), AutoTokenizer.from_pretrained(source), directory)
