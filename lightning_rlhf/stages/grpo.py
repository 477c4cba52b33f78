"""GRPO and its family: raise the reward of completions relative to other completions of their prompt."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.checks import check_arguments
from lightning_rlhf.data import PromptBatch
from lightning_rlhf.functional import (
    Algorithm,
    PolicyLoss,
    flat_groups,
    gae,
    group_advantages,
    importance_weights,
    make_algorithm,
    normalized_sum,
    off_policy_mask,
    standardize,
    variance,
    whiten,
)
from lightning_rlhf.metrics import TokenMean
from lightning_rlhf.models import Load, LoRA
from lightning_rlhf.rewards import Reward, Samples, WeightedReward
from lightning_rlhf.rl import KL, Experience, GroupLoss, Groups, Loss, Rollout, Shaping, Updates
from lightning_rlhf.rl.groups import check_groups, check_spare, group_metrics, reward_parts, stop_at_flat
from lightning_rlhf.rl.refill import Refill, Round
from lightning_rlhf.rl.settings import check_kind
from lightning_rlhf.rollout import RolloutEngine
from lightning_rlhf.stages.base import LOAD
from lightning_rlhf.stages.optim import CosineWarmup, rl_optimizer
from lightning_rlhf.stages.rl import SHAPING, VALIDATION, RLStage

ROLLOUT, NO_KL, GROUPS, LOSS, UPDATES = Rollout(samples_per_prompt=8), KL(coef=0.0), Groups(), GroupLoss(), Updates(1)
#: Key of the order in which prompts are sampled with ``refill``; epochs have the keys from 0.
_REFILL = -1


class GRPOModule(RLStage):
    """Group relative policy optimization (Shao et al. 2024) and its family, without a critic.

    One ``training_step`` is one iteration: ``rollout.samples_per_prompt`` completions of each prompt are sampled and
    scored, how much better each is than the others of its group is its advantage, and ``updates.epochs`` passes over
    them train the policy. ``max_steps``, schedules and checkpoints count iterations.

    Args:
        pretrained: Where the policy starts, and what the reference is where there is a KL penalty.
        reward: Directory or hub id of a reward model; a function ``f(prompts, completions, **columns) -> scores`` or
            its import path; or a list of both with weights.
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

    Attributes:
        flat_iterations: Iterations in a row in which all groups were flat.

    Logged: see ``docs/grpo.md``.

    Raises:
        ValueError: An argument is out of its range, or two contradict each other.
    """

    entries: ClassVar[Mapping[str, Any]] = {**RLStage.entries, "rl": (*RLStage.entries["rl"], "flat_iterations")}
    flat_iterations: int = 0

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel,
        reward: str | list[WeightedReward] | Reward | Callable[..., Any],
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
    ) -> None:
        check_arguments(GRPOModule.__init__, locals())
        check_kind("loss", GroupLoss, loss)
        check_kind("groups", Groups, groups)
        found = make_algorithm(algorithm)
        terms = Loss(0.0, 0.0, loss.entropy_coef, loss.ptx_coef, found.mean, loss.old_logprobs)  # clipping is found's
        given = (rollout, kl, shaping, terms, updates, load, offload_frozen, optimizer, lr_scheduler, seed)
        super().__init__(pretrained, reward, tokenizer, chat_template, lora, engine, *given)
        self.algorithm, self.groups, self.correction = found, groups, loss
        check_groups(self.algorithm, groups, rollout.samples_per_prompt, self.reward, kl, shaping)
        for stage in ("val", "test"):
            self.metrics.declare(stage, **{self.pass_at: TokenMean()})

    @property
    def needs_reference(self) -> bool:
        """Whether there is a KL penalty."""
        return self.kl.coef > 0

    @property
    def pass_at(self) -> str:
        """Name of the metric: ``pass@8`` for 8 completions per prompt."""
        return f"pass@{self.samples_per_prompt}"

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

    def compute_policy_loss(self, logprobs: Tensor, batch: Experience) -> PolicyLoss:
        """The algorithm's loss, weighed where completions come from another policy than the loss assumes."""
        old, rollout, advantages = batch.old_logprobs, batch.rollout_logprobs, batch.advantages
        sequence, terms = batch.batch.sequence, self.correction
        found = self.algorithm.policy_loss(logprobs, old, advantages, sequence)
        factor = importance_weights(old, rollout, sequence, terms.correction, terms.correction_max)
        if terms.off_policy_threshold is not None:
            factor = factor * off_policy_mask(logprobs, rollout, advantages, sequence, terms.off_policy_threshold)
        return found._replace(loss=found.loss * factor)

    # ------------------------------------------------------------------------------------------------- groups

    def counted_completions(self, experience: Experience) -> Tensor:
        """(S,) bool: completions with a score, without those of flat groups unless these are kept."""
        counted, flat = super().counted_completions(experience), self._flat(experience)
        return counted if self.groups.flat_groups == "keep" else counted & ~flat[experience.group]

    def score_experience(self, experience: Experience, samples: Samples | None) -> None:
        """Scores an experience, and counts its groups; all ranks must call.

        Raises:
            RewardError: All groups were flat for ``groups.max_flat`` iterations.
        """
        super().score_experience(experience, samples)
        assert experience.scored is not None
        if "flat_groups" not in experience.metrics:  # otherwise the refill has counted all that it sampled
            every = [(experience, self._flat(experience))]
            experience.metrics |= group_metrics(every, self.groups.pass_score, self.device)
        self.flat_iterations = self.flat_iterations + 1 if experience.metrics["flat_groups"] == 1 else 0
        stop_at_flat(self.flat_iterations, self.groups.max_flat, self.reward.names, experience.scored)

    def run_rollout(self, prompts: PromptBatch, iteration: int) -> tuple[Experience, Samples | None]:
        """Samples completions; with ``refill``, of further prompts of the batch until enough groups are not flat."""
        if self.groups.flat_groups != "refill" or iteration == VALIDATION:
            return super().run_rollout(prompts, iteration)
        copies = self.count_copies(prompts.rows, iteration)

        def sample(chosen: list[int]) -> Round:
            part = prompts.select(chosen)
            completions = self.sample_completions(part, iteration, [copies[i] for i in chosen])
            experience, samples = self.to_experience(part, completions)
            experience.scored = self.score(samples)
            experience.scores = experience.scored.total.cpu()
            return Round(completions, experience, samples, self._flat(experience))

        refill = Refill(self.shuffle_prompts(prompts.rows, _REFILL), self.groups)
        refill.run(sample)
        chosen, completions, scores = refill.kept()
        # where all groups are flat, the last round stands for them: it is scored, and nothing of it counts
        experience, samples = refill.seen[-1].experience, refill.seen[-1].samples
        if refill.found:
            experience, samples = self.to_experience(prompts.select(chosen), completions)
            experience.scored = scores
        every = [(each.experience, each.flat) for each in refill.seen]
        counts = {"rounds": refill.rounds, "left_over": refill.left_over}
        experience.metrics |= group_metrics(every, self.groups.pass_score, self.device) | counts
        return experience, samples

    def _flat(self, experience: Experience) -> Tensor:
        """(B,) bool: which groups have one score, penalties included."""
        return flat_groups(self.penalized_scores(experience), experience.group)

    def _used(self, experience: Experience, values: Tensor) -> Tensor:
        """(S,) 1 for completions that count in statistics of the batch: not those of groups that were dropped."""
        dropped = self._flat(experience)[experience.group] & (self.groups.flat_groups != "keep")
        return (values.isfinite() & ~dropped).double()

    # ------------------------------------------------------------------------------------------------- hooks

    def check_fit(self) -> None:
        """As the base; refuses a refill that holds back whole batches."""
        super().check_fit()
        check_spare(self.groups, getattr(self.trainer, "datamodule", None))

    def on_empty_minibatch(self) -> None:
        """No completion of a minibatch counts: its groups are flat, which is no fault."""

    def update_metrics(self, stage: str, experience: Experience, scores: Tensor) -> None:
        """Updates pass@k: the share of prompts of which at least one completion passes."""
        passed = (scores.cpu() >= self.groups.pass_score).float()
        solved = torch.zeros(len(experience.trees)).scatter_reduce(0, experience.group, passed, "amax")
        self.metrics.update(stage, torch.ones_like(solved).to(self.device), **{self.pass_at: solved.to(self.device)})
