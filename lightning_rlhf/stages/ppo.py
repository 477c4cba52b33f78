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
        critic: The critic: where it starts, whether it shares the policy's backbone, its loss.
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
        self.gae = gae

    def compute_advantages(self, experience: Experience, rewards: Tensor) -> Tensor:
        """(N,) generalized advantage estimates; sets the values and returns that the critic learns from."""
        values, last_values = self.forward_all(experience, lambda batch: self.forward_for_scoring("critic", batch))
        bootstrap = experience.truncated & self.gae.bootstrap_truncated
        ends = torch.where(bootstrap, last_values, 0.0)
        advantages, returns = gae(rewards, values, ends, experience.sequence, self.gae.gamma, self.gae.lam)
        experience.values, experience.returns = values, returns
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
        """The policy's loss, then the critic's."""
        yield from super().compute_losses(batch, weight, stats)
        values = self.forward_role("critic", batch).values
        found = value_loss(values, batch.values, batch.returns, self.critic_settings.clip)
        stats.add(weight, value_loss=found.loss, value_clip_fraction=found.clipped)
        yield self.critic_settings.loss_coef * (weight * found.loss).sum()

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Those of policy and critic."""
        return {**super().trainable_parameters(), "value": self.actors.critic_parameters()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer with groups for policy and critic on a shared backbone, otherwise one for each."""
        policy, critic = (parameter_groups(parameters) for parameters in self.trainable_parameters().values())
        if self.critic_settings.lr is not None:
            critic = [{**group, "lr": self.critic_settings.lr} for group in critic]
        groups = [policy + critic] if self.actors.critic is None else [policy, critic]
        optimizers = [self.make_optimizer(group) for group in groups]
        return optimizers, [self.make_lr_scheduler(optimizer) for optimizer in optimizers]
