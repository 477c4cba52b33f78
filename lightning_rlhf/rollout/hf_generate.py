"""Rollouts with transformers' ``generate``, for models that the cached engine cannot run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lightning_rlhf.models.backbone import Backbone
from lightning_rlhf.rollout.sampling import likeliest_tokens, sample_tokens
from lightning_rlhf.rollout.sequence import ActiveSequence, make_sequences
from lightning_rlhf.rollout.transfer import to_device
from lightning_rlhf.rollout.types import Completion, Request, Sampling


class HFGenerateEngine:
    """Rollouts with transformers' ``generate``, for any model that has it, sharded models included.

    ``generate`` only runs the model. Tokens are sampled as in :class:`~lightning_rlhf.rollout.CachedEngine` and with
    the same noise, so both engines give the same samples. A batch has prompts of one length, because not every model
    family accepts padding on the left.

    Args:
        max_rows: Maximum number of completions per batch. A larger value is faster and takes more memory. None: no
            limit.
        synced_gpus: All ranks have the same requests and must run the model equally often (ZeRO-3, FSDP).

    Raises:
        ValueError: ``max_rows`` is below 1.
    """

    def __init__(self, max_rows: int | None = None, synced_gpus: bool = False) -> None:
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, or null for no limit; got {max_rows}.")
        self.max_rows, self.synced_gpus = max_rows, synced_gpus

    def generate(
        self,
        policy: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        sampling: Sampling,
        stop_token_ids: Sequence[int],
    ) -> list[list[Completion]]:
        """Completes prompts; see :meth:`RolloutEngine.generate`."""
        groups = [
            make_sequences(
                policy.transformer, tokenizer, request, sampling, stop_token_ids, name=f"Rollout request {i}"
            )
            for i, request in enumerate(requests)
        ]
        self.run(policy, [row for rows in groups for row in rows])
        return [[row.future.result() for row in rows] for rows in groups]

    def run(self, policy: Backbone, rows: Sequence[ActiveSequence]) -> None:
        """Generates rows until each has its completion or an error, or has been cancelled.

        Args:
            policy: A backbone whose model can generate. Its active adapters apply.
            rows: Rows of any prompts and settings.

        Raises:
            ValueError: A row has an adapter of its own, which only :class:`~lightning_rlhf.rollout.CachedEngine` runs.
        """
        if named := [row.adapter for row in rows if row.adapter is not None]:
            raise ValueError(
                f"HFGenerateEngine generates with the active adapter, but a request names {named[0]!r}. Activate it, "
                "or use CachedEngine."
            )
        model: Any = policy.transformer
        by_length: dict[int, list[ActiveSequence]] = {}
        for row in rows:
            by_length.setdefault(len(row.prompt), []).append(row)
        device = model.get_input_embeddings().weight.device
        with policy.native_attention(), torch.no_grad(), _empty_generation_config(model):
            for equal in by_length.values():
                size = self.max_rows or len(equal)
                for start in range(0, len(equal), size):
                    part = equal[start : start + size]
                    ids = torch.tensor([row.prompt for row in part], device=device)
                    longest = max(row.sampling.max_new_tokens for row in part)
                    model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        generation_config=GenerationConfig(max_new_tokens=longest, do_sample=False, num_beams=1),
                        logits_processor=LogitsProcessorList([_SampleTokens(part)]),
                        stopping_criteria=StoppingCriteriaList([_AllDone(part)]),
                        synced_gpus=self.synced_gpus,
                    )


class _SampleTokens(LogitsProcessor):
    """Samples a token per row, and masks every other logit, so that greedy decoding picks it."""

    def __init__(self, rows: Sequence[ActiveSequence]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logprobs = sample_tokens(scores, self.rows)
        for row, token, logprob, logits in zip(self.rows, tokens, logprobs, scores, strict=True):
            if not row.done:
                row.push(token, logprob, likeliest_tokens(logits, row) if row.alternatives else ())
        sampled = to_device(tokens, scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, sampled, 0.0)


class _AllDone(StoppingCriteria):
    """Ends a row when its :class:`ActiveSequence` ends, so that all engines stop at the same token."""

    def __init__(self, rows: Sequence[ActiveSequence]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return to_device([row.done for row in self.rows], input_ids.device, torch.bool)


@contextmanager
def _empty_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Hides the model's generation config, from which ``generate`` would take every setting that ours leaves out."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
