"""The critic: the value of the state in which each scored token was sampled."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lightning_rlhf.data import PackedBatch
from lightning_rlhf.models.backbone import Backbone, Hidden, LayoutChoice
from lightning_rlhf.models.loading import LoaderOptions, load_reward_model, read_config
from lightning_rlhf.models.quantization import DTYPE
from lightning_rlhf.models.reward import read_head

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Values(NamedTuple):
    """A critic's values of a batch.

    Attributes:
        values: (N,) values at the positions that predict the scored tokens: the states before the actions.
        last_values: (S,) values after each sequence's last token, to bootstrap truncated completions.
    """

    values: Tensor
    last_values: Tensor


def read_values(head: nn.Module, hidden: Hidden, offset: float = 0.0) -> Values:
    """Applies a linear head in fp32 at the positions of :class:`Values`, and subtracts ``offset``."""
    states, predictor, last = hidden
    both = read_head(head, states[torch.cat([predictor, last])]) - offset
    return Values(both[: len(predictor)], both[len(predictor) :])


class ValueModel(Backbone):
    """A critic with a backbone of its own: a transformers classifier with one label, read at every scored token.

    Args:
        model: A decoder's ``...ForSequenceClassification`` with a ``score`` head of one label, or a peft model around
            one. Its config's ``score_offset`` is subtracted, so that a critic from a reward model starts with the
            normalized score.
        layout: See :class:`~lightning_rlhf.models.backbone.Backbone`.

    Raises:
        ValueError: The model has no ``score`` head, or it does not support ``layout="tree"``.
    """

    def __init__(self, model: nn.Module, layout: LayoutChoice = "auto") -> None:
        base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        if not hasattr(base, "score"):
            raise ValueError(f"{type(base).__name__} has no 'score' head to read values from. Use a decoder.")
        super().__init__(model, layout)
        self.offset = float(getattr(base.config, "score_offset", 0.0))

    def forward(self, batch: PackedBatch) -> Values:
        """Computes values of the batch.

        Args:
            batch: A packed batch on the model's device.

        Returns:
            (N,) values and (S,) last values, in fp32.
        """
        return read_values(self.transformer.score, self.hidden(batch), self.offset)  # type: ignore[arg-type]


def load_value_model(
    pretrained: str | os.PathLike[str] | PreTrainedModel, **options: Unpack[LoaderOptions]
) -> nn.Module:
    """Loads a critic. A causal LM gets a head of zeros; a reward model keeps its head.

    With a head of zeros all values are 0 at first, so the first advantages are sums of rewards.

    Args:
        pretrained: A directory or hub id of a causal LM or of a reward model, or such a model.
        options: See :class:`~lightning_rlhf.models.LoaderOptions`.

    Returns:
        The model, or a peft model around it.

    Raises:
        OSError: The model does not exist or cannot be read.
        ValueError: A classifier has several labels.
    """
    fresh = not is_reward_model(pretrained, options.get("trust_remote_code", False))
    if fresh and isinstance(pretrained, PreTrainedModel):
        pretrained = _classifier_of(pretrained)
    model = load_reward_model(pretrained, **options)
    if fresh:
        head: Any = (model.get_base_model() if options.get("lora") else model).score  # type: ignore[operator]
        with torch.no_grad():
            for parameter in head.parameters():  # with adapters, also the trained copy
                parameter.zero_()
    return model


def _classifier_of(model: PreTrainedModel) -> PreTrainedModel:
    """Makes a one-label classifier with a copy of a causal LM's weights."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    with torch.random.fork_rng(devices=()):
        twin: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, **{DTYPE: model.dtype})
    twin.base_model.load_state_dict(model.base_model.state_dict())
    return twin.to(model.device)  # type: ignore[arg-type,no-any-return]


def is_reward_model(pretrained: str | os.PathLike[str] | PreTrainedModel, trust_remote_code: bool = False) -> bool:
    """Whether a model has a classifier's head: a reward model, or a reward model's adapters."""
    if isinstance(pretrained, PreTrainedModel):
        return type(pretrained).__name__.endswith("ForSequenceClassification")
    if os.path.exists(os.path.join(pretrained, "adapter_config.json")):
        return True
    config = read_config(pretrained, trust_remote_code)
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])
