"""Writes the policy's weights where a server can read them."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.utils.filesystem import COMPLETE

#: Names of folders and adapters begin with it.
PREFIX = "lightning-rlhf-"


def reason_against_adapter(model: nn.Module) -> str | None:
    """Returns what vLLM can't load of the active adapter, or None.

    Args:
        model: A peft model.
    """
    peft: Any = model
    config = peft.peft_config[peft.active_adapters[0]]
    if getattr(config, "use_dora", False):
        return "DoRA"
    if getattr(config, "modules_to_save", None):
        return "modules that are trained in full (lora.modules_to_save)"
    if getattr(config, "trainable_token_indices", None):
        return "trained rows of new tokens"
    return None


def save_adapter(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path, state_dict: Mapping[str, Tensor] | None
) -> Path:
    """Saves the active adapter in a folder that is named by its content: equal weights have equal names.

    Args:
        model: A peft model.
        tokenizer: The tokenizer.
        directory: Where the folder is made.
        state_dict: Whole weights by the model's names, if its tensors are shards.

    Returns:
        The folder.
    """
    new = directory / f"{PREFIX}new"
    save_pretrained(model, tokenizer, new, state_dict=state_dict, adapter_only=True)
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update((new / name).read_bytes())
    named = directory / f"{PREFIX}{digest.hexdigest()[:16]}"
    if named.exists():
        shutil.rmtree(new)
    else:
        os.replace(new, named)
    return named


def save_merged(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, directory: Path, state_dict: Mapping[str, Tensor] | None
) -> Path:
    """Saves whole weights, with adapters merged into a copy, in a folder of a new name: servers may keep old paths.

    Args:
        model: A transformers model, or a peft model around one.
        tokenizer: The tokenizer.
        directory: Where the folder is made.
        state_dict: Whole weights by the model's names, if its tensors are shards.

    Returns:
        The folder.
    """
    return save_pretrained(model, tokenizer, directory / f"{PREFIX}{secrets.token_hex(8)}", state_dict=state_dict)


def remove_others(kept: Path) -> None:
    """Removes what this module wrote beside a folder, also in earlier runs.

    Args:
        kept: The folder that stays.
    """
    for folder in kept.parent.glob(f"{PREFIX}*"):
        if folder != kept and (folder / COMPLETE).exists():
            shutil.rmtree(folder)
