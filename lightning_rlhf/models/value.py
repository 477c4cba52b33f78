"""The critic: the value of the state that each scored token was chosen in."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lightning_rlhf.data.packed import PackedBatch
from lightning_rlhf.models.backbone import Backbone, Hidden, LayoutChoice
from lightning_rlhf.models.loading import Dtype, LoRA, load_reward_model, read_config
from lightning_rlhf.models.quantization import DTYPE, Quantization
from lightning_rlhf.models.reward import read_head


class Values(NamedTuple):
    """What a critic says of a batch.

    Attributes:
        values: (N,) at the position that predicts each scored token: the state before the action.
        last_values: (S,) behind each sequence's last token, to bootstrap from where a completion was cut.
    """

    values: Tensor
    last_values: Tensor


def read_values(head: nn.Module, hidden: Hidden, offset: float = 0.0) -> Values:
    """A linear head, in fp32, at the positions of :class:`Values`, less ``offset``."""
    states, predictor, last = hidden
    both = read_head(head, states[torch.cat([predictor, last])]) - offset
    return Values(both[: len(predictor)], both[len(predictor) :])


class ValueModel(Backbone):
    """A critic of its own: a transformers classifier with one label, read at every scored token.

    Args:
        model: A decoder's ``...ForSequenceClassification`` with a ``score`` head of one label, or a peft model around
            one. Its config's ``score_offset`` is subtracted, so that a reward model starts as the value of the
            normalized score.
        layout: See :class:`~lightning_rlhf.models.backbone.Backbone`.

    Raises:
        ValueError: The model has no ``score`` head, or ``layout="tree"`` and it can't take it.
    """

    def __init__(self, model: nn.Module, layout: LayoutChoice = "auto") -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        if not hasattr(base, "score"):
            raise ValueError(f"{type(base).__name__} has no 'score' head to read values from: use a decoder.")
        super().__init__(model, layout)
        self.offset = float(getattr(base.config, "score_offset", 0.0))

    def forward(self, batch: PackedBatch) -> Values:
        """Values of the batch.

        Args:
            batch: A packed batch on the model's device.

        Returns:
            (N,) values and (S,) last values, in fp32.
        """
        return read_values(self.transformer.score, self.hidden(batch), self.offset)  # type: ignore[arg-type]


def load_value_model(
    pretrained: str | os.PathLike[str] | PreTrainedModel,
    *,
    dtype: Dtype = "float32",
    lora: LoRA | None = None,
    quantization: Quantization | None = None,
    gradient_checkpointing: bool = False,
    vocab_size: int | None = None,
    new_tokens: Sequence[int] = (),
    trust_remote_code: bool = False,
) -> nn.Module:
    """A critic's weights: from a causal LM with a head of zeros, from a reward model with that model's own.

    With a head of zeros every value is 0 at first, and so the first advantages are the rewards' own sums.

    Args:
        pretrained: A directory or hub id of either, or such a model.
        dtype: Of the weights; the head is fp32.
        lora: Adapters; the head is trained beside them.
        quantization: See :func:`~lightning_rlhf.models.load_causal_lm`.
        gradient_checkpointing: Recompute activations in the backward pass.
        vocab_size: Tokens the tokenizer knows.
        new_tokens: See :func:`~lightning_rlhf.models.load_causal_lm`.
        trust_remote_code: Run model code that comes with the checkpoint.

    Returns:
        The model, or a peft model around it.

    Raises:
        OSError: Nothing is there.
        ValueError: A classifier with several labels.
    """
    fresh = not is_reward_model(pretrained, trust_remote_code)
    if fresh and isinstance(pretrained, PreTrainedModel):
        pretrained = _classifier_of(pretrained)
    model = load_reward_model(
        pretrained,
        dtype=dtype,
        lora=lora,
        quantization=quantization,
        gradient_checkpointing=gradient_checkpointing,
        vocab_size=vocab_size,
        new_tokens=new_tokens,
        trust_remote_code=trust_remote_code,
    )
    if fresh:
        head: Any = (model if lora is None else model.get_base_model()).score  # type: ignore[operator]
        with torch.no_grad():
            for parameter in head.parameters():  # under adapters also those of the copy that is trained
                parameter.zero_()
    return model


def _classifier_of(model: PreTrainedModel) -> PreTrainedModel:
    """A one-label classifier over a copy of a causal LM's weights."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.random.fork_rng(devices=()):
        twin: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, **{DTYPE: model.dtype})
    twin.base_model.load_state_dict(model.base_model.state_dict())
    return twin.to(model.device)  # type: ignore[arg-type,no-any-return]


def is_reward_model(pretrained: str | os.PathLike[str] | PreTrainedModel, trust_remote_code: bool = False) -> bool:
    """Whether it has a classifier's head: a reward model, or adapters of one."""
    if isinstance(pretrained, PreTrainedModel):
        return type(pretrained).__name__.endswith("ForSequenceClassification")
    if os.path.exists(os.path.join(pretrained, "adapter_config.json")):
        return True
    config = read_config(pretrained, trust_remote_code)
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
