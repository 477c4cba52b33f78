"""What a policy is compared with: its own start, another model, or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data import PackedBatch, PlannedLoader
from lightning_rlhf.data.reference import ReferenceLogprobs
from lightning_rlhf.data.token_cache import SizedRows
from lightning_rlhf.functional import ScoredTokens
from lightning_rlhf.models import Policy, load_causal_lm
from lightning_rlhf.models.reference import (
    Pretrained,
    disable_dropout,
    load_reference,
    refuse_other_tokenizer,
    remembered_fingerprint,
)
from lightning_rlhf.models.roles import RoleModel
from lightning_rlhf.models.saving import merge_adapters, plain_twin
from lightning_rlhf.stages.base import SettingsError, Stage
from lightning_rlhf.strategies import holds_whole_models
from lightning_rlhf.utils.progress import ProgressLine


@dataclass(frozen=True)
class ReferenceUpdate:
    """How a reference follows the policy (TR-DPO, arXiv 2404.09656, eq. 5).

    Args:
        every: Optimizer steps between two updates. A larger value keeps the reference longer.
        alpha: Share of the policy: the reference becomes ``alpha * policy + (1 - alpha) * reference``. A larger value
            moves it further; 1 replaces it by the policy (eq. 6).

    Raises:
        ValueError: A value is out of range.
    """

    every: int = 512
    alpha: float = 0.6

    def __post_init__(self) -> None:
        ranges = {"every": Range(1), "alpha": Range(0, 1, above=True)}
        check_arguments(ReferenceUpdate, vars(self), "reference_update.", **ranges)

    def check(self, policy: Policy, reference: Policy, strategy: Strategy) -> None:
        """Refuses what it can't mix, before the first step.

        Raises:
            SettingsError: The reference has other weights than the policy, or the strategy shards them.
        """
        if not holds_whole_models(strategy):
            raise SettingsError(
                f"reference_update mixes whole weights, and {type(strategy).__name__} as it is set shards them: set "
                "trainer.strategy to ddp or colossalai_ddp, or leave out reference_update."
            )
        shapes = [{k: tuple(p.shape) for k, p in _plain_weights(one).items()} for one in (policy, reference)]
        if shapes[0] != shapes[1]:
            name = next(k for k in (shapes[0] | shapes[1]) if shapes[0].get(k) != shapes[1].get(k))
            raise SettingsError(
                f"reference_update mixes the reference with the policy, and they differ in {name}: set reference to "
                "copy, auto or a model of the policy's size, or leave out reference_update."
            )

    @torch.no_grad()
    def after_step(self, step: int, policy: Policy, reference: Policy) -> None:
        """Moves the reference towards the policy, whose adapters count as merged, if it is time.

        Args:
            step: Number of optimizer steps done.
            policy: The policy.
            reference: A model of its own.
        """
        if step % self.every == 0:
            found = _plain_weights(policy)
            for name, weight in _plain_weights(reference).items():
                weight.lerp_(found[name].to(weight), self.alpha)


# checkpoints hold these settings; torch.load reads them without trusting arbitrary classes
torch.serialization.add_safe_globals([ReferenceUpdate])


def _plain_weights(policy: Policy) -> dict[str, nn.Parameter]:
    """Weights by name; adapters are merged into a copy."""
    model: Any = policy.model
    return dict((merge_adapters(plain_twin(model)) if hasattr(model, "get_base_model") else model).named_parameters())


def choose_reference(
    stage: Stage, given: Pretrained, needed: bool, update: ReferenceUpdate | None = None
) -> Pretrained:
    """Decides what the reference is, in place of ``auto``.

    Args:
        stage: With its adapters and tokenizer.
        given: ``auto``, ``adapter_off``, ``copy``, ``precomputed``, ``none``, a directory, a hub id or a model.
        needed: Whether the loss reads a reference.
        update: How it follows the policy, if it does: then ``auto`` is no ``adapter_off``.

    Returns:
        The same, but not ``auto``.

    Raises:
        ValueError: It does not fit the loss, the adapters or the tokenizer.
    """
    word = given if isinstance(given, str) else ""
    if word == "auto":
        given = word = ("adapter_off" if stage.lora and update is None else "copy") if needed else "none"
        rank_zero_info(f"{type(stage).__name__}: reference {word}.")
    if update is not None:
        _check_moves(stage, word, needed, update)
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


def _check_moves(stage: Stage, word: str, needed: bool, update: object) -> None:
    if not isinstance(update, ReferenceUpdate):
        raise ValueError(f"reference_update is {update!r}: give ReferenceUpdate(every=..., alpha=...).")
    why = {
        "none": "reference is none",
        "adapter_off": "reference: adapter_off is the start's own weights, which the policy stands on",
        "precomputed": "reference: precomputed is log-probs of the start, which stay as they are",
    }
    if not needed:
        raise ValueError(
            "reference_update moves the reference, but the loss reads none: leave out reference_update, or set loss to "
            "one that reads a reference, such as sigmoid."
        )
    if word in why:
        raise ValueError(
            f"reference_update moves the reference, but {why[word]}: set reference to copy, auto or a model of the "
            "policy's size, or leave out reference_update."
        )
    if stage.load.quantization is not None:
        raise ValueError(
            "reference_update moves the reference by steps that quantized weights would round away: set "
            "load.quantization to null, or leave out reference_update."
        )


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

    The start is in memory meanwhile, and nothing else: the policy is loaded later. If all are in the cache, and the
    start comes from a directory whose files are as they were, it is not loaded either.

    Args:
        stage: Says where the policy starts, and has a Trainer.
        folder: Where log-probs are kept. Fingerprints of weights are kept beside it.
        loaders: For each part of the data its name, and a loader that gives each row once.

    Returns:
        For each part that has rows, its log-probs.
    """
    strategy, precision = stage.trainer.strategy, stage.trainer.precision_plugin

    @cache
    def start() -> Policy:
        return load_reference(stage.pretrained, stage.load, stage.tokenizer, stage.new_token_ids).eval()

    @torch.no_grad()
    def score(batch: PackedBatch) -> Tensor:
        with precision.val_step_context():
            return cast(ScoredTokens, start()(batch.to(strategy.root_device))).logprobs

    settings = (stage.load, len(stage.tokenizer), stage.new_token_ids)
    weights = remembered_fingerprint(folder.parent / "fingerprints", stage.pretrained, settings, start)
    key = f"{weights}\0{precision.precision}"

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
        start().to(strategy.root_device)
        line = ProgressLine(f"reference log-probs, {part}", len(loader))
        kept.make(loader, score, line if stage.global_rank == 0 else lambda done: None)
        strategy.barrier()
        if stage.global_rank == 0:
            kept.finish()
        strategy.barrier()
    return found
