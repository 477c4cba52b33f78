"""Direct alignment: raise the log-probs of better answers over those of worse ones, without sampling."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data import PackedBatch
from lightning_rlhf.functional import PairLogprobs, k2, pair_logprobs
from lightning_rlhf.metrics import PreferenceAccuracy, TokenMean
from lightning_rlhf.models import Load, LoRA
from lightning_rlhf.stages.alignment import AlignmentStage
from lightning_rlhf.stages.base import LOAD, SettingsError
from lightning_rlhf.stages.optim import CosineWarmup, default_optimizer
from lightning_rlhf.stages.pair_losses import MEASURES, LossSum, PairShaping, WeightedLoss, warn_of_drop
from lightning_rlhf.stages.references import ReferenceUpdate

SHAPING = PairShaping()


class DPOModule(AlignmentStage):
    """Trains a policy on pairs and rankings of answers by DPO, or by another loss of its family.

    The loss is the weighted mean over the pairs of a whole optimizer step. A prompt stands once in the batch, its
    answers behind it, for the policy and for the reference. Neither has dropout, so that the first loss of DPO is
    ``log 2`` exactly.

    Args:
        pretrained: Directory or hub id of a causal LM, usually what SFT exported, or a model.
        tokenizer: Directory, hub id or tokenizer; default that of ``pretrained``.
        chat_template: Preset name (chatml, llama3, alpaca, vicuna, zephyr, plain), path of a Jinja file, or None for
            the tokenizer's own.
        lora: Adapters; None trains all weights.
        loss: A loss of ``docs/dpo.md``; a function of :class:`~lightning_rlhf.functional.PairLogprobs` or its import
            path; or a list of ``{name: ..., weight: ..., settings: {...}}``, which are added.
        beta: Strength of the pull towards the reference. A larger value keeps the policy closer to it. None: the loss's
            own default, 0.1 for most.
        shaping: Length penalties and the divergence.
        reference: What the policy is compared with: ``adapter_off`` (the model without its adapters), ``copy`` (a
            frozen copy of the start), ``precomputed`` (the start's log-probs, computed once and kept beside the
            tokens), ``none`` (for SimPO, ORPO, CPO), or another model: its directory or hub id.
            ``auto`` takes ``none`` if the loss reads no reference, ``adapter_off`` with ``lora``, and ``copy``
            otherwise.
        reference_update: How the reference follows the policy (TR-DPO); None leaves it where training starts.
        load: How weights are held: dtype, quantization (QLoRA), gradient checkpointing, layout.
        optimizer: Makes an optimizer of parameter groups; weight decay never acts on norms and biases.
        lr_scheduler: Makes a schedule of the optimizer; it is stepped once per optimizer step.
        max_skipped: Optimizer steps in a row that may be skipped, because losses or gradients were not finite, before
            the run ends.

    Attributes:
        policy: The model, from ``configure_model`` on. Where the reference is another one, it is ``.reference``.

    Logged: ``train/`` and ``val/`` (``test/``) ``loss``, ``accuracy`` (a tie counts half), ``margin``,
    ``chosen_reward``, ``rejected_reward`` (implicit rewards), ``chosen_logprob``, ``rejected_logprob`` (nats per
    answer), ``kl`` (k2, nats per token of the answers); and on validation what
    :class:`~lightning_rlhf.stages.RewardModule` adds.

    Raises:
        ImportError: A loss that is not there.
        ValueError: An argument is out of its range, or loss, shaping and reference do not fit together.
    """

    works_on = "preferences"
    entries: ClassVar[Mapping[str, tuple[str, ...]]] = {**AlignmentStage.entries, "dpo": ("steps", "delta", "warned")}

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        lora: LoRA | None = None,
        loss: str | list[WeightedLoss] | Callable[..., Any] = "sigmoid",
        beta: float | None = None,
        shaping: PairShaping = SHAPING,
        reference: str | os.PathLike[str] | PreTrainedModel = "auto",
        reference_update: ReferenceUpdate | None = None,
        load: Load = LOAD,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable = CosineWarmup,
        max_skipped: int = 5,
    ) -> None:
        check_arguments(DPOModule.__init__, locals(), beta=Range(0, above=True), max_skipped=Range(1))
        super().__init__(pretrained, tokenizer, chat_template, lora, load, optimizer, lr_scheduler, max_skipped)
        self.save_settings()
        self.loss, self.shaping, self.reference_update = LossSum(loss, beta), shaping, reference_update
        self.loss.check_shaping(shaping)
        self.set_reference(reference, self.loss.needs_reference, reference_update)
        for part in ("train", "val", "test"):
            self.metrics.declare(part, loss=TokenMean(), **({"kl": TokenMean()} if self._reference != "none" else {}))
        self.metrics.declare("drop", ratio=TokenMean())
        self.metrics.declare("train", **{name: TokenMean() for name in MEASURES})
        for part in ("val", "test"):
            logprobs = {name: TokenMean() for name in MEASURES if name.endswith("logprob")}
            self.metrics.declare(part, preference=PreferenceAccuracy("reward"), **logprobs)
        self._steps, self._delta, self._warned = 0, 0.0, False

    def forget(self) -> None:
        """As the base, and the running mean of implicit rewards."""
        super().forget()
        self._steps, self._delta, self._warned = 0, 0.0, False

    # ------------------------------------------------------------------------------------------------- steps

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Loss whose sum over micro-batches and mean over ranks is the step's mean over pairs."""
        pairs, loss = self._compare("train", batch)
        weight = batch.pairs.weight
        self.metrics.update("train", weight, **self.loss.measure(pairs))
        self.metrics.update("drop", weight, ratio=pairs.better_ratio)
        return ((weight * loss).sum() * (batch.totals.bins / batch.totals.pairs)).float()

    def compute_losses(self, pairs: PairLogprobs) -> Tensor:
        """(P,) losses of P pairs."""
        return self.loss(pairs, self._delta)

    def _compare(self, part: str, batch: PackedBatch) -> tuple[PairLogprobs, Tensor]:
        """The pairs of a batch and their (P,) losses, counted as the loss of a part of the data."""
        reference = self.reference_logprobs(part, batch)
        logprobs = self.policy(batch).logprobs
        found = batch.pairs
        pairs = self._pairs(batch, logprobs, reference, found.better, found.worse, found.margin)
        if not self.loss.reads_offset and found.margin.any():
            raise SettingsError(
                "The rows have margins, and this loss has no place for them: set data.use_margin to false, or take "
                "another loss (docs/dpo.md says which have it)."
            )
        loss = self.compute_losses(pairs)
        self.metrics.update(part, found.weight, loss=loss)
        if reference is not None:
            self.metrics.update(part, batch.weight, kl=k2(logprobs.detach() - reference))
        return pairs, loss

    def _pairs(
        self,
        batch: PackedBatch,
        logprobs: Tensor,
        reference: Tensor | None,
        better: Tensor,
        worse: Tensor,
        margin: Tensor | None = None,
    ) -> PairLogprobs:
        tokens = (logprobs, reference, batch.sequence, batch.num_sequences)
        return pair_logprobs(*tokens, better, worse, margin, **dataclasses.asdict(self.shaping))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the step, over its micro-batches and all ranks, before a checkpoint of it can be written."""
        super().on_before_optimizer_step(optimizer)
        found, drop = self.metrics.report("train", self.log), self.metrics.get("drop", "ratio")
        if not self._warned and self._reference != "none" and self.shaping.f_divergence == "reverse_kl":
            self._warned = warn_of_drop(drop.compute().item(), found["chosen_logprob"].item())
        drop.reset()
        self._steps += 1
        if found["loss"].isfinite():
            center = 0.5 * (found["chosen_reward"] + found["rejected_reward"]).item()
            self._delta += (center - self._delta) / self._steps
        self.count_step(found["loss"])

    def on_fit_start(self) -> None:
        """As the base; refuses a reference that can't follow the policy.

        Raises:
            SettingsError: It is one.
        """
        super().on_fit_start()
        if self.reference_update is not None:
            self.reference_update.check(self.policy, self.reference, self.trainer.strategy)

    def optimizer_step(self, *args: Any, **options: Any) -> None:
        """As Lightning's; the reference moves behind it, before a checkpoint of the step can be written."""
        super().optimizer_step(*args, **options)
        if self.reference_update is not None:
            self.reference_update.after_step(self._steps, self.policy, self.reference)

    # ------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, part: str, batch: PackedBatch) -> None:
        """Measures the pairs."""
        pairs, _ = self._compare(part, batch)
        chosen, rejected = self.loss.implicit_rewards(pairs)
        lengths, found = batch.lengths, batch.pairs
        self.metrics.get(part, "preference").update(
            chosen, rejected, lengths[found.better], lengths[found.worse], found.origin
        )
        self.metrics.update(part, found.weight, chosen_logprob=pairs.better, rejected_logprob=pairs.worse)

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A record an answer: ``row`` and ``answer`` (from 0), implicit ``reward``, summed ``logprob``, ``tokens``."""
        every = torch.arange(batch.num_sequences, device=self.device)
        reference = self.reference_logprobs("predict", batch)
        logprobs = self.policy(batch).logprobs
        answers = self._pairs(batch, logprobs, reference, every, every)
        rewards, _ = self.loss.implicit_rewards(answers)
        return self.records(batch, rewards, answers.better, answers.better_length)

    # ------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the running mean of implicit rewards, and a reference that moves."""
        state = checkpoint["state_dict"] if self.reference_update else {}
        moved = {name: value for name, value in state.items() if name.startswith("reference.")}
        super().on_save_checkpoint(checkpoint)
        checkpoint["state_dict"] |= moved  # the base left it out, as frozen
        checkpoint["dpo"] = {"steps": self._steps, "delta": self._delta, "warned": self._warned}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores it."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["dpo"]
        self._steps, self._delta, self._warned = state["steps"], state["delta"], state["warned"]
