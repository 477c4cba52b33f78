"""PPO: raise the reward of sampled completions, and stay near the model that training starts from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.checks import check_arguments
from lightning_rlhf.functional import gae, value_loss, variance, variance_explained, whiten
from lightning_rlhf.models import Load, LoRA
from lightning_rlhf.rewards import Reward, WeightedReward
from lightning_rlhf.rl import GAE, KL, Critic, Experience, Loss, Rollout, Shaping, Updates, UpdateStats
from lightning_rlhf.rollout import RolloutEngine
from lightning_rlhf.stages.base import LOAD
from lightning_rlhf.stages.optim import CosineWarmup, parameter_groups, rl_optimizer
from lightning_rlhf.stages.rl import KL_PENALTY, LOSS, ROLLOUT, SHAPING, UPDATES, RLStage

CRITIC, ADVANTAGES = Critic(), GAE()


class PPOModule(RLStage):
    """Proximal policy optimization of a language model against a reward, with a KL penalty (Schulman et al. 2017).

    One ``training_step`` is one iteration: completions of a batch of prompts are sampled and scored, a critic says how
    good they were expected to be, and ``updates.epochs`` passes over them train policy and critic. ``max_steps``,
    schedules and checkpoints count iterations.

    Args:
        pretrained: Where the policy starts, and what the reference is: usually what SFT exported.
        reward: Directory or hub id of a reward model; a function ``f(prompts, completions, **columns) -> scores`` or
            its import path; or a list of both with weights. A reward model's ``score_offset`` is subtracted from its
            scores.
        critic: The critic: its kind, where it starts, its loss.
        tokenizer: Directory, hub id or tokenizer; None takes that of ``pretrained``.
        chat_template: Preset name, path of a Jinja file, or None for the tokenizer's own.
        lora: Adapters; None trains all weights, and keeps a frozen copy as the reference.
        engine: The rollout engine; None takes the built-in one.
        rollout: How completions are sampled.
        kl: The penalty on the distance from the reference.
        shaping: How scores become rewards.
        gae: How advantages are estimated from rewards and the critic's values.
        loss: The policy's loss: clipping, entropy bonus, PPO-ptx.
        updates: The optimizer steps of an iteration: epochs, minibatches, micro-batches, gradient norm.
        load: How weights are held: dtype, quantization (QLoRA), gradient checkpointing, layout.
        offload_frozen: Keep reference and reward model in CPU memory while they are not asked. This frees device memory
            and costs a copy to the device and back per iteration.
        optimizer: Makes an optimizer of parameter groups.
        lr_scheduler: Makes a schedule of an optimizer; it is stepped once per iteration.
        seed: Seed of samples and shuffles.

    Attributes:
        policy: The policy, from ``configure_model`` on.
        kl_coef: The current KL coefficient; it differs from ``kl.coef`` if ``kl.target`` adapts it.

    Logged: see ``docs/ppo.md``.

    Raises:
        ValueError: An argument is out of its range.
    """

    critic_settings: Critic

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel,
        reward: str | list[WeightedReward] | Reward | Callable[..., Any],
        critic: Critic = CRITIC,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        lora: LoRA | None = None,
        engine: RolloutEngine | None = None,
        rollout: Rollout = ROLLOUT,
        kl: KL = KL_PENALTY,
        shaping: Shaping = SHAPING,
        gae: GAE = ADVANTAGES,
        loss: Loss = LOSS,
        updates: Updates = UPDATES,
        load: Load = LOAD,
        offload_frozen: bool = False,
        optimizer: OptimizerCallable = rl_optimizer,
        lr_scheduler: LRSchedulerCallable = CosineWarmup,
        seed: int = 0,
    ) -> None:
        check_arguments(PPOModule.__init__, locals())
        super().__init__(
            pretrained,
            reward,
            tokenizer,
            chat_template,
            lora,
            engine,
            rollout,
            kl,
            shaping,
            loss,
            updates,
            load,
            offload_frozen,
            optimizer,
            lr_scheduler,
            seed,
            critic,
        )
        self.gae, self.critic_kind = gae, critic.kind_for(lora)

    def compute_advantages(self, experience: Experience, rewards: Tensor) -> Tensor:
        """(N,) generalized advantage estimates; sets the values and returns that the critic learns from."""
        if self.critic_kind != "head":  # otherwise the policy's pass has computed them
            found = self.forward_all(experience, lambda batch: self.forward_for_scoring("critic", batch))
            experience.values, experience.last_values = found
        values, last_values = experience.values, experience.last_values
        bootstrap = experience.truncated & self.gae.bootstrap_truncated
        ends = torch.where(bootstrap, last_values, 0.0)
        advantages, returns = gae(rewards, values, ends, experience.sequence, self.gae.gamma, self.gae.lam)
        experience.returns = returns
        spread = self.moments(advantages, experience.counts)
        explained = variance_explained(
            self.moments(returns - values, experience.counts), self.moments(returns, experience.counts)
        )
        experience.metrics |= {
            "advantage_mean": spread[1].item(),
            "advantage_std": variance(spread).sqrt().item(),
            "explained_variance": explained.item(),
        }
        return whiten(advantages, spread) if self.gae.whiten else advantages

    def compute_losses(self, batch: Experience, weight: Tensor, stats: UpdateStats) -> Iterator[Tensor]:
        """The policy's loss, then the critic's; as one where the critic is a head, which shares its pass."""
        if self.critic_kind == "head":
            out = self.forward_policy(batch)
            assert out.values is not None
            loss = self.policy_term(out, batch, weight, stats)
            yield loss + self.value_term(out.values, batch, weight, stats)
        else:
            yield from super().compute_losses(batch, weight, stats)
            yield self.value_term(self.forward_role("critic", batch).values, batch, weight, stats)

    def value_term(self, values: Tensor, batch: Experience, weight: Tensor, stats: UpdateStats) -> Tensor:
        """The critic's loss on a micro-batch, of its (N,) values."""
        found = value_loss(values, batch.values, batch.returns, self.critic_settings.clip)
        stats.add(weight, value_loss=found.loss, value_clip_fraction=found.clipped)
        return self.critic_settings.loss_coef * (weight * found.loss).sum()

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Those of policy and critic, each clipped by its own norm; by one norm where the critic is a head."""
        policy, critic = self.actors.policy_parameters(), self.actors.critic_parameters()
        return {"policy": policy + critic} if self.critic_kind == "head" else {"policy": policy, "value": critic}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer with groups for policy and critic where they share weights, otherwise one for each."""
        parameters = (self.actors.policy_parameters(), self.actors.critic_parameters())
        policy, critic = map(parameter_groups, parameters)
        if self.critic_settings.lr is not None:
            critic = [{**group, "lr": self.critic_settings.lr} for group in critic]
        groups = [policy + critic] if self.actors.critic is None else [policy, critic]
        optimizers = [self.make_optimizer(group) for group in groups]
        return optimizers, [self.make_lr_scheduler(optimizer) for optimizer in optimizers]
