"""The reward model: one score per sequence of a packed batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data import PackedBatch, pad
from lightning_rlhf.functional.precision import wide, without_subclass
from lightning_rlhf.models.backbone import Backbone, LayoutChoice


class RewardModel(Backbone):
    """Scores sequences with a transformers classifier that has one label.

    A decoder's ``score`` head is read at each sequence's last token, which is found by its position and not by its id.
    Other classifiers (encoders) run as they are, on padded rows.

    Args:
        model: A ``...ForSequenceClassification`` model with one label, or a peft model around one.
        layout: See :class:`~lightning_rlhf.models.backbone.Backbone`.

    Raises:
        ValueError: The model does not support ``layout="tree"``.
    """

    def __init__(self, model: nn.Module, layout: LayoutChoice = "auto") -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        reads_last = hasattr(base, "score")
        if not reads_last and layout == "tree":
            raise ValueError(
                f"{type(base).__name__} has no 'score' head, so it does not support the tree layout. Use auto."
            )
        super().__init__(model, layout if reads_last else "padded")
        self.reads_last = reads_last

    @property
    def score_offset(self) -> float:
        """Mean score of reference answers, which the model's config stores; 0 if it was not measured."""
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
    """Applies a head with one label in at least fp32, also under autocast and if the head has been cast.

    Args:
        head: A linear layer with one output, or peft's wrapper around one.
        states: (M, D) hidden states.

    Returns:
        (M,) outputs.
    """
    exact = {name: without_subclass(wide(p)) for name, p in head.named_parameters()}
    with torch.autocast(states.device.type, enabled=False):
        out: Tensor = torch.func.functional_call(head, exact, states.to(next(iter(exact.values())).dtype))
    return out[:, 0]


def set_distinct_pad_token(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> None:
    """Gives the tokenizer a pad token that does not end answers.

    transformers' classifiers read the last token that is not the pad token. If this were the stop token, they would
    read the token before it. An unused special token becomes the pad token; if there is none, ``<|pad|>`` is added.
    """
    stops = {*stop_token_ids, tokenizer.eos_token_id}
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in stops:
        return
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    template = str(tokenizer.chat_template)  # the tokens in it are used
    for token in (tokenizer.unk_token, *added):
        if token is None or token in template:
            continue
        if tokenizer.convert_tokens_to_ids(token) not in {*stops, tokenizer.bos_token_id}:
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
