"""What a policy is compared with: its own start, another model, or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedModel

from lightning_rlhf.data import PackedBatch, PlannedLoader
from lightning_rlhf.data.reference import ReferenceLogprobs
from lightning_rlhf.data.token_cache import SizedRows
from lightning_rlhf.functional import ScoredTokens
from lightning_rlhf.models import Policy, load_causal_lm
from lightning_rlhf.models.reference import (
    Pretrained,
    disable_dropout,
    fingerprint,
    load_reference,
    refuse_other_tokenizer,
)
from lightning_rlhf.models.roles import RoleModel
from lightning_rlhf.stages.base import Stage
from lightning_rlhf.utils.progress import ProgressLine


def choose_reference(stage: Stage, given: Pretrained, needed: bool) -> Pretrained:
    """Decides what the reference is, in place of ``auto``.

    Args:
        stage: With its adapters and tokenizer.
        given: ``auto``, ``adapter_off``, ``copy``, ``precomputed``, ``none``, a directory, a hub id or a model.
        needed: Whether the loss reads a reference.

    Returns:
        The same, but not ``auto``.

    Raises:
        ValueError: It does not fit the loss, the adapters or the tokenizer.
    """
    word = given if isinstance(given, str) else ""
    if word == "auto":
        given = word = ("adapter_off" if stage.lora else "copy") if needed else "none"
        rank_zero_info(f"{type(stage).__name__}: reference {word}.")
    if word == "none" and needed:
        raise ValueError(
            "reference is none, but the loss reads one: set it to auto. Of DPO's losses cpo, simpo and orpo read none."
        )
    if word != "none" and not needed:
        shown = type(given).__name__ if isinstance(given, PreTrainedModel) else os.fspath(given)
        raise ValueError(f"reference is {shown}, but the loss reads none: set it to none or auto.")
    if word == "adapter_off" and stage.lora is None:
        raise ValueError("reference is adapter_off, but there are no adapters: set lora, or reference to copy.")
    if word in ("adapter_off", "copy", "precomputed", "none"):
        return given
    known = len(stage.tokenizer) - len(stage.new_token_ids)
    embeddings: Any = given.get_input_embeddings() if isinstance(given, PreTrainedModel) else None
    if embeddings is not None and (rows := embeddings.weight.shape[0]) < known:
        raise ValueError(
            f"The reference has {rows} embeddings, and the policy's tokenizer has {known} tokens. Give a model of the "
            "policy's family."
        )
    advice = "Give a model of the policy's family, or copy."
    refuse_other_tokenizer("reference", given, stage.tokenizer, stage.load.trust_remote_code, advice)
    return given


def load_policy_and_reference(stage: Stage, reference: Pretrained) -> tuple[Policy, Policy | None]:
    """Loads both, without dropout.

    Args:
        stage: Says where the policy starts and how weights are held.
        reference: What :func:`choose_reference` returned.

    Returns:
        The policy, and the reference if it is a model of its own.
    """
    model, word = None, reference if isinstance(reference, str) else ""
    if word not in ("adapter_off", "precomputed", "none"):  # before adapters are put into a model that was given
        source = stage.pretrained if word == "copy" else reference
        model = load_reference(source, stage.load, stage.tokenizer, stage.new_token_ids)
    trained = load_causal_lm(stage.pretrained, **stage.load.options(stage.lora, stage.tokenizer, stage.new_token_ids))
    layout = stage.load.layout
    policy = RoleModel(trained, layout, critic=False) if word == "adapter_off" else Policy(trained, layout)
    disable_dropout(policy)
    return policy, model


@torch.no_grad()
def reference_logprobs(policy: Policy, reference: Policy | None, batch: PackedBatch) -> Tensor | None:
    """(N,) log-probs of scored tokens under the reference; None without one."""
    if reference is not None:
        return cast(ScoredTokens, reference(batch)).logprobs
    return cast(ScoredTokens, policy(batch, "reference")).logprobs if isinstance(policy, RoleModel) else None


def precompute_reference(
    stage: Stage, folder: Path, loaders: Iterable[tuple[str, PlannedLoader]]
) -> dict[str, ReferenceLogprobs]:
    """Computes the log-probs of all rows of a run under the start, where they are not in the cache yet.

    The start is in memory meanwhile, and nothing else: the policy is loaded later.

    Args:
        stage: Says where the policy starts, and has a Trainer.
        folder: Where log-probs are kept.
        loaders: For each part of the data its name, and a loader that gives each row once.

    Returns:
        For each part that has rows, its log-probs.
    """
    strategy, precision = stage.trainer.strategy, stage.trainer.precision_plugin
    model = load_reference(stage.pretrained, stage.load, stage.tokenizer, stage.new_token_ids).eval()
    key = f"{fingerprint(model)}\0{precision.precision}"
    model.to(strategy.root_device)

    @torch.no_grad()
    def score(batch: PackedBatch) -> Tensor:
        with precision.val_step_context():
            return cast(ScoredTokens, model(batch.to(strategy.root_device))).logprobs

    found = {}
    for part, loader in loaders:
        if not len(loader.planner.sizes):
            continue
        found[part] = kept = ReferenceLogprobs(folder, cast(SizedRows, loader.rows), key)
        strategy.barrier()  # all ranks see the same files
        complete = strategy.reduce_boolean_decision(kept.complete)
        strategy.barrier()
        if complete:
            continue
        rank_zero_info(f"Reference log-probs of the {part} rows are computed once and kept in {kept.path}.")
        line = ProgressLine(f"reference log-probs, {part}", len(loader))
        kept.make(loader, score, line if stage.global_rank == 0 else lambda done: None)
        strategy.barrier()
        if stage.global_rank == 0:
            kept.finish()
        strategy.barrier()
    return found
