"""Several adapters over one model, so that each row of a batch has its own."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_rlhf.models.backbone import tolerance
from lightning_rlhf.models.loading import LoaderOptions, adapters_of, load_causal_lm
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.saving import quiet_peft

if TYPE_CHECKING:
    from typing_extensions import Unpack

_BASE = "__base__"
"""peft's name of the model without adapters."""


def load_adapters(
    base: str | os.PathLike[str], adapters: Mapping[str, str | os.PathLike[str]], **options: Unpack[LoaderOptions]
) -> Any:
    """Loads a causal LM under several adapters, none of which is merged.

    Args:
        base: Directory or hub id of the model.
        adapters: Directories or hub ids of adapters of this model, at least one, by their names in peft.
        options: See :class:`~lightning_rlhf.models.loading.LoaderOptions`.

    Returns:
        A peft model, whose first adapter is active.

    Raises:
        OSError: The model or an adapter does not exist or cannot be read.
        ValueError: A directory holds no adapters, or they do not fit the model.
    """
    from peft import PeftModel

    grown = [options.get("vocab_size") or 0]
    for source in adapters.values():
        if (found := adapters_of(source)) is None:
            raise ValueError(f"{source} has no adapter_config.json. Give the directory of adapters.")
        grown.append(found[1].get("vocab_size", 0))
    options["vocab_size"] = max(grown)
    model: Any = load_causal_lm(base, **options)
    for name, source in adapters.items():
        try:
            with torch.random.fork_rng(devices=()), quiet_peft():
                if isinstance(model, PeftModel):
                    model.load_adapter(os.fspath(source), name)
                else:
                    model = PeftModel.from_pretrained(model, os.fspath(source), name)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"The adapters of {source} do not fit {base}: {' '.join(str(error).split())}") from error
    return model


def reason_against_sharing(policy: Policy) -> str | None:
    """Returns why rows of one batch cannot have adapters of their own, or None.

    Args:
        policy: A peft model with several adapters. It is tried on a few tokens.
    """
    peft: Any = policy.model
    names = list(peft.peft_config)
    for name, config in peft.peft_config.items():
        if getattr(config, "trainable_token_indices", None):  # peft would take the active adapter's rows for all
            return f"{name} has trained rows of embeddings"
    embeddings: Any = peft.get_input_embeddings()
    ids = [(3 + 7 * i) % embeddings.weight.shape[0] for i in range(8)]
    batch = torch.tensor([ids] * (len(names) + 1), device=embeddings.weight.device)
    active = peft.active_adapter
    try:
        with torch.no_grad(), policy.native_attention():
            mixed = peft(input_ids=batch, use_cache=False, adapter_names=[_BASE, *names]).logits
            with peft.disable_adapter():
                alone: list[Tensor] = [peft(input_ids=batch[:1], use_cache=False).logits]
            for name in names:
                peft.set_adapter(name)
                alone.append(peft(input_ids=batch[:1], use_cache=False).logits)
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return " ".join(str(error).split())
    finally:
        peft.set_adapter(active)
        peft.requires_grad_(False)
    want = torch.cat(alone)
    difference = float((mixed - want).norm() / want.norm())
    return None if difference < tolerance(policy.transformer) else f"logits differ by {difference:.1e}"
