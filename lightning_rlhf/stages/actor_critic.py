"""Policy, reference and critic of an actor-critic stage: three models, or one backbone with adapters."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from lightning_rlhf.data.experience import Experience
from lightning_rlhf.data.packed import PackedBatch, pack
from lightning_rlhf.data.prompts import PromptBatch
from lightning_rlhf.models import Policy, load_causal_lm, load_tokenizer
from lightning_rlhf.models.backbone import is_checkpointing
from lightning_rlhf.models.roles import Role, RoleModel, is_adapter
from lightning_rlhf.models.value import ValueModel, load_value_model
from lightning_rlhf.rewards import BadScores, Reward, RewardModelReward, Samples, check_scores
from lightning_rlhf.rewards.model import first_other_token
from lightning_rlhf.rollout import Completion
from lightning_rlhf.stages.online import VALIDATION, OnlineStage, disable_dropout
from lightning_rlhf.stages.optim import parameter_groups, parameters_of
from lightning_rlhf.strategies import whole_weights
from lightning_rlhf.utils.collectives import gather_objects

BadScoresChoice = Literal["stop", "drop"]


class ActorCriticStage(OnlineStage):
    """Base of online stages with a critic.

    Attributes:
        policy: The policy, from ``configure_model`` on; a ``RoleModel`` where there are adapters.
        critic: The critic, where it is a model of its own.
        reference: The frozen copy, where no adapter can be switched off.
        reward: What scores.
        bad_scores: What becomes of a sample whose score is no finite number.
        norms: Gradient norms of policy and critic at their last steps, before clipping.
    """

    policy: Policy
    critic: ValueModel
    reference: Policy
    reward: Reward
    bad_scores: BadScoresChoice
    critic_init: str | os.PathLike[str] | PreTrainedModel | None
    critic_lr: float | None
    shared: bool
    max_norm: float | None
    offload_frozen: bool
    parts: int
    reuse_passes: bool
    norms: dict[str, float]

    def configure_model(self) -> None:
        """Loads policy, reference, critic and reward model once."""
        if hasattr(self, "policy"):
            return
        self._check_critic()
        options: dict[str, Any] = dict(
            dtype=self.dtype_of_weights,
            vocab_size=len(self.tokenizer),
            new_tokens=self.new_token_ids,
            trust_remote_code=self.trust_remote_code,
        )
        trained: dict[str, Any] = dict(
            lora=self.lora,
            quantization=self.quantization,
            gradient_checkpointing=self.gradient_checkpointing,
            **options,
        )
        if not self.shared:  # before adapters are put into a model that was given
            start = self._untouched() if self.critic_init is None else self.critic_init
            self.critic = ValueModel(load_value_model(start, **trained), self.layout)
        if self.lora is None:
            frozen = load_causal_lm(self._untouched(), **options).requires_grad_(False)
            self.reference = Policy(frozen, self.layout)
        model = load_causal_lm(self.pretrained, **trained)
        if self.lora is None:
            self.policy = Policy(model, self.layout)
        else:
            same = next((r for r in self.reward.modules() if self._shares_backbone(r)), None) if self.shared else None
            self.policy = RoleModel(
                model,
                self.layout,
                critic=self.shared,
                critic_init=self.critic_init,  # type: ignore[arg-type]
                reward=None if same is None else same.pretrained,  # type: ignore[arg-type]
            )
            if same is not None:
                same.share(self.policy)  # type: ignore[operator]
        self.reward.load()
        disable_dropout(self)

    def _check_critic(self) -> None:
        """Refuses a critic that would read the policy's tokens as others; without a tokenizer nobody can tell."""
        if self.critic_init is None or isinstance(self.critic_init, PreTrainedModel):
            return
        try:
            tokenizer = load_tokenizer(self.critic_init, self.trust_remote_code)
        except (OSError, ValueError):
            return
        if (found := first_other_token(self.tokenizer, tokenizer)) is not None:
            own, other = found
            raise ValueError(
                f"critic={os.fspath(self.critic_init)!r} has another tokenizer than the policy, whose tokens it would "
                f"read as others: {own!r} is {other!r} there. Give a critic of the policy's family, or null to start "
                "from the policy's weights."
            )

    def _shares_backbone(self, reward: nn.Module) -> bool:
        """Whether a reward is an adapter of the very weights that the policy starts from."""
        if not isinstance(reward, RewardModelReward) or not is_adapter(reward.pretrained) or not reward.same_tokens:
            return False
        config = json.loads((Path(reward.pretrained) / "adapter_config.json").read_text(encoding="utf-8"))
        base, start = config["base_model_name_or_path"], self.pretrained
        name = str(start.name_or_path) if isinstance(start, PreTrainedModel) else os.fspath(start)
        return bool(base) and (base == name or os.path.realpath(base) == os.path.realpath(name))

    def _untouched(self) -> str | os.PathLike[str] | PreTrainedModel:
        """The weights that the run starts from, apart from those that it trains."""
        return copy.deepcopy(self.pretrained) if isinstance(self.pretrained, PreTrainedModel) else self.pretrained

    @property
    def model_to_export(self) -> Policy:
        """The policy."""
        return self.policy

    def on_fit_start(self) -> None:
        """Has the reference round as the policy does, and takes what is frozen off the device."""
        super().on_fit_start()
        if hasattr(self, "reference"):
            dtype = next(self.policy.parameters()).dtype  # a strategy may have cast it
            for parameter in self.reference.parameters():
                parameter.data = parameter.data.to(dtype)
        with self.present("reward", "reference"):
            pass

    def limits(self) -> dict[str, int]:
        """Those of the reward, and the context of a critic of its own."""
        found = dict(self.reward.limits)
        if not self.shared:
            config = self.critic.transformer.config.get_text_config()
            context: int | None = getattr(config, "max_position_embeddings", None)
            if context is not None:
                found["the context of the critic"] = context
        return found

    @contextmanager
    def present(self, *names: Literal["reward", "reference"]) -> Iterator[None]:
        """Within it these are on the device; else on the CPU, where ``offload_frozen`` says so."""
        frozen = [getattr(self, name) for name in names if self.offload_frozen and hasattr(self, name)]
        for module in frozen:
            module.to(self.device)
        try:
            yield
        finally:
            for module in frozen:
                module.to("cpu")

    def score(self, samples: Samples | None) -> Tensor:
        """(S,) what the reward says of this rank's samples; all ranks must ask, also without any.

        Returns:
            Scores; NaN where the reward gave no finite number, and such samples are dropped.

        Raises:
            ValueError: It gave one, on whichever rank, and they are not.
        """
        with whole_weights(self.strategy, self.policy), self.present("reward"):
            scores, why = (torch.zeros(0), "") if samples is None else self._scored(samples)
        why = next(filter(None, gather_objects(why)), "")
        if why and self.bad_scores == "stop":
            raise ValueError(f"{why} Mend the reward, or set model.bad_scores to drop, which leaves such samples out.")
        if why:
            rank_zero_warn(f"A sample is left out: {why}")
        return scores

    def _scored(self, samples: Samples) -> tuple[Tensor, str]:
        """(S,) scores, NaN where they are no finite numbers, and what is to be said of those."""
        try:
            return check_scores(self.reward(samples), samples, f"The reward {type(self.reward).__name__}"), ""
        except BadScores as error:
            return error.scores, str(error)

    def play(self, role: Role, batch: PackedBatch, **options: Any) -> Any:
        """Runs a role, whichever model has it."""
        if self.shared or (self.lora is not None and role != "critic"):
            return self.policy(batch, role, **options)
        return getattr(self, role)(batch, **options)

    def reuses_passes(self, experience: Experience) -> bool:
        """Whether the passes that score an experience are those of its first update; all ranks must ask."""
        # a sharded model wants its backward pass before another forward pass; who checkpoints layers does it for memory
        apart = is_checkpointing(self.policy.transformer) or self._sharded is not None
        if not self.reuse_passes or self.parts > 1 or apart:
            return False
        return self.count_micro_batches(experience, range(len(experience.trees))) == 1

    def play_first(self, role: Role, batch: PackedBatch, experience: Experience, **options: Any) -> Any:
        """As :meth:`play`, to score an experience; the output stays in it, with its graph, where it is to be kept."""
        if experience.kept is None:
            return self.play(role, batch, **options)
        with torch.enable_grad():
            experience.kept[role] = self.play(role, batch, **options)
        return experience.kept[role]

    @torch.no_grad()
    def score_completions(
        self, prompts: PromptBatch, completions: Sequence[Sequence[Completion]]
    ) -> dict[str, list[float]]:
        """What :class:`~lightning_rlhf.callbacks.SampleCompletions` shows beside completions; no other rank takes part.

        Args:
            prompts: At least one.
            completions: Of each prompt.

        Returns:
            By name, a value a completion: its ``score``, unless the reward needs a column that the prompts lack; and
            ``kl``, the sum over its tokens of log-probs less the reference's, at the sampling temperature.
        """
        experience, samples = self.collect(prompts, completions)
        heat, batch = self.sampling.temperature, pack(experience.trees).to(self.device)
        with self.present("reward", "reference"):
            now, reference = (self.play(r, batch, temperature=heat).logprobs for r in ("policy", "reference"))
            scores = {"score": self._scored(samples)[0].tolist()} if self.reward.needs <= samples.columns.keys() else {}
        kl = now.new_zeros(len(samples.completions)).index_add(0, experience.sequence.to(now.device), now - reference)
        return {**scores, "kl": kl.tolist()}

    def trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Parameters of policy and critic."""
        if self.shared:
            return self.policy.policy_parameters(), self.policy.critic_parameters()  # type: ignore[operator]
        return tuple([p for p in m.parameters() if p.requires_grad] for m in (self.policy, self.critic))  # type: ignore[return-value]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer with groups for policy and critic on a shared backbone, else one for each."""
        policy, critic = (parameter_groups(parameters) for parameters in self.trained())
        if self.critic_lr is not None:
            critic = [{**group, "lr": self.critic_lr} for group in critic]
        optimizers = [self.make_optimizer(g) for g in ([policy + critic] if self.shared else [policy, critic])]
        return optimizers, [self.make_lr_scheduler(optimizer) for optimizer in optimizers]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clips the gradients of policy and critic, each by its own norm."""
        mine = set(map(id, parameters_of(optimizer)))
        for name, parameters in zip(("policy", "value"), self.trained(), strict=True):
            if id(parameters[0]) in mine:
                self.norms[f"{name}_grad_norm"] = self.clip(parameters, self.max_norm).item()

    # ------------------------------------------------------------------------------------------------- evaluation

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Samples completions of held-out prompts, by the same keys at each validation, and scores them."""
        self._evaluate("val", prompts)

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """As :meth:`validation_step`, under ``test/``."""
        self._evaluate("test", prompts)

    def _evaluate(self, stage: str, prompts: PromptBatch) -> None:
        experience, samples = self.rollout(prompts, VALIDATION)
        scores = self.score(samples)
        lengths = experience.sequence.bincount(minlength=len(scores)).float()
        for name, values in {"score": scores, "length": lengths}.items():
            metric: Any = self.metrics[f"{stage}_{name}"]
            # a rank without prompts logs as the others do: they add up their metrics at the epoch's end
            known = values.isfinite().float()
            metric.update(values.nan_to_num(), known)
            self.log(f"{stage}/{name}", metric, on_epoch=True, prog_bar=name == "score", batch_size=1)

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A record a completion: ``row``, ``completion``, its ``score`` (None where it has none), ``truncated``."""
        _, samples = self.rollout(prompts, VALIDATION)
        scores = self.score(samples)
        if samples is None:
            return []
        rows = [row for row in prompts.rows for _ in range(self.samples_per_prompt)]
        known = [score if math.isfinite(score) else None for score in scores.tolist()]
        columns = (rows, samples.completions, known, samples.truncated)
        names = ("row", "completion", "score", "truncated")
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
