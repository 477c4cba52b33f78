"""Reward modelling: a score for each answer, such that the better of two scores higher."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import islice
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.callbacks import averaged_weights
from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data import PackedBatch
from lightning_rlhf.functional import bradley_terry_loss, centering_penalty
from lightning_rlhf.metrics import PreferenceAccuracy, TokenMean
from lightning_rlhf.models import Load, LoRA, RewardModel, load_reward_model
from lightning_rlhf.models.backbone import evaluating
from lightning_rlhf.models.reward import set_distinct_pad_token
from lightning_rlhf.protocols import NamesOrigins
from lightning_rlhf.stages.base import LOAD, Stage
from lightning_rlhf.stages.optim import CosineWarmup, default_optimizer

#: Logged at each step of training; validation adds what :class:`PreferenceAccuracy` knows.
TRAINED = ("loss", "accuracy", "margin", "chosen_score", "rejected_score")


class RewardModule(Stage):
    """Trains a reward model on pairs and rankings of answers.

    The loss is the weighted mean over the pairs of a whole optimizer step of ``-log sigmoid(chosen - rejected -
    margin)``, plus ``centering_coef`` times the centering penalty. A prompt stands once in the batch, its
    answers behind it.

    Args:
        pretrained: Directory or hub id of a causal LM (the head is new) or of a one-label classifier (the head is its
            own), or such a classifier.
        tokenizer: Directory, hub id or tokenizer; default that of ``pretrained``.
        chat_template: Preset name (chatml, llama3, alpaca, vicuna, zephyr, plain), path of a Jinja file, or None for
            the tokenizer's own.
        lora: Adapters; the head is trained beside them. None trains all weights.
        load: How weights are held: dtype, quantization (QLoRA), gradient checkpointing, layout.
        centering_coef: Weight of the penalty that keeps scores near zero; 0.01 is usual, 0 turns it off.
        optimizer: Makes an optimizer of parameter groups; weight decay never acts on norms and biases.
        lr_scheduler: Makes a schedule of the optimizer; it is stepped once per optimizer step.
        max_skipped: Optimizer steps in a row that may be skipped, because losses or gradients were not finite, before
            the run ends.
        head_seed: Seed of a new head's weights.

    Attributes:
        reward_model: The model, from ``configure_model`` on. Its ``score_offset`` is the mean score of the preferred
            validation answers, measured at each validation and kept in the exported config.

    Logged: ``train/`` and ``val/`` (``test/``) ``loss``, ``accuracy``, ``margin``, ``chosen_score``,
    ``rejected_score``; and on validation ``calibration_error``, ``length_accuracy`` ("the longer answer wins"),
    ``matched_accuracy`` and ``matched_pairs`` (lengths within a tenth), ``accuracy/NAME`` by source and language.
    """

    reward_model: RewardModel
    works_on = "preferences"
    entries: ClassVar[Mapping[str, tuple[str, ...]]] = {**Stage.entries, "score_offset": (), "score_offset_step": ()}

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        lora: LoRA | None = None,
        load: Load = LOAD,
        centering_coef: float = 0.0,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable = CosineWarmup,
        max_skipped: int = 5,
        head_seed: int = 0,
    ) -> None:
        check_arguments(RewardModule.__init__, locals(), centering_coef=Range(0), max_skipped=Range(1))
        super().__init__(pretrained, tokenizer, chat_template, lora, load, optimizer, lr_scheduler, max_skipped)
        self.save_settings()
        self.centering_coef, self.head_seed = centering_coef, head_seed
        set_distinct_pad_token(self.tokenizer, self.stop_token_ids)
        self.metrics.declare("train", **{name: TokenMean() for name in TRAINED})
        for stage in ("val", "test"):
            self.metrics.declare(stage, loss=TokenMean(), preference=PreferenceAccuracy())
        self.metrics.declare("reference", score=TokenMean())
        self._offset_step: int | None = None

    def forget(self) -> None:
        """As the base, and when the offset was measured: steps are counted anew."""
        super().forget()
        self._offset_step = None

    def configure_model(self) -> None:
        """Loads the model once, when Lightning or a caller first needs it."""
        if hasattr(self, "reward_model"):
            return
        model = load_reward_model(
            self.pretrained,
            pad_token_id=self.tokenizer.pad_token_id,
            seed=self.head_seed,
            **self.load.options(self.lora, self.tokenizer, self.new_token_ids),
        )
        self.reward_model = RewardModel(model, self.load.layout)

    @property
    def model_to_export(self) -> RewardModel:
        """The reward model."""
        return self.reward_model

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Tensor:
        """Loss whose sum over micro-batches and mean over ranks is the step's mean over pairs."""
        chosen, rejected, loss = self._compare(batch)
        weight = batch.pairs.weight
        values = (loss, (chosen > rejected).float(), chosen - rejected, chosen, rejected)
        self.metrics.update("train", weight, **dict(zip(TRAINED, values, strict=True)))
        return (weight * loss).sum() * (batch.totals.bins / batch.totals.pairs)

    def compute_losses(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        """The loss of each pair: Bradley and Terry's, plus the centering penalty.

        Args:
            chosen: (P,) scores of the better answers.
            rejected: (P,) scores of the worse ones.
            margin: (P,) by how much the better ones should win.

        Returns:
            (P,) losses.
        """
        loss = bradley_terry_loss(chosen, rejected, margin)
        return loss + self.centering_coef * centering_penalty(chosen, rejected)

    def _compare(self, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """(P,) scores of the better and the worse answers, and losses."""
        scores = self.reward_model(batch)
        chosen, rejected = scores[batch.pairs.better], scores[batch.pairs.worse]
        return chosen, rejected, self.compute_losses(chosen, rejected, batch.pairs.margin)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the step, over its micro-batches and all ranks, before a checkpoint of it can be written."""
        super().on_before_optimizer_step(optimizer)
        self.count_step(self.metrics.report("train", self.log)["loss"])

    # ------------------------------------------------------------------------------------------------- evaluation

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Held-out loss and accuracies."""
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Logs what was found; inside ``fit`` its mean chosen score becomes the offset."""
        found = self._report("val")
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self._set_offset(found["chosen_score"])

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """As :meth:`validation_step`, under ``test/``."""
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        """Logs what was found."""
        self._report("test")

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A record an answer: ``row`` and ``answer`` (from 0), raw ``score``, ``normalized`` score, ``tokens``."""
        scores, lengths = self.reward_model(batch).tolist(), batch.lengths.tolist()
        offset = self.reward_model.score_offset
        return [
            {"row": row, "answer": answer, "score": score, "normalized": score - offset, "tokens": length}
            for (row, answer), score, length in zip(self.places(batch), scores, lengths, strict=False)
            # a filler has no place
        ]

    def on_train_epoch_end(self) -> None:
        """Measures the offset where the epoch ended without a validation, so that no export has an old one."""
        super().on_train_epoch_end()
        if self._offset_step == self.trainer.global_step:
            return
        loader: Any = None
        batches = 0
        if self.trainer.enable_validation:
            loop: Any = self.trainer.fit_loop.epoch_loop.val_loop
            loop.setup_data()  # a resumed run, or one that validates later, has no loader yet
            loader, batches = self.trainer.val_dataloaders, int(sum(self.trainer.num_val_batches))
        if not batches:
            if self.reward_model.score_offset:
                rank_zero_warn(
                    f"score_offset={self.reward_model.score_offset:.4g} is kept, but was measured on earlier weights: "
                    "no validation measures it anew. Give validation data."
                )
            return
        # of the weights that are exported
        reference_score = self.metrics.get("reference", "score")
        averaged, precision = averaged_weights(self.trainer), self.trainer.precision_plugin.val_step_context()
        with evaluating(self), averaged, torch.no_grad(), precision:
            for batch in islice(loader, batches):
                batch = batch.to(self.device)
                chosen = self.reward_model(batch)[batch.pairs.better]
                reference_score.update(chosen, torch.ones_like(chosen))
        self._set_offset(reference_score.compute())
        reference_score.reset()

    def _set_offset(self, mean: Tensor) -> None:
        if not mean.isnan():
            self.reward_model.score_offset = mean.item()
            self._offset_step = self.trainer.global_step

    def _evaluate(self, stage: str, batch: PackedBatch) -> None:
        chosen, rejected, loss = self._compare(batch)
        pairs, lengths = batch.pairs, batch.lengths
        self.metrics.update(stage, pairs.weight, loss=loss)
        self.metrics.get(stage, "preference").update(
            chosen, rejected, lengths[pairs.better], lengths[pairs.worse], pairs.origin
        )

    def _report(self, stage: str) -> dict[str, Tensor]:
        data = getattr(self.trainer, "datamodule", None)
        names = data.origins.get(stage, ()) if isinstance(data, NamesOrigins) else ()
        self.metrics.get(stage, "preference").names = names
        return self.metrics.report(stage, self.log)

    # ------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the offset."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["score_offset"] = self.reward_model.score_offset
        checkpoint["score_offset_step"] = self._offset_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores it."""
        super().on_load_checkpoint(checkpoint)
        self.reward_model.score_offset = checkpoint["score_offset"]
        self._offset_step = checkpoint["score_offset_step"]
