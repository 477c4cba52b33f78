"""Supervised fine-tuning: maximize the log-prob of the answers in instruction data."""

from __future__ import annotations

import os
import time
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data import PackedBatch
from lightning_rlhf.functional import ScoredTokens
from lightning_rlhf.metrics import Perplexity, TokenMean
from lightning_rlhf.models import Load, LoRA, Policy, load_causal_lm
from lightning_rlhf.stages.base import LOAD, Stage
from lightning_rlhf.stages.optim import CosineWarmup, default_optimizer


class SFTModule(Stage):
    """Fine-tunes a causal LM on packed instruction data.

    The loss is the mean over the scored tokens of a whole optimizer step: how the step is split into micro-batches
    and ranks, packed or padded, does not change it.

    Args:
        pretrained: Hugging Face directory, hub id, or a model.
        tokenizer: Directory, hub id or tokenizer; default that of ``pretrained``.
        chat_template: Preset name (chatml, llama3, alpaca, vicuna, zephyr, plain), path of a Jinja file, or None for
            the tokenizer's own.
        lora: Adapters; None trains all weights.
        load: How weights are held: dtype, quantization (QLoRA), gradient checkpointing, layout.
        neftune_alpha: Amount of noise on embeddings during training (NEFTune); 5 is usual, None adds none.
        z_loss: Weight of the z-loss, which keeps the softmax's denominator near 1 (PaLM uses 1e-4); 0 turns it off.
        optimizer: Makes an optimizer of parameter groups; weight decay never acts on norms and biases.
        lr_scheduler: Makes a schedule of the optimizer; it is stepped once per optimizer step.
        max_skipped: Optimizer steps in a row that may be skipped, because losses or gradients were not finite, before
            the run ends.

    Attributes:
        policy: The model, from ``configure_model`` on.
        stop_token_ids: Tokens that end an answer.

    Logged: ``train/`` and ``val/`` (``test/``) ``loss``, ``perplexity``, ``token_accuracy``;
    ``train/tokens_per_second`` (real tokens of this rank) and ``train/scored_share``; with ``z_loss``,
    ``train/z_loss``: what it adds to the minimized loss. ``train/loss`` is without it, and under NEFTune's noise.

    Raises:
        ValueError: An argument is out of its range.
    """

    policy: Policy
    works_on = "instructions"

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        lora: LoRA | None = None,
        load: Load = LOAD,
        neftune_alpha: float | None = None,
        z_loss: float = 0.0,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable = CosineWarmup,
        max_skipped: int = 5,
    ) -> None:
        check_arguments(SFTModule.__init__, locals(), max_skipped=Range(1))
        super().__init__(pretrained, tokenizer, chat_template, lora, load, optimizer, lr_scheduler, max_skipped)
        self.save_settings()
        if z_loss < 0 or (neftune_alpha is not None and neftune_alpha < 0):
            raise ValueError(f"Neither may be negative: z_loss={z_loss}, neftune_alpha={neftune_alpha}.")
        self.neftune_alpha, self.z_loss = neftune_alpha, z_loss
        for stage in ("train", "val", "test"):
            self.metrics.declare(stage, loss=TokenMean(), perplexity=Perplexity(), token_accuracy=TokenMean())
        if z_loss:
            self.metrics.declare("train", z_loss=TokenMean())
        self._since = time.perf_counter()
        self._tokens = self._scored = 0

    def configure_model(self) -> None:
        """Loads the model once, when Lightning or a caller first needs it."""
        if hasattr(self, "policy"):
            return
        model = load_causal_lm(self.pretrained, **self.load.options(self.lora, self.tokenizer, self.new_token_ids))
        self.policy = Policy(model, self.load.layout, z_loss=self.z_loss)

    @property
    def model_to_export(self) -> Policy:
        """The policy."""
        return self.policy

    def training_step(self, batch: PackedBatch, batch_idx: int) -> Any:
        """Loss whose sum over micro-batches and mean over ranks is the step's mean over scored tokens."""
        weights = batch.weight * (batch.totals.bins / batch.totals.tokens)
        with self.policy.noisy_embeddings(batch, self.neftune_alpha):
            out = self.policy(batch, weights=weights)
        self._update("train", batch, out)
        if out.z_loss is not None:
            self.metrics.update("train", batch.weight, z_loss=out.z_loss)
        self._tokens += batch.num_tokens
        self._scored += batch.num_scored
        return out.loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the step, over its micro-batches and all ranks, before a checkpoint of it can be written."""
        super().on_before_optimizer_step(optimizer)
        found = self.metrics.report("train", self.log)
        now = time.perf_counter()
        self.log("train/tokens_per_second", self._tokens / (now - self._since), prog_bar=True, batch_size=1)
        self.log("train/scored_share", self._scored / self._tokens, batch_size=1)
        self._since, self._tokens, self._scored = now, 0, 0
        self.count_step(found["loss"])

    def validation_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """Held-out loss, perplexity, accuracy."""
        self._evaluate("val", batch)

    def test_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """As :meth:`validation_step`, under ``test/``."""
        self._evaluate("test", batch)

    def predict_step(self, batch: PackedBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A record an answer: ``row``, ``answer`` (from 0), summed ``logprob`` of its scored ``tokens`` in nats."""
        logprobs = self.policy(batch).logprobs
        sums = logprobs.new_zeros(batch.num_sequences).index_add_(0, batch.sequence, logprobs).tolist()
        counts = batch.sequence.bincount(minlength=batch.num_sequences).tolist()
        return [
            {"row": row, "answer": answer, "logprob": logprob, "tokens": tokens}
            for (row, answer), logprob, tokens in zip(self.places(batch), sums, counts, strict=False)
            # a filler has no place
        ]

    def on_train_start(self) -> None:
        """Starts the first step's clock."""
        super().on_train_start()
        self._since, self._tokens, self._scored = time.perf_counter(), 0, 0

    def _update(self, stage: str, batch: PackedBatch, out: ScoredTokens) -> None:
        values = {"loss": -out.logprobs, "perplexity": out.logprobs, "token_accuracy": out.correct}
        self.metrics.update(stage, batch.weight, **values)

    def _evaluate(self, stage: str, batch: PackedBatch) -> None:
        self._update(stage, batch, self.policy(batch))
        self.metrics.log_epoch(stage, self.log)
