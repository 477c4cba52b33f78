"""KTO: raise the log-probs of good answers and lower those of bad ones, each judged by itself."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data import PackedBatch, PlannedLoader
from lightning_rlhf.data.base import TreeDataModule
from lightning_rlhf.data.unpaired import UnpairedDataModule
from lightning_rlhf.functional import apo_zero_unpaired_loss, k2, kto_loss, kto_reference_point, sum_sequences
from lightning_rlhf.functional.precision import wide
from lightning_rlhf.metrics import AnswerMeans, PreferenceAccuracy, TokenMean
from lightning_rlhf.models import Load, LoRA
from lightning_rlhf.stages.alignment import AlignmentStage
from lightning_rlhf.stages.base import LOAD, SettingsError
from lightning_rlhf.stages.optim import CosineWarmup, default_optimizer
from lightning_rlhf.utils.collectives import all_reduce

UnpairedLoss = Literal["kto", "apo_zero_unpaired"]


class KTOModule(AlignmentStage):
    """Trains a policy on single answers that are good or bad, by KTO.

    The loss is the mean over the answers of a whole optimizer step. A prompt stands once in the batch, its answers
    behind it, for the policy and for the reference. Neither has dropout, so that the first loss is half the weights.

    KTO's reference point, an estimate of the KL, is measured on mismatched answers in a pass without gradients: once
    per micro-batch, over those of all ranks.

    Args:
        pretrained: Directory or hub id of a causal LM, usually what SFT exported, or a model.
        tokenizer: Directory, hub id or tokenizer; default that of ``pretrained``.
        chat_template: Preset name (chatml, llama3, alpaca, vicuna, zephyr, plain), path of a Jinja file, or None for
            the tokenizer's own.
        lora: Adapters; None trains all weights.
        loss: ``kto``; or ``apo_zero_unpaired``, which has no reference point.
        beta: Strength of the pull towards the reference. A larger value keeps the policy closer to it.
        desirable_weight: Weight of good answers. With many more bad ones raise it: weight times number should be about
            the same on both sides.
        undesirable_weight: Weight of bad answers.
        reference: What the policy is compared with: ``adapter_off`` (the model without its adapters), ``copy`` (a
            frozen copy of the start), ``precomputed`` (the start's log-probs, computed before training and kept beside
            the tokens), or another model: its directory or hub id. ``auto`` takes ``adapter_off`` with ``lora``, and
            ``copy`` otherwise.
        load: How weights are held: dtype, quantization (QLoRA), gradient checkpointing, layout.
        optimizer: Makes an optimizer of parameter groups; weight decay never acts on norms and biases.
        lr_scheduler: Makes a schedule of the optimizer; it is stepped once per optimizer step.
        max_skipped: Optimizer steps in a row that may be skipped, because losses or gradients were not finite, before
            the run ends.

    Attributes:
        policy: The model, from ``configure_model`` on. Where the reference is another one, it is ``.reference``.

    Logged: ``train/`` and ``val/`` (``test/``) ``loss``, ``z0`` (the reference point, nats per answer),
    ``chosen_reward``, ``rejected_reward`` (mean implicit rewards of good and of bad answers), ``margin`` (their
    difference), ``chosen_logprob``, ``rejected_logprob`` (nats per answer), ``kl`` (k2, nats per token of the answers);
    and on validation what :class:`~lightning_rlhf.stages.RewardModule` adds, over the pairs of a good and a bad answer
    in one tree.

    Raises:
        ValueError: An argument is out of its range, or the reference does not fit.
    """

    works_on = "unpaired"

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        lora: LoRA | None = None,
        loss: UnpairedLoss = "kto",
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reference: str | os.PathLike[str] | PreTrainedModel = "auto",
        load: Load = LOAD,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable = CosineWarmup,
        max_skipped: int = 5,
    ) -> None:
        check_arguments(
            KTOModule.__init__,
            locals(),
            beta=Range(0, above=True),
            desirable_weight=Range(0),
            undesirable_weight=Range(0),
            max_skipped=Range(1),
        )
        super().__init__(pretrained, tokenizer, chat_template, lora, load, optimizer, lr_scheduler, max_skipped)
        self.save_settings()
        self.loss, self.beta = loss, beta
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.set_reference(reference, needed=True)
        for part in ("train", "val", "test"):
            self.metrics.declare(part, loss=TokenMean(), z0=TokenMean(), kl=TokenMean())
        for part in ("val", "test"):
            self.metrics.declare(part, preference=PreferenceAccuracy("reward"))
        for part in ("train", "val", "test"):  # by label, in the place of the means over pairs
            self.metrics.declare(part, answers=AnswerMeans())

    # ------------------------------------------------------------------------------------------------- steps

    @property
    def reads_mismatched(self) -> bool:
        """Whether the loss has a reference point."""
        return self.loss == "kto"

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Loss whose sum over micro-batches and mean over ranks is the step's mean over answers."""
        _, loss = self._compare("train", batch)
        return (loss.sum() * (batch.totals.bins / (batch.totals.good + batch.totals.bad))).float()

    def compute_losses(self, ratio: Tensor, good: Tensor, z0: Tensor) -> Tensor:
        """The loss of each answer.

        Args:
            ratio: (L,) log-ratios of answers with a label.
            good: (L,) bool: whether an answer is good.
            z0: The reference point.

        Returns:
            (L,) losses.
        """
        weights = (self.beta, self.desirable_weight, self.undesirable_weight)
        if self.reads_mismatched:
            return kto_loss(ratio, good, z0, *weights)
        return apo_zero_unpaired_loss(ratio, good, *weights)

    @torch.no_grad()
    def reference_point(self, part: str, batch: PackedBatch) -> Tensor:
        """KTO's ``z0``: the mean log-ratio of mismatched answers over this micro-batch of all ranks, at least 0.

        All ranks must call it. It keeps no activations.

        Args:
            part: ``train``, ``val`` or ``test``.
            batch: The batch, with its ``mismatched``.

        Raises:
            SettingsError: The batch has none.
        """
        if not self.reads_mismatched:
            return torch.zeros((), device=self.device)
        if batch.mismatched is None:
            raise SettingsError(
                "KTO's reference point needs mismatched answers, and the batch has none. UnpairedDataModule gives "
                "them; or set PackedBatch.mismatched, or loss to apo_zero_unpaired."
            )
        others = batch.mismatched
        own, reference = self._logprobs(self._mismatched(part), others)
        ratio = _sums(others, wide(own) - wide(reference))[batch.labels.sequence]
        torch.clear_autocast_cache()  # weights that were cast here have no gradient, and would serve the policy's pass
        sums = all_reduce(torch.stack([ratio.sum(), ratio.new_tensor(len(ratio))]), self.device)
        return kto_reference_point(sums[0], sums[1]).to(self.device)

    def _logprobs(self, part: str, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(N,) log-probs of scored tokens under policy and reference."""
        reference = self.reference_logprobs(part, batch)
        assert reference is not None  # the constructor refuses none
        return self.policy(batch).logprobs, reference

    def _compare(self, part: str, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(L,) log-ratios and losses of the answers with a label, counted for a part of the data."""
        z0, labels = self.reference_point(part, batch), batch.labels
        own, reference = self._logprobs(part, batch)
        ratio, logprob = (_sums(batch, v)[labels.sequence] for v in (wide(own) - wide(reference), wide(own)))
        loss = self.compute_losses(ratio, labels.good, z0)
        self.metrics.update(part, torch.ones_like(loss), loss=loss, z0=z0.expand(len(loss)))
        self.metrics.update(part, batch.weight, kl=k2(own.detach() - reference))
        self.metrics.get(part, "answers").update(self.beta * ratio, logprob, labels.good)
        return ratio, loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the step, over its micro-batches and all ranks, before a checkpoint of it can be written."""
        super().on_before_optimizer_step(optimizer)
        self.count_step(self.metrics.report("train", self.log)["loss"])

    # ------------------------------------------------------------------------------------------------- references

    def rows_to_score(self, data: TreeDataModule[Any], run: str) -> Iterator[tuple[str, PlannedLoader]]:
        """As the base, and the mismatched answers of all epochs that the run may take."""
        parts = list(super().rows_to_score(data, run))
        yield from parts
        if self.reads_mismatched and isinstance(data, UnpairedDataModule):
            for part, _ in parts:
                for epoch in range(self._epochs(data) if part == "train" else 1):
                    if (loader := data.every_mismatch(part, epoch)) is not None:
                        yield self._mismatched(part, epoch), loader

    def _mismatched(self, part: str, epoch: int | None = None) -> str:
        """The name of a part's mismatched answers in an epoch, by default the present one; only training draws anew."""
        epoch = self.current_epoch if epoch is None else epoch
        return f"{part} mismatched {epoch if part == 'train' else 0}"

    def _epochs(self, data: UnpairedDataModule) -> int:
        """Number of epochs at whose end the run stops.

        Raises:
            SettingsError: It has no end.
        """
        trainer = self.trainer
        batches, limit = len(data.train_dataloader()), trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        bounds = [] if trainer.max_epochs in (None, -1) else [int(trainer.max_epochs)]
        if trainer.max_steps != -1 and batches:
            bounds.append(math.ceil(trainer.max_steps * trainer.accumulate_grad_batches / batches))
        if not bounds:
            raise SettingsError(
                "reference: precomputed computes log-probs before training, and KTO's mismatched answers change with "
                "the epoch. Set trainer.max_epochs or trainer.max_steps, or reference to copy."
            )
        return min(bounds)

    # ------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self, part: str, batch: PackedBatch) -> None:
        """Measures the answers, and the pairs of a good and a bad one in one tree."""
        ratio, _ = self._compare(part, batch)
        labels, lengths = batch.labels, batch.lengths
        branches = torch.tensor([len(branches) for _, branches in batch.forest.trees], device=self.device)
        tree = torch.arange(len(branches), device=self.device).repeat_interleave(branches)[labels.sequence]
        pairs = (tree[:, None] == tree) & labels.good[:, None] & ~labels.good
        better, worse = pairs.nonzero(as_tuple=True)
        reward, length = self.beta * ratio, lengths[labels.sequence]
        self.metrics.get(part, "preference").update(
            reward[better], reward[worse], length[better], length[worse], labels.origin[better]
        )

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A record an answer: ``row`` and ``answer`` (from 0), implicit ``reward``, summed ``logprob``, ``tokens``."""
        own, reference = self._logprobs("predict", batch)
        values = (self.beta * (wide(own) - wide(reference)), wide(own), torch.ones_like(reference))
        return self.records(batch, *(_sums(batch, value) for value in values))


def _sums(batch: PackedBatch, values: Tensor) -> Tensor:
    """(S,) sums over the tokens of each answer."""
    return sum_sequences(values, batch.sequence, batch.num_sequences)
