"""Rollouts by transformers' own ``generate``, for models that the cached engine can't run."""

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
from lightning_rlhf.rollout.sampling import choose
from lightning_rlhf.rollout.sequence import ActiveSequence, make_sequences
from lightning_rlhf.rollout.types import Completion, Request, Sampling


class HFGenerateEngine:
    """Rollouts by transformers' ``generate``: any model that has it, sharded ones too, at its speed.

    ``generate`` only runs the model. Tokens are chosen as :class:`~lightning_rlhf.rollout.CachedEngine` chooses them,
    with the same noise, so that both give the same samples. Prompts of one length share a batch, since not every
    family takes padding on the left.

    Args:
        max_rows: Completions of one batch at most; None: no limit.
        synced_gpus: All ranks were given the same requests and must run the model equally often (ZeRO-3, FSDP).

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
        """See :meth:`RolloutEngine.generate`."""
        model: Any = policy.transformer
        groups = [
            make_sequences(model, tokenizer, request, sampling, stop_token_ids, name=f"Rollout request {i}")
            for i, request in enumerate(requests)
        ]
        by_length: dict[int, list[ActiveSequence]] = {}
        for row in (row for rows in groups for row in rows):
            by_length.setdefault(len(row.prompt), []).append(row)
        settings = GenerationConfig(max_new_tokens=sampling.max_new_tokens, do_sample=False, num_beams=1)
        device = model.get_input_embeddings().weight.device
        with policy.native_attention(), torch.no_grad(), _no_settings_of_its_own(model):
            for rows in by_length.values():
                size = self.max_rows or len(rows)
                for start in range(0, len(rows), size):
                    part = rows[start : start + size]
                    ids = torch.tensor([row.prompt for row in part], device=device)
                    model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        generation_config=settings,
                        logits_processor=LogitsProcessorList([_Choose(part)]),
                        stopping_criteria=StoppingCriteriaList([_AllDone(part)]),
                        synced_gpus=self.synced_gpus,
                    )
        return [[row.future.result() for row in rows] for rows in groups]


class _Choose(LogitsProcessor):
    """Leaves the arg max no choice."""

    def __init__(self, rows: Sequence[ActiveSequence]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, logprobs = choose(scores, self.rows)
        for row, token, logprob in zip(self.rows, tokens, logprobs, strict=True):
            if not row.done:
                row.push(token, logprob)
        chosen = torch.tensor(tokens, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


class _AllDone(StoppingCriteria):
    """Ends rows where :class:`ActiveSequence` does, so that stops mean the same in every engine."""

    def __init__(self, rows: Sequence[ActiveSequence]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        return torch.tensor([row.done for row in self.rows], device=input_ids.device)


@contextmanager
def _no_settings_of_its_own(model: PreTrainedModel) -> Iterator[None]:
    """Without the model's generation config, which ``generate`` would fall back on wherever ours says nothing."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
