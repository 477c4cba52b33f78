"""The reference of preference and reinforcement learning: the model that training starts from, frozen."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.models.loading import Load, adapters_of, load_causal_lm, load_tokenizer
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.utils.filesystem import atomic_file

Pretrained = str | os.PathLike[str] | PreTrainedModel


def load_reference(
    pretrained: Pretrained, load: Load, tokenizer: PreTrainedTokenizerBase, new_token_ids: tuple[int, ...]
) -> Policy:
    """Loads a frozen model, independent of the one that is trained.

    Args:
        pretrained: Directory, hub id, or a model, which is copied.
        load: How weights are held, quantized ones too: a copy then rounds as the policy does.
        tokenizer: The policy's.
        new_token_ids: Tokens that the chat template brought.

    Returns:
        The reference, without dropout.
    """
    frozen = replace(load, gradient_checkpointing=False)
    model = load_causal_lm(copied(pretrained), **frozen.options(None, tokenizer, new_token_ids))
    reference = Policy(model.requires_grad_(False), load.layout)
    disable_dropout(reference)
    return reference


def refuse_other_tokenizer(
    name: str, pretrained: Pretrained, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool, advice: str
) -> None:
    """Refuses a model that would read the policy's tokens as others; without a tokenizer nobody can tell.

    Args:
        name: What the model is given as, for the message.
        pretrained: Directory or hub id of the model. A model object has no tokenizer.
        tokenizer: The policy's.
        trust_remote_code: Run code that comes with the tokenizer.
        advice: The last sentence of the message.

    Raises:
        ValueError: It has another tokenizer.
    """
    if isinstance(pretrained, PreTrainedModel):
        return
    try:
        other = load_tokenizer(pretrained, trust_remote_code)
    except (OSError, ValueError):
        return
    if (found := first_other_token(tokenizer, other)) is not None:
        raise ValueError(
            f"{name}={os.fspath(pretrained)!r} has another tokenizer than the policy, whose tokens it would read as "
            f"others: {found[0]!r} is {found[1]!r} there. {advice}"
        )


def first_other_token(policy: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """Where another model would read an id of the policy's as something else, or None.

    Tokens that the other lacks are no difference: its embeddings grow for them.

    Args:
        policy: The policy's tokenizer.
        other: Of a model that gets the policy's ids.

    Returns:
        The policy's token and the other's, of one id.
    """
    theirs = {i: token for token, i in other.get_vocab().items()}
    known = other.get_vocab()
    for token, i in policy.get_vocab().items():
        if theirs.get(i, token) != token or known.get(token, i) != i:
            return token, theirs.get(i, f"none; it has {token!r} elsewhere")
    return None


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's weights as they are held: names, types, values; and of its config.

    Args:
        model: A transformers model, or one around it.
    """
    digest = hashlib.sha256()
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            digest.update(module.config.to_json_string().encode())
            break
    for name, value in model.state_dict().items():
        held = value.detach().contiguous().cpu() if isinstance(value, Tensor) else value
        digest.update(f"{name}\0{getattr(held, 'dtype', '')}\0{tuple(getattr(held, 'shape', ()))}\0".encode())
        digest.update(held.view(-1).view(torch.uint8).numpy().data if isinstance(held, Tensor) else repr(held).encode())
    return digest.hexdigest()


def remembered_fingerprint(
    folder: Path, pretrained: Pretrained, settings: tuple[Any, ...], load: Callable[[], nn.Module]
) -> str:
    """The :func:`fingerprint` of a model; of one that is loaded from the same files as before without loading it.

    A model object, a hub id, and a model with code of its own are loaded each time: their files tell too little.

    Args:
        folder: Where fingerprints are kept, by files and settings.
        pretrained: What the model is loaded from.
        settings: All else that its weights depend on; a :class:`~lightning_rlhf.models.Load` among it.
        load: Loads the model.
    """
    trusting = any(isinstance(one, Load) and one.trust_remote_code for one in settings)
    if trusting or (files := _files_of(pretrained)) is None:
        return fingerprint(load())
    key = repr((files, settings, torch.__version__, transformers.__version__))
    note = folder / hashlib.sha256(key.encode()).hexdigest()
    if note.exists() and len(known := note.read_text()) == 64:  # whole, whatever happened to the machine
        return known
    found = fingerprint(load())
    with suppress(OSError), atomic_file(note) as file:  # a folder that can't be written costs time only
        file.write(found)
    return found


def _files_of(pretrained: Pretrained) -> list[tuple[str, int, int, int, int]] | None:
    """All files of a model's directory, and of its adapters' base, with what changes when they are written to.

    The time of the last change of an inode can't be set back, as that of the content can.
    """
    if isinstance(pretrained, PreTrainedModel) or not Path(pretrained).is_dir():
        return None
    found = []
    for path in sorted(Path(pretrained).resolve().rglob("*")):
        if path.is_file():
            stat = path.stat()
            found.append((str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    if (adapters := adapters_of(pretrained)) is None:
        return found
    return None if (base := _files_of(adapters[0])) is None else found + base


def cast_like(reference: nn.Module, policy: nn.Module) -> None:
    """Casts a reference to the policy's dtype, which a strategy may have changed: both then round alike."""
    dtype = next(policy.parameters()).dtype
    for parameter in reference.parameters():
        if parameter.is_floating_point():  # quantized weights are integers
            parameter.data = parameter.data.to(dtype)


def copied(pretrained: Pretrained) -> Pretrained:
    """Returns weights to start from that are independent of those that are trained."""
    return copy.deepcopy(pretrained) if isinstance(pretrained, PreTrainedModel) else pretrained


def disable_dropout(model: nn.Module) -> None:
    """Turns off all that is random in training, whatever mode the model is in: ratios would differ from 1.

    Evaluation mode would do so too, but transformers checkpoints activations in training mode only. Dropout is a
    module, or a number of an attention layer, a block or the config that it reads, named so by all families; layerdrop
    is such a number too. Routers of experts draw by their mode, not by a number alone: they are evaluated as they run.
    """
    silent: dict[int, Any] = {}  # a config of its own for what reads its config: the model's own is exported
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        _set_to_zero(module)
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig) and not isinstance(module, PreTrainedModel):
            if id(config) not in silent:
                silent[id(config)] = copy.deepcopy(config)
                _set_to_zero(silent[id(config)])
            module.config = silent[id(config)]
        if any("jitter" in name for name in vars(module)):
            module.register_forward_pre_hook(_evaluate)


def _set_to_zero(holder: Any) -> None:
    for name, value in vars(holder).items():
        if isinstance(value, float) and any(word in name for word in ("dropout", "pdrop", "layerdrop")):
            setattr(holder, name, 0.0)


def _evaluate(module: nn.Module, args: Any) -> None:
    module.eval()
