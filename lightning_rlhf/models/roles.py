"""One frozen backbone that is policy, reference, critic and reward model, by its adapters."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from lightning_rlhf.data import PackedBatch
from lightning_rlhf.functional import ScoredTokens
from lightning_rlhf.models.backbone import Hidden, LayoutChoice
from lightning_rlhf.models.policy import Policy
from lightning_rlhf.models.reward import read_head
from lightning_rlhf.models.saving import ADAPTED
from lightning_rlhf.models.value import Values, read_values

Role = Literal["policy", "reference", "critic", "reward"]


class RoleModel(Policy):
    """A causal LM under adapters that plays the roles of PPO; called without a role it is the policy.

    The policy is the model with its own adapter. The reference is the model with adapters off. The critic is the model
    with a second adapter and its own head. The reward model, if it was trained as an adapter of the same weights, is a
    third adapter, which stays frozen.

    A role lasts for one call: between calls the model is the policy, for exports, ``generate`` and users who read it.
    Backward passes may come in any order and at any time: checkpointed layers run again in the role that they ran in.

    Args:
        model: A peft model around a causal LM; its active adapter is the policy's.
        layout: See :class:`~lightning_rlhf.models.backbone.Backbone`.
        chunk: See :class:`~lightning_rlhf.models.policy.Policy`.
        critic: Adds a critic, with adapters like the policy's and a head of zeros.
        trunk_grad: See :class:`~lightning_rlhf.models.policy.Policy`: a critic as a head on the policy's hidden states,
            in place of ``critic``.
        critic_init: Directory of a reward model's adapter, from which the critic starts.
        reward: Directory of a reward model's adapter for the role ``reward``.

    Raises:
        ValueError: The model has no adapters, their initialization changes the backbone, or a reward adapter does not
            fit.
    """

    _role: Role = "policy"

    def __init__(
        self,
        model: nn.Module,
        layout: LayoutChoice = "auto",
        chunk: int | None = None,
        critic: bool = True,
        critic_init: str | os.PathLike[str] | None = None,
        reward: str | os.PathLike[str] | None = None,
        trunk_grad: float | None = None,
    ) -> None:
        if not hasattr(model, "peft_config"):
            raise ValueError("A shared backbone needs adapters: set lora, or critic.kind to separate.")
        peft: Any = model
        own = peft.active_adapter
        config = peft.peft_config[own]
        if isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian":
            raise ValueError(
                f"lora.init={config.init_lora_weights!r} moves weights out of the backbone, which is the reference "
                "here: set lora.init to true or gaussian."
            )
        super().__init__(model, layout, chunk, trunk_grad=trunk_grad)
        self.adapters: dict[str, str] = {"policy": own}
        if critic:
            self.add_value_head()
            if critic_init is None:
                self._add("critic", config)
            else:
                head, offset = self._add_reward("critic", critic_init)
                with torch.no_grad():
                    self.value_head.weight.copy_(head)
                    self.value_head.bias.fill_(-offset)
        self.score_offset = 0.0
        if reward is not None:
            head, self.score_offset = self._add_reward("reward", reward)
            head = head.to(next(model.parameters()).device, torch.float32)
            self.score_head = nn.Linear(head.shape[1], 1, bias=False, device=head.device, dtype=torch.float32)
            self.score_head.weight = nn.Parameter(head, requires_grad=False)
        self._states = {role: self._state(role) for role in ("reference", *self.adapters)}
        peft.set_adapter(own)  # freezes all but the policy's
        critics = {id(p) for p in self.critic_parameters()}
        self._trainable = [p for p in self.parameters() if p.requires_grad or id(p) in critics]
        for parameter in self._trainable:
            parameter.requires_grad_(True)

    @overload
    def forward(
        self,
        batch: PackedBatch,
        role: Literal["policy", "reference"] = "policy",
        *,
        entropy: bool = False,
        temperature: float = 1.0,
        weights: Tensor | None = None,
    ) -> ScoredTokens: ...

    @overload
    def forward(self, batch: PackedBatch, role: Literal["critic"]) -> Values: ...

    @overload
    def forward(self, batch: PackedBatch, role: Literal["reward"]) -> Tensor: ...

    def forward(
        self,
        batch: PackedBatch,
        role: Role = "policy",
        *,
        entropy: bool = False,
        temperature: float = 1.0,
        weights: Tensor | None = None,
    ) -> ScoredTokens | Values | Tensor:
        """Runs the model in a role.

        Args:
            batch: A packed batch on the model's device.
            role: The role.
            entropy: See :meth:`Policy.forward`, as for the next two.
            temperature: Sampling temperature.
            weights: (N,) constants.

        Returns:
            For policy and reference what :class:`Policy` returns; for the critic its values; for the reward model (S,)
            scores minus its ``score_offset``.
        """
        with self.playing(role):
            if role == "critic":
                return read_values(self.value_head, self.hidden(batch))
            if role == "reward":
                states, _, last = self.hidden(batch)
                return read_head(self.score_head, states[last]) - self.score_offset
            return super().forward(batch, entropy=entropy, temperature=temperature, weights=weights)

    def trunk(self, batch: PackedBatch, role: Role = "policy", **kwargs: Any) -> Hidden:
        """As :meth:`Backbone.trunk`, in a role."""
        with self.playing(role):
            return self.hidden(batch)

    @contextmanager
    def playing(self, role: Role) -> Iterator[None]:
        """Activates the adapters of a role; afterwards those of before are active again.

        Args:
            role: The role.
        """
        former = self._role
        self._play(role)
        try:
            yield
        finally:
            self._play(former)

    def _play(self, role: Role) -> None:
        """Switches adapters and nothing else.

        peft's own switch makes an adapter trainable and freezes the others, so a backward pass after it would silently
        lose gradients. So its effect on the layers is recorded once and written to the same two private attributes;
        ``tests/models/test_roles.py`` compares them with those that peft shows in public.
        """
        self._role = role
        for layer, active, disabled in self._states[role]:
            layer._active_adapter, layer._disable_adapters = active, disabled

    def _state(self, role: str) -> list[tuple[Any, Any, bool]]:
        """Lets peft activate a role, and returns each adapted layer with what is active in it."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper

        peft: Any = self.model
        if role == "reference":
            peft.base_model.disable_adapter_layers()
        else:
            peft.base_model.enable_adapter_layers()
            peft.set_adapter(self.adapters[role])
        layers: list[Any] = [m for m in peft.modules() if isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
        return [(layer, layer.active_adapter, layer.disable_adapters) for layer in layers]

    def _recompute_context(self) -> Callable[[], AbstractContextManager[None]]:
        """As :meth:`Backbone._recompute_context`, in the role of now."""
        role, make = self._role, super()._recompute_context()

        @contextmanager
        def again() -> Iterator[None]:
            with self.playing(role), make():
                yield

        return again

    def policy_parameters(self) -> list[nn.Parameter]:
        """Returns the trained parameters without those of the critic."""
        critic = {id(p) for p in self.critic_parameters()}
        return [p for p in self._trainable if id(p) not in critic]

    def critic_parameters(self) -> list[nn.Parameter]:
        """Returns the parameters of the critic: its head, and its adapter where it has one."""
        if "critic" not in self.adapters:
            return super().critic_parameters()
        embeddings: Any = self.transformer.get_input_embeddings()
        head: Any = self.transformer.get_output_embeddings()  # with rows of the critic's own that nothing reads
        unread = set(map(id, head.parameters())) - set(map(id, embeddings.parameters()))
        own = [p for p in self._of_adapter(self.adapters["critic"]) if id(p) not in unread]
        return [*own, *self.value_head.parameters()]

    def _of_adapter(self, adapter: str) -> list[nn.Parameter]:
        return [p for name, p in self.model.named_parameters() if f".{adapter}." in f"{name}."]

    # ------------------------------------------------------------------------------------------------- adapters

    def _add(self, role: str, config: Any) -> None:
        """A further adapter, named after its role."""
        peft: Any = self.model
        config = copy.deepcopy(config)
        config.modules_to_save, config.task_type = None, "CAUSAL_LM"
        # where one adapter has rows of new tokens, peft wants rows of every other
        policy: dict[str, list[int]] = peft.peft_config[self.adapters["policy"]].trainable_token_indices or {}
        rows = config.trainable_token_indices or {}
        if not rows.keys() <= policy.keys():
            raise ValueError(
                "A reward model's adapter has rows for new tokens, which the policy's adapter lacks: set "
                "critic.kind to separate."
            )
        config.trainable_token_indices = {**policy, **rows} or None
        while role in peft.peft_config:  # the user's own adapter has that name
            role = f"{role}_"
        peft.add_adapter(role, config)
        self.adapters[role.rstrip("_")] = role

    def _add_reward(self, role: str, directory: str | os.PathLike[str]) -> tuple[Tensor, float]:
        """A reward model's adapter as ``role``; its (1, D) head and its offset."""
        from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

        if not is_adapter(directory):
            raise ValueError(
                f"{directory} holds no adapters, so it cannot share the policy's backbone: train the reward model on "
                "the same weights and export it with adapter_only: true, or set critic.kind to separate."
            )
        weights = load_peft_weights(os.fspath(directory), device="cpu")
        heads = [weights.pop(key) for key in list(weights) if key.endswith("score.weight")]
        if len(heads) != 1:
            raise ValueError(f"The adapter in {directory} has no score head: it is not a reward model's.")
        self._add(role, PeftConfig.from_pretrained(os.fspath(directory)))
        name = self.adapters[role]
        for key, p in self.model.named_parameters():
            if key.endswith(f".trainable_tokens_delta.{name}"):  # rows that it did not train are the backbone's
                weights.setdefault(key.removesuffix(f".{name}"), p.detach())
        outcome: Any = set_peft_model_state_dict(self.model, weights, adapter_name=name)
        places = len(self._of_adapter(name))
        if outcome.unexpected_keys or places != len(weights):
            raise ValueError(
                f"The adapter in {directory} does not fit this backbone: {len(weights)} tensors there, {places} "
                "places here. It must have been trained on the same model."
            )
        adapted = Path(directory) / ADAPTED
        settings = json.loads(adapted.read_text(encoding="utf-8")) if adapted.exists() else {}
        return heads[0], float(settings.get("score_offset", 0.0))


def is_adapter(directory: object) -> bool:
    """Returns whether a directory holds adapters."""
    return isinstance(directory, (str, os.PathLike)) and (Path(directory) / "adapter_config.json").exists()
