"""Models of a stage without weights: made from their configs, with as many layers as one likes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from lightning_rlhf.models import RewardModel
from lightning_rlhf.models.loading import load_config, quantization_of
from lightning_rlhf.models.quantization import DTYPE
from lightning_rlhf.rewards.model import RewardModelReward
from lightning_rlhf.rl import Critic
from lightning_rlhf.stages.alignment import AlignmentStage
from lightning_rlhf.stages.base import Stage
from lightning_rlhf.stages.reward import RewardModule
from lightning_rlhf.stages.rl import RLStage

#: Makes a model by its name, the class that it is for, and its data type.
Make = Callable[..., PreTrainedModel]
#: References that are no model of their own, or that are made of the policy's start.
_WORDS = ("adapter_off", "copy", "precomputed", "none")


def layers_of(stage: Stage) -> int:
    """Number of layers of the model that a stage trains."""
    return int(config_of(stage).num_hidden_layers)


def vocabulary_of(stage: Stage) -> int:
    """Number of rows of its head, new tokens counted."""
    return max(int(config_of(stage).vocab_size), len(stage.tokenizer))


def config_of(stage: Stage) -> Any:
    """Config of the text model that a stage trains."""
    return load_config(stage.pretrained, stage.load.trust_remote_code).get_text_config()  # type: ignore[arg-type]


def copy_of(stage: Stage) -> Stage:
    """A copy of a stage whose models are not loaded."""
    return copy.deepcopy(stage, {id(stage.tokenizer): stage.tokenizer})


def take_weights_away(module: Stage, layers: int, checkpointing: bool) -> None:
    """Gives a stage models without numbers in place of the names of its models; ``configure_model`` completes them.

    Call it, and use the stage, within :func:`~lightning_rlhf.plan.fakes.fake_tensors`.

    Args:
        module: The stage, none of whose models is loaded.
        layers: Layers of each model.
        checkpointing: Whether activations are computed again in the backward pass.

    Raises:
        ValueError: A model is quantized.
    """
    stage: Any = module
    trusts, dtype = stage.load.trust_remote_code, stage.load.dtype
    if method := stage.load.quantization or quantization_of(stage.pretrained, trusts):
        raise ValueError(
            f"{stage.pretrained} is held in {method}, and plan counts full precision alone: set load.quantization to "
            "null, and give a model that is not quantized. What it then says is an upper bound."
        )
    stage.load = dataclasses.replace(stage.load, gradient_checkpointing=checkpointing)

    def make(name: Any, scores: bool = False, dtype: str = dtype) -> PreTrainedModel:
        return _make(name, scores, dtype, layers, trusts)

    start = stage.pretrained
    object.__setattr__(stage, "pretrained", make(start, isinstance(stage, RewardModule)))  # no child
    if isinstance(stage, AlignmentStage) and stage.reference_source not in _WORDS:
        stage.set_reference(make(stage.reference_source), needed=True)
    if isinstance(stage, RLStage):
        _replace_critic(stage, start, make)
        for reward in stage.reward.modules():
            if isinstance(reward, RewardModelReward):
                model = make(reward.pretrained, True, reward.dtype_of_weights)
                reward.model = RewardModel(model, reward.layout).requires_grad_(False).eval()


def _make(name: Any, scores: bool, dtype: str, layers: int, trusts: bool) -> PreTrainedModel:
    config = load_config(name, trusts)
    text = config.get_text_config()
    text.num_hidden_layers = layers
    if isinstance(kinds := getattr(text, "layer_types", None), list):
        text.layer_types = kinds[:layers]
    if scores:
        config.num_labels = 1
    auto: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    model: PreTrainedModel = auto.from_config(config, trust_remote_code=trusts, **{DTYPE: getattr(torch, dtype)})
    if scores:
        model.score.float()
    # a copy of fake tensors would look at numbers
    vars(model)["__deepcopy__"] = lambda memo: _make(name, scores, dtype, layers, trusts)
    return model


def _replace_critic(module: Any, start: Any, make: Make) -> None:
    """Gives a separate critic a model in place of its name."""
    settings: Critic | None = module.critic_settings
    if settings is None or settings.kind_for(module.lora) != "separate":
        return
    name = settings.pretrained if settings.pretrained is not None else start
    module.critic_settings = dataclasses.replace(settings, pretrained=make(name, True))
