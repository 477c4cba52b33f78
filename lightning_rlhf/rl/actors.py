"""Policy, reference, critic and reward model: separate models, or adapters of one backbone."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.data import PackedBatch
from lightning_rlhf.models import Load, LoRA, Policy, load_causal_lm
from lightning_rlhf.models.loading import refuse_full_training
from lightning_rlhf.models.reference import (
    Pretrained,
    cast_like,
    copied,
    disable_dropout,
    load_reference,
    refuse_other_tokenizer,
)
from lightning_rlhf.models.roles import Role, RoleModel, is_adapter
from lightning_rlhf.models.value import ValueModel, load_value_model
from lightning_rlhf.rewards import BadScores, Reward, RewardModelReward, Samples, Scores, check_scores
from lightning_rlhf.rl.settings import Critic
from lightning_rlhf.utils.collectives import once_per_copy


class Actors:
    """The models of a stage of reinforcement learning.

    Args:
        policy: The policy; a ``RoleModel`` where there are adapters, which then is the reference too.
        reward: The reward that scores completions.
        reference: A frozen copy of the start; None if the policy has adapters that can be turned off.
        critic: The critic, if it is a separate model.
        offload_frozen: Keep reference and reward model in CPU memory while they are not used.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        reference: Policy | None = None,
        critic: ValueModel | None = None,
        offload_frozen: bool = False,
    ) -> None:
        self.policy, self.reward, self.reference, self.critic = policy, reward, reference, critic
        self.offload_frozen = offload_frozen

    def forward(self, role: Role, batch: PackedBatch, **options: Any) -> Any:
        """Runs the model that has a role.

        Args:
            role: The role.
            batch: A packed batch on the device of the models.
            options: Passed to the forward pass, see :class:`~lightning_rlhf.models.roles.RoleModel`.
        """
        if isinstance(self.policy, RoleModel) and not (role == "critic" and self.critic is not None):
            return self.policy(batch, role, **options)
        model: Any = getattr(self, role)
        return model(batch, **options)

    @contextmanager
    def on_device(self, device: torch.device, *names: Literal["reward", "reference"]) -> Iterator[None]:
        """Keeps models on the device within the block; with ``offload_frozen`` they are otherwise on the CPU."""
        models = [m for name in names if self.offload_frozen and (m := getattr(self, name)) is not None]
        for model in models:
            model.to(device)
        try:
            yield
        finally:
            for model in models:
                model.to("cpu")

    def score(self, samples: Samples) -> tuple[Scores, str]:
        """Scores samples. Returns the scores, with NaN for those that are not finite, and a message about these.

        Ranks that run one copy of the models together get the scores of the first: a function or a judge need not
        answer each of them alike.
        """
        together = any(isinstance(m, (PreTrainedModel, RewardModelReward)) for m in self.reward.modules())

        def compute() -> tuple[dict[str, Any], str]:
            scores, why = self._score(samples)
            plain = {k: dict(v) if isinstance(v, Mapping) else v for k, v in scores._asdict().items()}
            return tree_map_only(Tensor, Tensor.cpu, plain), why

        found, why = once_per_copy(compute, together)
        device = samples.batch.input_ids.device
        return Scores(**tree_map_only(Tensor, lambda t: t.to(device), found)), why

    def _score(self, samples: Samples) -> tuple[Scores, str]:
        try:
            scores = self.reward(samples)
            check_scores(scores.total, samples, f"The reward {type(self.reward).__name__}", absent=scores.absent)
            return scores, ""
        except BadScores as error:
            return error.scores, str(error)

    def cast_reference(self) -> None:
        """Casts the reference to the policy's dtype, which a strategy may have changed: both then round alike."""
        if self.reference is not None:
            cast_like(self.reference, self.policy)

    def limits(self) -> dict[str, int]:
        """Returns how many tokens of prompt and completion reward model and critic can read, by what sets the limit."""
        found = dict(self.reward.limits)
        if self.critic is not None:
            config = self.critic.transformer.config.get_text_config()
            context: int | None = getattr(config, "max_position_embeddings", None)
            if context is not None:
                found["the context of the critic"] = context
        return found

    def policy_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that the policy's optimizer trains."""
        return self.policy.policy_parameters()

    def critic_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters that the critic's optimizer trains."""
        if self.critic is not None:
            return [p for p in self.critic.parameters() if p.requires_grad]
        return self.policy.critic_parameters()


def load_actors(
    pretrained: Pretrained,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    new_token_ids: tuple[int, ...],
    lora: LoRA | None,
    load: Load,
    critic: Critic | None,
    offload_frozen: bool,
    needs_reference: bool = True,
) -> Actors:
    """Loads all models of a stage.

    Args:
        pretrained: Where the policy starts, and what the reference is.
        reward: Loaded too; on the policy's backbone where it is an adapter of the same weights.
        tokenizer: The policy's.
        new_token_ids: Tokens that the chat template brought.
        lora: Adapters; None trains all weights and keeps a frozen copy as the reference.
        load: How weights are held.
        critic: Its settings; None for a stage without a critic.
        offload_frozen: See :class:`Actors`.
        needs_reference: Whether a stage ever asks the reference; otherwise none is loaded.

    Returns:
        The actors, without dropout.

    Raises:
        OSError: Nothing is at one of the names.
        ValueError: A critic with another tokenizer, or an adapter that does not fit the backbone.
    """
    kind = None if critic is None else critic.kind_for(lora)
    shares = lora is not None and kind != "separate"
    trunk_grad = critic.trunk_grad if critic is not None and kind == "head" else None
    trained = load.options(lora, tokenizer, new_token_ids)
    value_model = reference = None
    if critic is not None:
        advice = "Give a critic of the policy's family, or null to start from the policy's weights."
        if critic.pretrained is not None:
            refuse_other_tokenizer("critic.pretrained", critic.pretrained, tokenizer, load.trust_remote_code, advice)
    if critic is not None and kind == "separate":  # before adapters are put into a model that was given
        start = copied(pretrained) if critic.pretrained is None else critic.pretrained
        refuse_full_training(start, lora, load.trust_remote_code)
        value_model = ValueModel(load_value_model(start, **trained), load.layout)
    if lora is None and needs_reference:
        reference = load_reference(pretrained, load, tokenizer, new_token_ids)
    model = load_causal_lm(pretrained, **trained)
    policy: Policy
    if lora is None:
        policy = Policy(model, load.layout, trunk_grad=trunk_grad)
    else:
        found = (r for r in reward.modules() if isinstance(r, RewardModelReward) and _same_weights(r, pretrained))
        shared = next(found, None) if shares else None
        policy = RoleModel(
            model,
            load.layout,
            critic=kind == "adapter",
            critic_init=None if critic is None else critic.pretrained,  # type: ignore[arg-type]
            reward=None if shared is None else shared.pretrained,
            trunk_grad=trunk_grad,
        )
        if shared is not None:
            shared.share(policy)
    reward.load()
    for model in filter(None, (policy, reference, value_model, reward)):
        disable_dropout(model)
    return Actors(policy, reward, reference, value_model, offload_frozen)


def _same_weights(reward: RewardModelReward, pretrained: Pretrained) -> bool:
    """Returns whether a reward is an adapter of the weights that the policy starts from."""
    if not is_adapter(reward.pretrained) or not reward.same_tokens:
        return False
    config = json.loads((Path(reward.pretrained) / "adapter_config.json").read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    name = str(pretrained.name_or_path) if isinstance(pretrained, PreTrainedModel) else os.fspath(pretrained)
    return bool(base) and (base == name or os.path.realpath(base) == os.path.realpath(name))
