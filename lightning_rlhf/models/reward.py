"""The reward model: one score for each sequence of a packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.packed import PackedBatch, pad
from lightning_rlhf.functional.precision import wide, without_subclass
from lightning_rlhf.models.backbone import Backbone, LayoutChoice


class RewardModel(Backbone):
    """Scores sequences by a transformers classifier with one label.

    A decoder's ``score`` head is read at each sequence's last token, by its place and not by its id. Classifiers of
    another build (encoders) run whole, on padded rows.

    Args:
        model: A ``...ForSequenceClassification`` model with one label, or a peft model around one.
        layout: See :class:`~lightning_rlhf.models.backbone.Backbone`.

    Raises:
        ValueError: ``layout="tree"`` and the model can't take it.
    """

    def __init__(self, model: nn.Module, layout: LayoutChoice = "auto") -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        reads_last = hasattr(base, "score")
        if not reads_last and layout == "tree":
            raise ValueError(f"{type(base).__name__} has no 'score' head, so it can't take the tree layout; use auto.")
        super().__init__(model, layout if reads_last else "padded")
        self.reads_last = reads_last

    @property
    def score_offset(self) -> float:
        """Mean score of reference answers, as the model's config keeps it; 0 where it was never measured."""
        return float(getattr(self.transformer.config, "score_offset", 0.0))

    @score_offset.setter
    def score_offset(self, value: float) -> None:
        self.transformer.config.score_offset = value

    def forward(self, batch: PackedBatch, normalize: bool = False) -> Tensor:
        """Scores the batch.

        Args:
            batch: A packed batch on the model's device.
            normalize: Subtract ``score_offset``, so that reference answers score 0 on average.

        Returns:
            (S,) scores in fp32.
        """
        if self.reads_last:
            states, _, last = self.hidden(batch)
            scores = read_head(self.transformer.score, states[last])  # type: ignore[arg-type]
        else:
            padded = pad(batch)
            scores = self.model(input_ids=padded.input_ids, attention_mask=padded.attention_mask).logits[:, 0]
        scores = scores.float()
        return scores - self.score_offset if normalize else scores


def read_head(head: nn.Module, states: Tensor) -> Tensor:
    """(M,) outputs of a head of one label, in fp32 at least, whatever autocast is in force and whoever cast the head.

    Args:
        head: A linear layer to one label, or peft's wrapper around one.
        states: (M, D) hidden states.
    """
    exact = {name: without_subclass(wide(p)) for name, p in head.named_parameters()}
    with torch.autocast(states.device.type, enabled=False):
        out: Tensor = torch.func.functional_call(head, exact, states.to(next(iter(exact.values())).dtype))
    return out[:, 0]


def set_distinct_pad_token(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
    """Gives the tokenizer a pad token that ends no answer.

    transformers' classifiers read the last token that is not the pad token: where that is the stop token, they score
    one token early. An unused special token serves where there is one, else ``<|pad|>`` is added.
    """
    stops = {*stop_token_ids, tokenizer.eos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in stops:
        return
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    template = str(tokenizer.chat_template)  # what it writes is used
    for token in (tokenizer.unk_token, *added):
        if token is None or token in template:
            continue
        if tokenizer.convert_tokens_to_ids(token) not in {*stops, tokenizer.bos_token_id}:
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
