"""GRPO and its family: raise the reward of completions relative to other completions of their prompt."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.checks import check_arguments
from lightning_rlhf.functional import (
    Algorithm,
    PolicyLoss,
    gae,
    group_advantages,
    importance_weights,
    make_algorithm,
    normalized_sum,
    off_policy_mask,
    standardize,
    top_entropy_threshold,
    variance,
    whiten,
)
from lightning_rlhf.models import Load, LoRA
from lightning_rlhf.rewards import Reward, Samples, WeightedReward
from lightning_rlhf.rl import KL, Experience, GroupLoss, Groups, Loss, Rollout, Shaping, Updates
from lightning_rlhf.rl.environments import Environment
from lightning_rlhf.rl.groups import check_groups, reward_parts
from lightning_rlhf.rl.metrics import spread_over_ranks
from lightning_rlhf.rl.settings import check_kind
from lightning_rlhf.rollout import RolloutEngine
from lightning_rlhf.stages.base import LOAD
from lightning_rlhf.stages.groups import GroupStage
from lightning_rlhf.stages.optim import CosineWarmup, rl_optimizer
from lightning_rlhf.stages.rl import SHAPING
from lightning_rlhf.utils.collectives import gather_objects

ROLLOUT, NO_KL, GROUPS, LOSS, UPDATES = Rollout(samples_per_prompt=8), KL(coef=0.0), Groups(), GroupLoss(), Updates(1)


class GRPOModule(GroupStage):
    """Group relative policy optimization (Shao et al. 2024) and its family, without a critic.

    One ``training_step`` is one iteration: ``rollout.samples_per_prompt`` completions of each prompt are sampled and
    scored, how much better each is than the others of its group is its advantage, and ``updates.epochs`` passes over
    them train the policy. ``max_steps``, schedules and checkpoints count iterations.

    Args:
        pretrained: Where the policy starts, and what the reference is where there is a KL penalty.
        reward: Directory or hub id of a reward model; a function ``f(prompts, completions, **columns) -> scores`` or
            its import path; or a list of both with weights. None with an environment whose reward is enough.
        algorithm: Name in the table ``lightning_rlhf.functional.ALGORITHMS`` (``grpo``, ``dapo``, ``gspo``, ...), or an
            ``Algorithm`` of your own.
        tokenizer: Directory, hub id or tokenizer; None takes that of ``pretrained``.
        chat_template: Preset name, path of a Jinja file, or None for the tokenizer's own.
        lora: Adapters; None trains all weights.
        engine: The rollout engine; None takes the built-in one.
        rollout: How completions are sampled, and how many make a group.
        kl: The penalty on the distance from the reference. With ``coef: 0``, the default, no reference is loaded.
        shaping: How scores become rewards: penalties and masks for completions that are too long.
        groups: What happens to groups that teach nothing.
        loss: Entropy bonus, PPO-ptx, and the correction for an engine with other log-probs.
        updates: The optimizer steps of an iteration: epochs, minibatches, micro-batches, gradient norm.
        load: How weights are held: dtype, quantization (QLoRA), gradient checkpointing, layout.
        offload_frozen: Keep reference and reward model in CPU memory while they are not asked. This frees device memory
            and costs a copy to the device and back per iteration.
        optimizer: Makes an optimizer of parameter groups.
        lr_scheduler: Makes a schedule of an optimizer; it is stepped once per iteration.
        seed: Seed of samples and shuffles.
        environment: What the policy talks to in several turns, or tools. Its reward is the part ``environment`` of the
            score, beside ``reward``. None for single answers.

    Attributes:
        flat_iterations: Iterations in a row in which all groups were flat.
        curriculum: How often prompts were solved, and which of them rest.

    Logged: see ``docs/grpo.md``.

    Raises:
        ValueError: An argument is out of its range, or two contradict each other.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel,
        reward: str | list[WeightedReward] | Reward | Callable[..., Any] | None = None,
        algorithm: str | Algorithm = "grpo",
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        lora: LoRA | None = None,
        engine: RolloutEngine | None = None,
        rollout: Rollout = ROLLOUT,
        kl: KL = NO_KL,
        shaping: Shaping = SHAPING,
        groups: Groups = GROUPS,
        loss: GroupLoss = LOSS,
        updates: Updates = UPDATES,
        load: Load = LOAD,
        offload_frozen: bool = False,
        optimizer: OptimizerCallable = rl_optimizer,
        lr_scheduler: LRSchedulerCallable = CosineWarmup,
        seed: int = 0,
        environment: Environment | None = None,
    ) -> None:
        check_arguments(GRPOModule.__init__, locals())
        check_kind("loss", GroupLoss, loss)
        check_kind("groups", Groups, groups)
        found = make_algorithm(algorithm)
        terms = Loss(0.0, 0.0, loss.entropy_coef, loss.ptx_coef, found.mean, loss.old_logprobs)  # clipping is found's
        given = (rollout, kl, shaping, terms, updates, load, offload_frozen, optimizer, lr_scheduler, seed)
        super().__init__(pretrained, reward, tokenizer, chat_template, lora, engine, *given, environment=environment)
        self.algorithm, self.correction = found, loss
        self.use_groups(groups)
        check_groups(self.algorithm, groups, rollout.samples_per_prompt, self.reward, kl, shaping)

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL penalty."""
        return self.kl.coef > 0

    # ------------------------------------------------------------------------------------------------- the algorithm

    def compute_advantages(self, experience: Experience, rewards: Tensor) -> Tensor:
        """(N,) advantages: those of its completion at each token, or without a baseline, the rest of its rewards."""
        sequence, group = experience.sequence, experience.group
        if self.algorithm.baseline == "none":
            no_values, no_ends = torch.zeros_like(rewards), torch.zeros(len(experience.scores))
            advantages = gae(rewards, no_values, no_ends, sequence, gamma=1.0, lam=1.0).advantages
        elif self.algorithm.combine == "normalize":
            penalty = self.penalized_scores(experience) - experience.scores
            sums = normalized_sum(*reward_parts(experience, self.reward, penalty), group).double()
            advantages = standardize(sums, self.moments(sums, self._used(experience, sums)))[sequence].to(rewards)
        else:
            totals = experience.sum_by_sequence(rewards).double()
            totals = totals.masked_fill(~experience.scores.isfinite(), torch.nan)
            whole = self.moments(totals, self._used(experience, totals))
            lengths, formula = torch.tensor(experience.lengths), (self.algorithm.baseline, self.algorithm.scale)
            advantages = group_advantages(totals, group, *formula, lengths, whole)[sequence].to(rewards)
        spread = self.moments(advantages, experience.counts)
        experience.metrics |= {"advantage_mean": spread[1].item(), "advantage_std": variance(spread).sqrt().item()}
        return whiten(advantages, spread) if self.algorithm.whiten else advantages

    def score_experience(self, experience: Experience, samples: Samples | None) -> None:
        """As the base, and weighs tokens of another engine, alike in all updates of an iteration."""
        super().score_experience(experience, samples)
        probs, terms = (experience.old_logprobs, experience.rollout_logprobs), self.correction
        experience.factor = importance_weights(*probs, experience.sequence, terms.correction, terms.correction_max)
        if terms.correction != "none":
            found = spread_over_ranks(experience.factor, experience.weight, self.device)
            experience.metrics |= {f"importance_weight_{name}": value for name, value in found.items()}

    def compute_policy_loss(self, logprobs: Tensor, batch: Experience) -> PolicyLoss:
        """The algorithm's loss, weighed where completions come from another policy than the loss assumes."""
        sequence, advantages, threshold = batch.batch.sequence, batch.advantages, self.correction.off_policy_threshold
        found = self.algorithm.policy_loss(logprobs, batch.old_logprobs, advantages, sequence)
        factor = batch.factor
        if threshold is not None:
            factor = factor * off_policy_mask(logprobs, batch.rollout_logprobs, advantages, sequence, threshold)
        return found._replace(loss=found.loss * factor)

    def backward_minibatch(self, experience: Experience, chosen: list[int], beside: Any) -> dict[str, float]:
        """As the base, on the tokens of the minibatch at which the policy was least certain."""
        if self.correction.top_entropy < 1:
            experience = self._pick_tokens(experience, chosen)
        return super().backward_minibatch(experience, chosen, beside)

    def _pick_tokens(self, experience: Experience, chosen: list[int]) -> Experience:
        """An experience whose tokens below the minibatch's threshold of entropy have no policy loss."""
        own = torch.isin(experience.group[experience.sequence], torch.tensor(chosen)) & (experience.weight > 0)
        counted = torch.cat(gather_objects(experience.entropies[own]))
        threshold = top_entropy_threshold(counted, self.correction.top_entropy)
        return replace(experience, factor=experience.factor * (experience.entropies >= threshold))
