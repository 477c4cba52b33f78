"""What the stages of reinforcement learning share: an iteration from rollout to optimizer steps."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.checks import check_arguments
from lightning_rlhf.data import PackedBatch, PromptBatch, split
from lightning_rlhf.functional import (
    PolicyLoss,
    RunningMoments,
    ScoredTokens,
    adapt_kl_coef,
    flat_groups,
    k1,
    k3,
    kl_loss,
    loss_weights,
    overlong_penalty,
    policy_loss,
    token_rewards,
    whiten,
)
from lightning_rlhf.metrics import TokenMean
from lightning_rlhf.models import Load, LoRA, Policy
from lightning_rlhf.models.backbone import is_checkpointing
from lightning_rlhf.models.roles import Role
from lightning_rlhf.rewards import (
    FAULTS,
    FunctionReward,
    Reward,
    RewardError,
    Samples,
    Scores,
    WeightedReward,
    make_reward,
)
from lightning_rlhf.rl import (
    KL,
    Critic,
    Experience,
    Loss,
    Rollout,
    Shaping,
    Updater,
    Updates,
    UpdateStats,
    to_experience,
)
from lightning_rlhf.rl.actors import load_actors
from lightning_rlhf.rl.checks import (
    PTX,
    Beside,
    check_adaptive_kl,
    check_beside,
    check_lengths,
    warn_of_biased_sampling,
)
from lightning_rlhf.rl.environments import Environment
from lightning_rlhf.rl.episodes import check_environment, count_turns, with_environment
from lightning_rlhf.rl.metrics import extra_means, moments_over_ranks, rollout_metrics
from lightning_rlhf.rl.records import Sampled, completion_records
from lightning_rlhf.rl.settings import check_kind
from lightning_rlhf.rollout import (
    Completion,
    RemoteEngine,
    Request,
    RolloutEngine,
    Sampling,
    as_answers,
    play_episodes,
    read_openings,
)
from lightning_rlhf.stages.base import LOAD, SettingsError, Stage
from lightning_rlhf.stages.optim import CosineWarmup, parameter_groups, rl_optimizer
from lightning_rlhf.strategies import ColossalAIStrategy, whole_state_dict, whole_weights
from lightning_rlhf.strategies.gradients import sharding
from lightning_rlhf.utils.collectives import all_reduce, data_rank, gather_objects, once_per_copy
from lightning_rlhf.utils.random import generator, sample_key

#: In place of an iteration in the keys of validation samples: validations can then be compared.
VALIDATION = -1
#: By which argument of the constructor a model comes.
_GIVEN_AS = {"policy": "pretrained", "reference": "pretrained", "critic": "critic=Critic(model)", "reward": "reward"}
#: What the progress bar shows.
_IN_BAR = ("train/score", "train/kl", "train/length_mean")
#: What is not logged where no reference is asked.
_KL_NAMES = ("kl", "kl_k3")
ROLLOUT, KL_PENALTY, SHAPING, LOSS, UPDATES = Rollout(), KL(), Shaping(), Loss(), Updates()


class RLStage(Stage):
    """Base of the stages that learn from samples of their policy.

    One ``training_step`` is one iteration: sample completions of a batch of prompts, score them, compute advantages,
    then take several optimizer steps on them. ``max_steps``, schedules and checkpoints count iterations. An algorithm
    is a subclass with its own :meth:`compute_advantages` and, where its loss is not the clipped one,
    :meth:`compute_policy_loss`; or :meth:`compute_losses`, where it has further ones.

    Args:
        pretrained: Where the policy starts, and what the reference is: usually what SFT exported.
        reward: Directory or hub id of a reward model; a function ``f(prompts, completions, **columns) -> scores`` or
            its import path; or a list of both with weights. A reward model's ``score_offset`` is subtracted from its
            scores.
        tokenizer: Directory, hub id or tokenizer; None takes that of ``pretrained``.
        chat_template: Preset name, path of a Jinja file, or None for the tokenizer's own.
        lora: Adapters; None trains all weights, and keeps a frozen copy as the reference.
        engine: The rollout engine; None takes the built-in one.
        rollout: How completions are sampled.
        kl: The penalty on the distance from the reference.
        shaping: How scores become rewards.
        loss: The policy's loss.
        updates: The optimizer steps of an iteration.
        load: How weights are held: dtype, quantization (QLoRA), gradient checkpointing, layout.
        offload_frozen: Keep reference and reward model in CPU memory while they are not asked. This frees device memory
            and costs a copy to the device and back per iteration.
        optimizer: Makes an optimizer of parameter groups.
        lr_scheduler: Makes a schedule of an optimizer; it is stepped once per iteration.
        seed: Seed of samples and shuffles.
        critic: The critic; None for an algorithm without one.
        environment: What the policy talks to in several turns; None for single answers.

    Attributes:
        policy: The policy, from ``configure_model`` on; with adapters it is a ``RoleModel``.
        reference: The frozen copy, without adapters.
        kl_coef: The current KL coefficient; it differs from ``kl.coef`` if ``kl.target`` adapts it.
        iteration: Number of iterations done.
        skipped: Iterations in a row that took no update because something in them was not finite.
        sampled: What the last iteration sampled: first what it learned from.

    Raises:
        ValueError: An argument is out of its range.
    """

    automatic_optimization: ClassVar[bool] = False
    works_on = "prompts"
    entries: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **Stage.entries,
        "rl": ("iteration", "kl_coef", "running_scores"),
    }
    #: What it learns from beside the prompts of a batch.
    beside: ClassVar[Beside] = PTX
    policy: Policy
    iteration: int = 0
    _not_finite: int = -1
    _reward_seconds: float = 0.0
    _left_out: int = 0
    sampled: Sequence[Sampled] = ()

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel,
        reward: str | list[WeightedReward] | Reward | Callable[..., Any] | None,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        lora: LoRA | None = None,
        engine: RolloutEngine | None = None,
        rollout: Rollout = ROLLOUT,
        kl: KL = KL_PENALTY,
        shaping: Shaping = SHAPING,
        loss: Loss = LOSS,
        updates: Updates = UPDATES,
        load: Load = LOAD,
        offload_frozen: bool = False,
        optimizer: OptimizerCallable = rl_optimizer,
        lr_scheduler: LRSchedulerCallable = CosineWarmup,
        seed: int = 0,
        critic: Critic | None = None,
        environment: Environment | None = None,
    ) -> None:
        check_arguments(RLStage.__init__, locals())
        groups = {Rollout: rollout, KL: kl, Shaping: shaping, Loss: loss, Updates: updates, Critic: critic, Load: load}
        for kind, group in groups.items():
            if kind is not Critic or group is not None:
                check_kind(kind.__name__.lower(), kind, group)
        if shaping.overlong_cache is not None and shaping.overlong_cache > rollout.sampling.max_new_tokens:
            raise ValueError(
                f"shaping.overlong_cache={shaping.overlong_cache} counts back from rollout.sampling.max_new_tokens="
                f"{rollout.sampling.max_new_tokens}: set it to less, or to null."
            )
        super().__init__(pretrained, tokenizer, chat_template, lora, load, optimizer, lr_scheduler, updates.max_skipped)
        self.save_settings()
        self.rollout, self.kl, self.shaping, self.loss, self.updates = rollout, kl, shaping, loss, updates
        self.engine, self.offload_frozen, self.seed = engine or self.engine, offload_frozen, seed
        self.critic_settings, self.updater = critic, Updater(self)
        self.kl_coef, self.running_scores = kl.coef, RunningMoments()
        self._faults: Counter[str] = Counter()  # completions of the iteration that verifiers could not judge
        self.environment = environment
        if environment is not None:
            check_environment(environment, self.tokenizer, rollout, shaping, has_reward=reward is not None)
        elif reward is None:
            raise ValueError("There is no reward. Set reward, or an environment that gives one.")
        given = None if reward is None else make_reward(reward, self.tokenizer, load.dtype, load.trust_remote_code)
        self.reward = given if environment is None and given is not None else with_environment(given)
        for stage in ("val", "test"):
            self.metrics.declare(stage, **({} if self.reward.relative else {"score": TokenMean()}), length=TokenMean())

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses other models in the place of those that ``configure_model`` loads.

        Raises:
            ValueError: It is one; the message says where to give it.
        """
        if name in _GIVEN_AS and isinstance(value, nn.Module):
            actors = vars(self).get("actors")
            own = getattr(actors, name) if actors is not None else value if name == "reward" else None
            if value is not own:
                raise ValueError(
                    f"{type(self).__name__}.{name} can't be replaced: configure_model fits policy, reference, critic "
                    f"and reward to one another. Give the model as {_GIVEN_AS[name]}, or change {name} in place, as by "
                    f"module.{name}.compile()."
                )
        super().__setattr__(name, value)

    # ------------------------------------------------------------------------------------------------- the algorithm

    def compute_advantages(self, experience: Experience, rewards: Tensor) -> Tensor:
        """Computes how much better each token was than expected.

        Args:
            experience: This rank's, with scores, old and reference log-probs. What an algorithm needs further in its
                losses is set on it here.
            rewards: (N,) rewards of tokens: shaped scores on last tokens, minus the KL penalty.

        Returns:
            (N,) advantages.
        """
        raise NotImplementedError

    def compute_policy_loss(self, logprobs: Tensor, batch: Experience) -> PolicyLoss:
        """Computes the loss of each token; here it is the clipped one.

        Args:
            logprobs: (N,) log-probs of the policy, with gradient.
            batch: A micro-batch.

        Returns:
            (N,) losses, ratios, and where they are clipped.
        """
        return policy_loss(logprobs, batch.old_logprobs, batch.advantages, self.loss.clip_low, self.loss.clip_high)

    def compute_losses(self, batch: Experience, weight: Tensor, stats: UpdateStats) -> Iterator[Tensor]:
        """The losses of a micro-batch; each is backpropagated before the next is computed.

        Here it is one: the policy's loss, plus the KL penalty where it is in the loss, minus the entropy bonus.

        Args:
            batch: A micro-batch.
            weight: (N,) share of each token in the mean of the minibatch over all ranks.
            stats: Takes what is logged.

        Yields:
            Scalars.
        """
        yield self.policy_term(self.forward_policy(batch), batch, weight, stats)

    def forward_policy(self, batch: Experience) -> ScoredTokens:
        """Runs the policy on a micro-batch in an update."""
        options = {"temperature": self.sampling.temperature, "entropy": self.loss.entropy_coef != 0}
        found: ScoredTokens = self.forward_role("policy", batch, **options)
        return found

    def policy_term(self, out: ScoredTokens, batch: Experience, weight: Tensor, stats: UpdateStats) -> Tensor:
        """The loss of a micro-batch that :meth:`compute_losses` yields, of what the policy returned."""
        found = self.compute_policy_loss(out.logprobs, batch)
        loss = found.loss
        if self.kl.where == "loss" and self.needs_reference:
            loss = loss + self.kl_coef * kl_loss(out.logprobs - batch.reference_logprobs, self.kl.loss_estimator)
        if self.loss.entropy_coef:
            assert out.entropies is not None
            loss = loss - self.loss.entropy_coef * out.entropies
        approx_kl = k3(batch.old_logprobs - out.logprobs.detach())
        stats.add(weight, policy_loss=found.loss)
        stats.add(batch.share, approx_kl=approx_kl, clip_fraction=found.clipped, ratio_mean=found.ratio)
        low, high = (found.clipped & side for side in (found.ratio < 1, found.ratio > 1))
        stats.add(batch.share, clip_fraction_low=low, clip_fraction_high=high)
        ratio = found.ratio[weight > 0]
        stats.low(ratio_min=ratio)
        stats.peak(ratio_max=ratio, ratio_error=(ratio - 1).abs())
        return (weight * loss).sum()

    # ------------------------------------------------------------------------------------------------- models

    @property
    def sampling(self) -> Sampling:
        """How completions are drawn."""
        return self.rollout.sampling

    @property
    def samples_per_prompt(self) -> int:
        """Completions per prompt."""
        return self.rollout.samples_per_prompt

    @property
    def needs_reference(self) -> bool:
        """Whether anything reads a reference; otherwise no frozen copy is loaded, and no KL is logged."""
        return True

    @property
    def beside_weight(self) -> float:
        """Weight of the loss on what is beside the prompts."""
        return self.loss.ptx_coef

    @property
    def model_to_export(self) -> Policy:
        """The policy."""
        return self.policy

    def configure_model(self) -> None:
        """Loads policy, reference, critic and reward model once."""
        if hasattr(self, "policy"):
            return
        self.actors = load_actors(
            self.pretrained,
            self.reward,
            self.tokenizer,
            self.new_token_ids,
            self.lora,
            self.load,
            self.critic_settings,
            self.offload_frozen,
            self.needs_reference,
        )
        self.policy = self.actors.policy
        if self.actors.reference is not None:
            self.reference = self.actors.reference
        if self.actors.critic is not None:
            self.critic = self.actors.critic

    def trainable_parameters(self) -> dict[str, list[nn.Parameter]]:
        """Returns groups of trained parameters, by the name of their gradient norm; each is clipped by its own norm."""
        return {"policy": self.actors.policy_parameters()}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer."""
        optimizer = self.make_optimizer(parameter_groups(self.actors.policy_parameters()))
        return [optimizer], [self.make_lr_scheduler(optimizer)]

    # ------------------------------------------------------------------------------------------------- checks

    @property
    def prompt_limit(self) -> int | None:
        """Most tokens of a prompt that leave room for a completion; data modules ask.

        Raises:
            ValueError: There is no room for a prompt.
        """
        if self.context_length is None:
            return None
        room = self.context_length - self.sampling.max_new_tokens
        if room < 1:
            raise ValueError(
                f"sampling.max_new_tokens={self.sampling.max_new_tokens} leaves no room for a prompt in the model's "
                f"context of {self.context_length} tokens. Set it to at most {self.context_length - 1}."
            )
        return room

    def configure_callbacks(self) -> list[L.Callback]:
        """As the base; refuses settings of the Trainer that are here the stage's own.

        Raises:
            SettingsError: It is one; the message says which takes its place.
        """
        clip, micro_batches = self.trainer.gradient_clip_val, self.trainer.accumulate_grad_batches
        if clip:
            raise SettingsError(
                f"trainer.gradient_clip_val={clip}: {type(self).__name__} clips gradients itself, by "
                "updates.max_grad_norm. Set that, and leave this out."
            )
        if micro_batches != 1:
            raise SettingsError(
                f"trainer.accumulate_grad_batches={micro_batches}: {type(self).__name__} takes its optimizer steps "
                "itself. Set updates.micro_batch_tokens to split them into passes of less memory, and leave this out."
            )
        return super().configure_callbacks()

    def setup(self, stage: str) -> None:
        """Refuses a module that was compiled as a whole, before anything is loaded.

        Raises:
            ValueError: It was.
        """
        super().setup(stage)
        if getattr(self, "_compiler_ctx", None) is not None:  # Lightning has no public name for it
            raise ValueError(
                f"torch.compile({type(self).__name__}) would compile the loops of rollouts and updates anew for each "
                "batch: compile the model alone, by module.configure_model() and module.policy.compile()."
            )

    def on_fit_start(self) -> None:
        """Refuses, before the first rollout, what would end the run in its middle or do nothing.

        Raises:
            SettingsError: The message says what, and what to set instead.
        """
        super().on_fit_start()
        try:
            self.check_fit()
        except ValueError as error:
            raise SettingsError(str(error)) from error
        # Its advice is for one optimizer step per batch; here a checkpoint after the iteration is what resumes exactly.
        warnings.filterwarnings("ignore", "Using ModelCheckpoint with manual optimization", UserWarning)
        warn_of_biased_sampling(self.sampling)
        self.actors.cast_reference()
        with self.actors.on_device(self.device, "reward", "reference"):
            pass  # leaves them off the device

    def check_fit(self) -> None:
        """Checks settings against strategy, models and data, which are known by now.

        Raises:
            ValueError: They do not fit.
        """
        if not isinstance(self.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise ValueError(
                f"{type(self).__name__} runs on one device, under DDP and under colossalai_..., not under "
                f"{type(self.strategy).__name__}: set trainer.strategy to one of these."
            )
        if isinstance(self.strategy, ColossalAIStrategy) and self.strategy.placement == "auto":
            raise ValueError(
                f"{type(self).__name__} samples before its first training step, which Gemini's placement='auto' does "
                "not allow: set the strategy's placement to static."
            )
        if isinstance(self.engine, RemoteEngine):
            self.engine.check(self.sampling)
            if self.loss.old_logprobs == "rollout":
                raise ValueError(
                    f"loss.old_logprobs rollout takes the engine's log-probs for the policy's own, and those of "
                    f"{type(self.engine).__name__} are only near them: set it to recompute. GRPO's loss.correction "
                    "then weighs the difference."
                )
        data: Any = getattr(self.trainer, "datamodule", None)
        self._check_lengths("train", "val")
        check_beside(self.beside, self.beside_weight, self.updates.micro_batch_tokens, data)
        check_adaptive_kl(self.kl, self.rollout.samples_per_prompt, data)

    def on_validation_start(self) -> None:
        """Refuses lengths that no model can read; hands weights to an engine elsewhere."""
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._check_lengths("val")
        self.hand_over()

    def on_test_start(self) -> None:
        """Refuses lengths that no model can read; hands weights to an engine elsewhere."""
        self._check_lengths("test")
        self.hand_over()

    def on_predict_start(self) -> None:
        """Refuses lengths that no model can read; hands weights to an engine elsewhere."""
        self._check_lengths("predict")
        self.hand_over()

    def _check_lengths(self, *parts: str) -> None:
        most, setting = self.sampling.max_new_tokens, "rollout.sampling.max_new_tokens"
        if self.environment is not None and self.rollout.max_total_tokens is not None:
            most, setting = self.rollout.max_total_tokens, "rollout.max_total_tokens"
        data = getattr(self.trainer, "datamodule", None)
        check_lengths(data, parts, most, self._length_limits("train" in parts), setting)

    def _length_limits(self, training: bool) -> dict[str, int]:
        """Most tokens of a prompt with its completion, by what sets the limit."""
        limits = self.actors.limits()
        if training and self.updates.micro_batch_tokens is not None:
            limits["updates.micro_batch_tokens"] = self.updates.micro_batch_tokens
        return limits

    # ------------------------------------------------------------------------------------------------- an iteration

    def training_step(self, batch: PromptBatch | dict[str, Any], batch_idx: int) -> None:
        """One iteration: sample, score, compute advantages, update."""
        self._reward_seconds, self.sampled = 0.0, ()  # validation asks rewards too
        clock = [self._clock()]
        prompts, beside = (batch["prompts"], batch.get(self.beside.name)) if isinstance(batch, dict) else (batch, None)
        check_beside(self.beside, self.beside_weight, None, given=beside is not None)
        self.hand_over()
        experience, samples = self.run_rollout(prompts, self.iteration)
        clock.append(self._clock())
        experience.cached_outputs = {} if self._can_reuse_forward(experience) else None
        self.score_experience(experience, samples)
        clock.append(self._clock())
        found = experience.metrics | self.update_policy(experience, beside)
        experience.cached_outputs = None  # those of an update that was skipped
        self.sampled = (Sampled(experience, samples, range(len(experience.trees))), *self.sampled)
        clock.append(self._clock())
        if self.kl.target is not None:
            completions = prompts.total * self.samples_per_prompt
            self.kl_coef = adapt_kl_coef(self.kl_coef, found["kl"], self.kl.target, self.kl.horizon, completions)
        self.iteration += 1
        for name, start, end in zip(("rollout", "scoring", "learning"), clock, clock[1:], strict=False):
            found[f"{name}_seconds"] = end - start
        found["reward_seconds"] = self._reward_seconds
        found["tokens_per_second"] = found.pop("tokens") / (clock[-1] - clock[0] + found["reward_seconds"])
        metrics = {f"train/{name}": value for name, value in found.items()}
        self.updater.step_schedules(metrics)
        shown = [name for name in _IN_BAR if name in metrics]  # first, so that the bar has them in this order
        for name in dict.fromkeys([*shown, *metrics]):
            self.log(name, metrics[name], prog_bar=name in shown, batch_size=1)

    def _clock(self) -> float:
        """Seconds, without those of rewards, which a rollout may ask too."""
        return time.perf_counter() - self._reward_seconds

    def hand_over(self) -> None:
        """Gives an engine elsewhere the policy's weights; all ranks must call."""
        if not isinstance(self.engine, RemoteEngine):
            return
        weights = None
        if self.strategy is not None:
            names = {id(module): name for name, module in self.named_modules()}
            prefix, every = f"{names[id(self.policy.model)]}.", whole_state_dict(self.strategy)
            weights = {k.removeprefix(prefix): v for k, v in every.items() if k.startswith(prefix)}
        self.engine.hand_over(self.policy, self.tokenizer, weights)

    def run_rollout(self, prompts: PromptBatch, iteration: int) -> tuple[Experience, Samples | None]:
        """Samples completions of this rank's prompts.

        Args:
            prompts: B prompts, possibly none.
            iteration: Decides the samples, with the module's seed and the prompts' rows. All ranks must call, except
                for :data:`VALIDATION`.

        Returns:
            The experience, which knows no scores yet, and what rewards read; None where there is no prompt.
        """
        found = self.sample_completions(prompts, iteration, self.count_copies(prompts.rows, iteration))
        return self.to_experience(prompts, found)

    def sample_completions(
        self, prompts: PromptBatch, iteration: int, copies_before: Sequence[int]
    ) -> list[list[Completion]]:
        """Samples completions of each prompt. All ranks must call, also without prompts."""
        count = self.rollout.samples_per_prompt
        keys = [
            [sample_key(self.seed, iteration, row, i) for i in range(k * count, (k + 1) * count)]
            for row, k in zip(prompts.rows, copies_before, strict=True)
        ]
        with whole_weights(self.strategy, self.policy):  # the other ranks enter it
            if not keys:
                return []
            if self.environment is not None:
                return self.play_episodes(prompts, keys, self.sampling, self._length_limits(iteration != VALIDATION))
            requests = [Request(ids, own) for ids, own in zip(prompts.prompts, keys, strict=True)]
            asked = (self.policy, self.tokenizer, requests, self.sampling, self.stop_token_ids)
            # ranks with whole weights sample alike; should they round apart, all learn from the first one's tokens
            found = once_per_copy(partial(self.engine.generate, *asked), together=True)
        return as_answers(self.tokenizer, prompts.messages, found)

    def play_episodes(
        self,
        prompts: PromptBatch,
        keys: Sequence[Sequence[int]],
        sampling: Sampling,
        limits: Mapping[str, int] | None = None,
    ) -> list[list[Completion]]:
        """Completions in the environment; see :func:`~lightning_rlhf.rollout.play_episodes`."""
        assert self.environment is not None
        speakers = (self.engine, self.policy, self.tokenizer, self.environment)
        most = self.rollout.max_total_tokens
        return play_episodes(*speakers, prompts, keys, sampling, self.stop_token_ids, most, limits)

    def read_openings(self, prompts: PromptBatch) -> list[list[int]]:
        """(B,) tokens that the policy reads first in the environment, where the prompts are those of iteration 0."""
        assert self.environment is not None
        keys = [sample_key(self.seed, 0, row, 0) for row in prompts.rows]
        return read_openings(self.tokenizer, self.environment, prompts, keys, self.stop_token_ids)

    def to_experience(
        self, prompts: PromptBatch, completions: Sequence[Sequence[Completion]]
    ) -> tuple[Experience, Samples | None]:
        """Prompts with given completions, as :meth:`run_rollout` returns them."""
        if not prompts.prompts:
            return Experience([], (), truncated=torch.zeros(0, dtype=torch.bool)), None
        return to_experience(self.tokenizer, self.stop_token_ids, prompts, completions, self.device)

    def count_copies(self, rows: Sequence[int], iteration: int) -> list[int]:
        """Counts earlier copies of each row on all ranks, so that copies get different samples."""
        everyone = gather_objects(tuple(rows)) if iteration != VALIDATION else [tuple(rows)]
        before = everyone[: data_rank()] if len(everyone) > 1 else []
        seen = Counter(row for earlier in before for row in earlier)
        copies = []
        for row in rows:
            copies.append(seen[row])
            seen[row] += 1
        return copies

    @torch.no_grad()
    def score_experience(self, experience: Experience, samples: Samples | None) -> None:
        """Sets scores, log-probs, advantages and metrics of an experience; all ranks must call."""
        experience.scored = scores = experience.scored or self.score(samples)
        experience.scores = scores.total.cpu()
        temperature = self.sampling.temperature
        if self.needs_reference:
            with self.actors.on_device(self.device, "reference"):
                (experience.reference_logprobs,) = self.forward_all(
                    experience, lambda b: self.actors.forward("reference", b.batch, temperature=temperature)[:1]
                )
        logprobs, experience.entropies, *values = self.forward_all(experience, self._score_tokens)
        if values:
            experience.values, experience.last_values = values
        recompute = self.loss.old_logprobs == "recompute"
        experience.old_logprobs = logprobs if recompute else experience.rollout_logprobs.to(logprobs)
        sequence = experience.sequence
        counts = self.counted_completions(experience).to(logprobs)[sequence]
        experience.weight, experience.share = loss_weights(
            self.loss.aggregation, counts, sequence, experience.group, self.sampling.max_new_tokens
        )
        rewards = self._token_rewards(experience, logprobs)
        found = rollout_metrics(experience, rewards, logprobs) | {"kl_coef": self.kl_coef}
        experience.metrics |= found if self.needs_reference else {k: v for k, v in found.items() if k not in _KL_NAMES}
        if self.shaping.whiten:
            rewards = whiten(rewards, self.moments(rewards, experience.counts), shift_mean=False)
        experience.advantages = self.compute_advantages(experience, rewards)
        experience.metrics |= self.part_means(experience, scores)
        if self.environment is not None:
            turns = torch.tensor(count_turns(experience.trees), dtype=torch.float32)
            experience.metrics["turns"] = self.moments(turns)[1].item()

    def _score_tokens(self, batch: Experience) -> tuple[Tensor, ...]:
        """Log-probs and entropies of a micro-batch, and where the policy has a value head its values."""
        out: ScoredTokens = self.forward_for_scoring(
            "policy", batch, temperature=self.sampling.temperature, entropy=True
        )
        return tuple(
            column for column in (out.logprobs, out.entropies, out.values, out.last_values) if column is not None
        )

    def part_means(self, experience: Experience, scores: Scores) -> dict[str, float]:
        """Means of the parts of a reward and of its further numbers, for logging; all ranks must call."""
        found, known = extra_means(scores, self.reward.name), experience.scores.isfinite()
        for name in self.reward.names:
            part = scores.parts[name].cpu() if name in scores.parts else experience.scores
            found[f"score/{name}"] = self.moments(part, (known & part.isfinite()).float())[1].item()
        if any(isinstance(part, FunctionReward) for part in self.reward.modules()):
            faults = torch.tensor([float(self._faults.pop(kind, 0)) for kind in FAULTS])
            for kind, count in zip(FAULTS, all_reduce(faults, self.device).tolist(), strict=True):
                found[f"verifier_{kind}s"] = count
        return found

    def score(self, samples: Samples | None) -> Scores:
        """(S,) scores of this rank's samples, NaN where one is dropped; all ranks must call, also without samples.

        Raises:
            RewardError: A score on any rank is not finite, and ``shaping.bad_scores`` is ``stop``.
        """
        learns = self.training  # not in validation
        if samples is not None and learns:
            samples.iteration = self.iteration
        start = time.perf_counter()
        with whole_weights(self.strategy, self.policy), self.actors.on_device(self.device, "reward"):
            scores, why = (Scores(torch.zeros(0)), "") if samples is None else self.actors.score(samples)
        if learns:  # in each round of a refill too
            self._faults.update({kind: scores.faults(kind) for kind in FAULTS})
        why = next(filter(None, gather_objects(why)), "")
        self._reward_seconds += time.perf_counter() - start
        if why and self.shaping.bad_scores == "stop":
            raise RewardError(
                f"{why} Mend the reward, or set model.shaping.bad_scores to drop, which leaves such samples out."
            )
        if why:
            self._left_out += 1
            if self._left_out == 1:
                rank_zero_warn(f"A sample is left out: {why} Further ones are counted (train/dropped_samples).")
        return scores

    def on_train_end(self) -> None:
        """Says how often scores were not finite; the first time was warned of."""
        super().on_train_end()
        if self._left_out > 1:
            rank_zero_warn(f"Samples were left out {self._left_out} times, since their scores were not finite numbers.")

    def counted_completions(self, experience: Experience) -> Tensor:
        """(S,) bool: which completions count in the losses."""
        cut = experience.truncated & self.shaping.mask_truncated
        return experience.scores.isfinite() & ~cut

    def completion_records(self) -> list[dict[str, Any]]:
        """This rank's completions of the last iteration, for ``CompletionsTable``."""
        every = ((each, flat_groups(self.penalized_scores(e := each.experience), e.group)) for each in self.sampled)
        return [
            {"iteration": self.iteration, **record} for each, flat in every for record in completion_records(each, flat)
        ]

    def penalized_scores(self, experience: Experience) -> Tensor:
        """(S,) scores minus the penalties on length; NaN where there is no score."""
        scores = experience.scores - self.shaping.missing_eos_penalty * experience.truncated
        if self.shaping.overlong_cache is None:
            return scores
        lengths = torch.tensor(experience.lengths, dtype=torch.long)
        return scores + overlong_penalty(lengths, self.sampling.max_new_tokens, self.shaping.overlong_cache)

    def _token_rewards(self, experience: Experience, logprobs: Tensor) -> Tensor:
        """(N,) rewards of tokens; a completion without a score counts as 0."""
        raw, shaping = self.penalized_scores(experience), self.shaping
        scores = torch.where(raw.isfinite(), raw, 0.0).to(logprobs)
        if shaping.scale:
            self.running_scores.update(self.moments(scores, raw.isfinite().to(logprobs)))
            scores = scores / self.running_scores.scale
        if shaping.clip is not None:
            scores = scores.clamp(-shaping.clip, shaping.clip)
        penalty = torch.zeros_like(logprobs)
        if self.kl.where == "reward" and self.needs_reference:
            penalty = self.kl_coef * k1(logprobs - experience.reference_logprobs)
        return token_rewards(penalty, scores, experience.sequence)

    def moments(self, values: Tensor, weight: Tensor | None = None) -> Tensor:
        """(3,) moments of values over all ranks; see :func:`~lightning_rlhf.functional.advantages.moments`."""
        return moments_over_ranks(values, weight, self.device)

    # ------------------------------------------------------------------------------------------------- forward passes

    def forward_role(self, role: Role, batch: Experience, **options: Any) -> Any:
        """Runs a role on a micro-batch in an update; the first update reuses what the scoring pass kept."""
        kept = (batch.cached_outputs or {}).pop(role, None)
        return self.actors.forward(role, batch.batch, **options) if kept is None else kept

    def forward_for_scoring(self, role: Role, batch: Experience, **options: Any) -> Any:
        """Runs a role on a micro-batch before the updates, and keeps output and graph if they will be reused."""
        if batch.cached_outputs is None:
            return self.actors.forward(role, batch.batch, **options)
        with torch.enable_grad():
            batch.cached_outputs[role] = self.actors.forward(role, batch.batch, **options)
        return batch.cached_outputs[role]

    @torch.no_grad()
    def forward_all(
        self, experience: Experience, model: Callable[[Experience], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Runs a model over a whole experience; all ranks must call.

        Args:
            experience: This rank's.
            model: From a micro-batch to (N,) or (S,) tensors.

        Returns:
            Those tensors for all of it, in its order, on the CPU.
        """
        found = []
        for batch in self.micro_batches(experience):
            keep = len(batch.rows) > 0  # otherwise it is a filler
            found.append(tuple((t if keep else t[:0]).detach().cpu() for t in model(batch)))
        return tuple(torch.cat(columns) for columns in zip(*found, strict=True))

    def micro_batches(self, experience: Experience, chosen: Sequence[int] | None = None) -> Iterator[Experience]:
        """Micro-batches of the chosen trees of this rank, or of all; all ranks make the same number."""
        chosen = range(len(experience.trees)) if chosen is None else chosen
        count = max(1, self._count_micro_batches(experience, chosen))
        return experience.micro_batches(chosen, self.updates.micro_batch_tokens, self.device, at_least=count)

    def _count_micro_batches(self, experience: Experience, chosen: Sequence[int]) -> int:
        mine = len(experience.split_by_tokens(chosen, self.updates.micro_batch_tokens))
        return int(all_reduce(torch.tensor(float(mine)), self.device, dist.ReduceOp.MAX))

    def _can_reuse_forward(self, experience: Experience) -> bool:
        """Returns whether the first update can reuse the passes that score an experience. All ranks must call it."""
        # a sharded model needs its backward pass before the next forward pass; checkpointing is there to save memory
        separate = is_checkpointing(self.policy.transformer) or sharding(self.strategy) is not None
        if not self.updates.reuse_forward or self.updates.minibatches > 1 or separate:
            return False
        return self._count_micro_batches(experience, range(len(experience.trees))) == 1

    # ------------------------------------------------------------------------------------------------- updates

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clips gradients. An override does its own work, then calls this."""
        super().on_before_optimizer_step(optimizer)
        self.updater.clip(optimizer)

    def minibatches(self, experience: Experience, epoch: int) -> list[list[int]]:
        """Deals the prompts of all ranks into minibatches, by a shuffle of its own for each epoch.

        The deal goes by the prompts' rows, not by who holds them: it is the same on one rank and on several.

        Args:
            experience: This rank's.
            epoch: Number of the pass in this iteration, from 0.

        Returns:
            For each minibatch, this rank's trees in it.
        """
        places, count = self.shuffle_prompts(experience.rows, epoch), self.updates.minibatches
        edges = [len(places) * i // count for i in range(count + 1)]
        dealt = [places[a:b] for a, b in pairwise(edges)]
        # in the order of the experience: then a single minibatch is split as `forward_all` splits, and rounds alike
        return [sorted(i for rank, i in part if rank == data_rank()) for part in dealt if part]

    def shuffle_prompts(self, rows: Sequence[int], key: int) -> list[tuple[int, int]]:
        """Shuffles the prompts of all ranks, by their rows and not by who holds them; all ranks must call.

        Args:
            rows: This rank's.
            key: Decides the order, with seed and iteration.

        Returns:
            Rank, and index on this rank, of each.
        """
        everyone = enumerate(gather_objects(tuple(rows)))
        places = sorted((row, rank, i) for rank, each in everyone for i, row in enumerate(each))
        order = torch.randperm(len(places), generator=generator(self.seed, self.iteration, key)).tolist()
        return [places[j][1:] for j in order]

    def update_policy(self, experience: Experience, beside: Any) -> dict[str, float]:
        """All updates of an iteration.

        Args:
            experience: This rank's.
            beside: What is beside the prompts (here the texts of PPO-ptx), passed on to :meth:`backward_minibatch`.

        Returns:
            Means over the updates that were taken, by name.
        """
        updater, parameters = self.updater, self.trainable_parameters()
        taken: list[dict[str, float]] = []
        skipped = 0
        deals = (self.minibatches(experience, epoch) for epoch in range(self.updates.epochs))
        for chosen in (chosen for deal in deals for chosen in deal):
            found = self.backward_minibatch(experience, chosen, beside)
            if not found:
                self.on_empty_minibatch()
                continue
            if self.updates.target_kl is not None and found["approx_kl"] > self.updates.target_kl:
                break
            step = updater.step(parameters, found["loss"], self.updates.max_grad_norm, count=not taken)
            if step.outcome == "taken":
                self.skipped = 0
                taken.append(found | {f"{name}_grad_norm": norm for name, norm in step.grad_norms.items()})
                continue
            skipped += 1
            if step.outcome == "not_finite":
                self._not_finite = self.iteration
        updater.zero_grad(parameters)
        if not taken:
            updater.count_iteration(parameters)
            if self._not_finite == self.iteration:
                self.count_skipped(True)
        means = {k: sum(t[k] for t in taken) / len(taken) for k in (taken[0] if taken else ())}
        if "ratio_max" in means:
            means["ratio_max"] = max(t["ratio_max"] for t in taken)
            means["ratio_min"] = min(t["ratio_min"] for t in taken)
            means["first_ratio_error"] = taken[0]["ratio_error"]
            del means["ratio_error"]
        return {**means, "updates": float(len(taken)), "skipped_updates": float(skipped)}

    def on_empty_minibatch(self) -> None:
        """Nothing of a minibatch counts, on all ranks: here that is a fault, since no sample has a score."""
        self._not_finite = self.iteration

    def backward_minibatch(self, experience: Experience, chosen: list[int], beside: Any) -> dict[str, float]:
        """Forward and backward passes of one update: gradients of a minibatch's mean loss over all ranks.

        Returns:
            What is logged; nothing, and no gradients, where no sample of the minibatch counts.
        """
        ends = torch.tensor([0, *(tree.num_scored for tree in experience.trees)]).cumsum(0).tolist()
        mine = sum(experience.share[ends[i] : ends[i + 1]].double().sum().item() for i in chosen)
        total = all_reduce(torch.tensor(mine, dtype=torch.float32), self.device).item()
        if not total:
            return {}
        stats, updater = UpdateStats(), self.updater
        with updater.no_sync():
            for batch in self.micro_batches(experience, chosen):
                batch.share = batch.share / total
                for loss in self.compute_losses(batch, batch.weight / total, stats):
                    updater.backward(loss)
                    stats.add_sums(loss=loss)
            stats.add_sums(ptx_loss=torch.zeros(()))
            for loss in self._ptx_losses(beside):
                updater.backward(self.loss.ptx_coef * loss)
                stats.add_sums(ptx_loss=loss, loss=self.loss.ptx_coef * loss)
        return stats.reduce(self.device)

    def _ptx_losses(self, ptx: PackedBatch | None) -> Iterator[Tensor]:
        """The language-model loss (PPO-ptx), in as many splits as the rank with the most of them makes."""
        splits = [] if ptx is None or not self.loss.ptx_coef else split(ptx, self.updates.micro_batch_tokens or 2**62)
        count = int(all_reduce(torch.tensor(float(len(splits))), self.device, dist.ReduceOp.MAX))
        for i in range(count):
            batch = splits[min(i, len(splits) - 1)]  # ranks with fewer run the last one again, with weight 0
            weights = batch.weight / batch.totals.tokens * (i < len(splits))
            yield self.actors.forward("policy", batch, weights=weights).loss

    # ------------------------------------------------------------------------------------------------- evaluation

    def validation_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """Samples completions of held-out prompts, by the same keys at each validation, and scores them."""
        self._evaluate("val", prompts)

    def test_step(self, prompts: PromptBatch, batch_idx: int) -> None:
        """As :meth:`validation_step`, under ``test/``."""
        self._evaluate("test", prompts)

    def on_validation_epoch_end(self) -> None:
        """Steps the schedules that follow validation, before a checkpoint is written of it."""
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.updater.step_schedules({}, validated=True)

    def _evaluate(self, stage: str, prompts: PromptBatch) -> None:
        experience, samples = self.run_rollout(prompts, VALIDATION)
        lengths = torch.tensor(experience.lengths, dtype=torch.float32, device=self.device)
        if not self.reward.relative:
            scores = self.score(samples).total
            self.metrics.update(stage, scores.isfinite().float(), score=scores.nan_to_num())
            self.update_metrics(stage, experience, scores)
        self.metrics.update(stage, torch.ones_like(lengths), length=lengths)
        # a rank without prompts logs as the others do: they add up their metrics at the epoch's end
        self.metrics.log_epoch(stage, self.log)

    def update_metrics(self, stage: str, experience: Experience, scores: Tensor) -> None:
        """Updates what an algorithm measures further; here there is nothing.

        Args:
            stage: ``val`` or ``test``.
            experience: Completions of held-out prompts.
            scores: (S,) their scores.
        """

    def predict_step(self, prompts: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A record per completion: ``row``, ``completion``, its ``score`` (None where it has none), ``truncated``.

        In an environment also ``turns``: the messages after the prompt.
        """
        _, samples = self.run_rollout(prompts, VALIDATION)
        scores = self.score(samples).total
        if samples is None:
            return []
        rows = [row for row in prompts.rows for _ in range(self.rollout.samples_per_prompt)]
        known = [score if math.isfinite(score) else None for score in scores.tolist()]
        columns = {"row": rows, "completion": samples.completions, "score": known, "truncated": samples.truncated}
        if samples.turns is not None:
            columns["turns"] = samples.turns
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]

    @torch.no_grad()
    def score_completions(
        self, prompts: PromptBatch, completions: Sequence[Sequence[Completion]]
    ) -> dict[str, list[float]]:
        """Scores completions for :class:`~lightning_rlhf.callbacks.SampleCompletions`, on this rank alone.

        Args:
            prompts: At least one.
            completions: Completions of each prompt.

        Returns:
            By name, a value per completion: its ``score``, unless the reward needs a column that the prompts lack or
            compares completions; and where there is a reference ``kl``, the sum over its tokens of log-probs minus
            those of the reference, at the sampling temperature.
        """
        experience, samples = self.to_experience(prompts, completions)
        assert samples is not None
        batch = experience.batch.to(self.device)
        with self.actors.on_device(self.device, "reward", "reference"):
            found: dict[str, list[float]] = {}
            if self.reward.needs <= samples.columns.keys() and not self.reward.relative:
                found["score"] = self.actors.score(samples)[0].total.tolist()
            if self.needs_reference:
                roles: tuple[Role, Role] = ("policy", "reference")
                options = {"temperature": self.sampling.temperature}
                logprobs, reference = (self.actors.forward(role, batch, **options).logprobs for role in roles)
                found["kl"] = experience.sum_by_sequence(logprobs - reference).tolist()
        return found

    # ------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the iteration, the KL coefficient, the running scale of scores, and what an algorithm counts."""
        super().on_save_checkpoint(checkpoint)
        state = {name: getattr(self, name) for name in self.entries["rl"]}
        checkpoint["rl"] = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores them."""
        super().on_load_checkpoint(checkpoint)
        for name, value in checkpoint["rl"].items():
            if name == "kl_coef" and self.kl.target is None:
                continue  # nothing adapts it, so it is what the settings of this run say
            own = getattr(self, name)
            if hasattr(own, "load_state_dict"):
                own.load_state_dict(value)
            else:
                setattr(self, name, value)
