"""PPO: raise the reward of sampled completions, and stay near the model that one started from."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data.experience import Experience
from lightning_rlhf.data.packed import PackedBatch, split
from lightning_rlhf.data.prompts import PromptBatch, PromptDataModule
from lightning_rlhf.functional.advantages import RunningMoments, adapt_kl_coef, gae, token_rewards, variance, whiten
from lightning_rlhf.functional.kl import k1, k3, kl_loss
from lightning_rlhf.functional.ppo import policy_loss, value_loss, variance_explained
from lightning_rlhf.metrics import TokenMean
from lightning_rlhf.models import LoRA
from lightning_rlhf.models.backbone import LayoutChoice
from lightning_rlhf.models.loading import Dtype
from lightning_rlhf.models.quantization import Quantization
from lightning_rlhf.rewards import Reward, Samples, WeightedReward, make_reward
from lightning_rlhf.rollout import CachedEngine, RolloutEngine, Sampling
from lightning_rlhf.stages.actor_critic import ActorCriticStage, BadScoresChoice
from lightning_rlhf.stages.optim import CosineWarmup, ppo_optimizer

SAMPLING = Sampling()
# checkpoints name the settings; torch.load reads them without trusting arbitrary classes
torch.serialization.add_safe_globals([Sampling, WeightedReward])
#: Sums of an update, in the order that :meth:`PPOModule.gradients` makes them.
PARTS = ("loss", "policy_loss", "value_loss", "approx_kl", "clip_fraction", "value_clip_fraction", "ratio_mean",
         "ptx_loss")  # fmt: skip


class PPOModule(ActorCriticStage):
    """Proximal policy optimization of a language model against a reward, with a KL penalty.

    One ``training_step`` is one iteration: completions of a batch of prompts are sampled and scored; then ``epochs``
    passes over them, each in ``minibatches`` updates. ``max_steps``, schedules and checkpoints count iterations.
    The attribute ``kl_coef`` is the coefficient now, and ``reward`` the :class:`~lightning_rlhf.rewards.Reward`.

    Args:
        pretrained: Where the policy starts, and what the reference is: usually what SFT exported.
        reward: Directory or hub id of a reward model; a function ``f(prompts, completions, **columns) -> scores`` or
            its import path; or a list of both with weights. Scores of a reward model are less its ``score_offset``.
        critic: Where the critic starts: a reward model (its head is kept), or another model (values are 0 at first);
            None takes ``pretrained``. With a shared backbone, the directory of a reward model's adapter, or None.
        tokenizer: Directory, hub id or tokenizer; default that of ``pretrained``.
        chat_template: Preset name, path of a Jinja file, or None for the tokenizer's own.
        lora: Adapters; None trains all weights, and keeps a frozen copy as the reference.
        quantization: QLoRA: hold the frozen linear layers of policy and critic in 4 bits (``nf4``) or 8 (``int8``);
            needs ``lora``. The reference is the quantized model.
        shared_backbone: With adapters: one backbone for policy, reference and critic, and for the reward model where it
            is an adapter of the same weights. False gives the critic a model of its own.
        sampling: How completions are sampled.
        samples_per_prompt: Completions of each prompt.
        engine: What samples.
        epochs: Passes over an iteration's completions.
        minibatches: Updates of a pass.
        micro_batch_tokens: Most tokens of a forward and backward pass; None: a whole minibatch.
        kl_coef: Weight of the KL penalty, at first where it is adaptive.
        kl_penalty: ``reward``: k1, in the tokens' rewards; ``k2``, ``k3``: in the loss.
        kl_target: KL of a completion in nats that an adaptive coefficient holds; None keeps it fixed.
        kl_horizon: Samples in which that coefficient follows.
        clip_low: How far below 1 a ratio may fall.
        clip_high: How far above 1 it may rise.
        clip_value: How far a value may move in an iteration; None: freely.
        gamma: Discount.
        lam: Of the advantage estimate.
        bootstrap: What comes after a completion that its length limit cut is worth what the critic says, not 0.
        whiten_advantages: Bring them to mean 0 and variance 1 over the iteration.
        whiten_rewards: Bring tokens' rewards to variance 1 over the iteration.
        scale_scores: Divide scores by their standard deviation in the run so far; while all are equal, by 1.
        clip_scores: Bound of a score; None for none.
        bad_scores: Where a score is NaN or infinite in fp32, its sample is named, and ``stop`` ends the run; ``drop``
            leaves the sample out: it teaches nothing and is counted.
        missing_stop_penalty: Taken from the score of a completion that its length limit cut.
        value_coef: Weight of the value loss, where critic and policy are clipped and stepped alike.
        entropy_coef: Weight of the entropy bonus.
        ptx_coef: Weight of the language-model loss (PPO-ptx); the data module must yield instruction data.
        loss_mean: ``token``: over a minibatch's tokens; ``sequence``: over its completions' means.
        target_kl: An iteration ends before an update whose approximate KL to the sampling policy is above it.
        old_logprobs: ``recompute`` by the packed pass, so that ratios start at 1, or those of the ``rollout``.
        reuse_passes: Where an update takes a whole iteration in one micro-batch, the first one goes back through the
            passes that scored it: two forward passes fewer, activations of policy and critic at once.
        max_norm: Gradient norm, of policy and of critic, beyond which they are clipped; None for no bound.
        max_skipped_updates: Iterations in a row that may take no update, for values that are not finite, before the run
            ends.
        dtype: Of the weights; heads are fp32.
        gradient_checkpointing: Trade a second forward pass for activation memory.
        layout: ``auto``: every prompt once where the model can, padded elsewhere.
        optimizer: Parameter groups to optimizer.
        critic_lr: The critic's learning rate; None: the optimizer's.
        lr_scheduler: Optimizer to scheduler, stepped once an iteration.
        offload_frozen: Keep reference and reward model in the CPU's memory while neither is asked: frees theirs on the
            device, costs a copy to it and back an iteration.
        seed: Of samples and shuffles.
        trust_remote_code: Run code that comes with the models.

    Attributes:
        policy: The policy, from ``configure_model`` on.

    Logged: see ``docs/ppo.md``.

    Raises:
        ValueError: An argument is out of its range.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel,
        reward: str | list[WeightedReward] | Reward | Callable[..., Any],
        critic: str | os.PathLike[str] | PreTrainedModel | None = None,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        lora: LoRA | None = None,
        quantization: Quantization | None = None,
        shared_backbone: bool = True,
        sampling: Sampling = SAMPLING,
        samples_per_prompt: int = 1,
        engine: RolloutEngine | None = None,
        epochs: int = 4,
        minibatches: int = 1,
        micro_batch_tokens: int | None = None,
        kl_coef: float = 0.05,
        kl_penalty: Literal["reward", "k2", "k3"] = "reward",
        kl_target: float | None = None,
        kl_horizon: float = 10_000,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        clip_value: float | None = 0.2,
        gamma: float = 1.0,
        lam: float = 0.95,
        bootstrap: bool = False,
        whiten_advantages: bool = True,
        whiten_rewards: bool = False,
        scale_scores: bool = False,
        clip_scores: float | None = None,
        bad_scores: BadScoresChoice = "stop",
        missing_stop_penalty: float = 0.0,
        value_coef: float = 0.1,
        entropy_coef: float = 0.0,
        ptx_coef: float = 0.0,
        loss_mean: Literal["token", "sequence"] = "token",
        target_kl: float | None = None,
        old_logprobs: Literal["recompute", "rollout"] = "recompute",
        reuse_passes: bool = True,
        max_norm: float | None = 1.0,
        max_skipped_updates: int = 5,
        dtype: Dtype = "float32",
        gradient_checkpointing: bool = False,
        layout: LayoutChoice = "auto",
        optimizer: OptimizerCallable = ppo_optimizer,
        critic_lr: float | None = None,
        lr_scheduler: LRSchedulerCallable = CosineWarmup,
        offload_frozen: bool = False,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        if kl_penalty == "k1":  # type: ignore[comparison-overlap]
            kl_loss(torch.zeros(0), kl_penalty)  # says why it is none
        check_arguments(
            PPOModule.__init__,
            locals(),
            samples_per_prompt=Range(1),
            epochs=Range(1),
            minibatches=Range(1),
            micro_batch_tokens=Range(1),
            kl_coef=Range(0),
            kl_target=Range(0, above=True),
            kl_horizon=Range(0, above=True),
            clip_low=Range(0, 1),
            clip_high=Range(0),
            clip_value=Range(0, above=True),
            gamma=Range(0, 1),
            lam=Range(0, 1),
            clip_scores=Range(0, above=True),
            missing_stop_penalty=Range(0),
            value_coef=Range(0),
            entropy_coef=Range(0),
            ptx_coef=Range(0),
            target_kl=Range(0, above=True),
            max_norm=Range(0, above=True),
            max_skipped_updates=Range(1),
            critic_lr=Range(0),
        )
        if kl_target is not None and not kl_coef:
            raise ValueError("kl_target adapts kl_coef by a factor, and a factor of 0 is 0: set kl_coef above 0.")
        super().__init__(
            pretrained,
            tokenizer,
            chat_template,
            lora,
            dtype,
            gradient_checkpointing,
            layout,
            optimizer,
            lr_scheduler,
            trust_remote_code,
            quantization,
        )
        self.save_settings()
        if sampling.temperature <= 0:
            raise ValueError("sampling.temperature must be above 0: greedy completions teach PPO nothing.")
        if not isinstance(critic, (str, os.PathLike, PreTrainedModel, type(None))):
            raise ValueError(
                f"critic: an object of type {type(critic).__name__} is none. Give the directory or hub id of a reward "
                "model or of a language model, a transformers model, or null for the policy's start."
            )
        object.__setattr__(self, "critic_init", critic)  # not a child twice, where it is a model
        self.shared = shared_backbone and lora is not None
        self.sampling, self.samples_per_prompt, self.engine = sampling, samples_per_prompt, engine or CachedEngine()
        self.epochs, self.parts, self.micro_batch_tokens = epochs, minibatches, micro_batch_tokens
        self.kl_coef, self.kl_penalty, self.kl_target, self.kl_horizon = kl_coef, kl_penalty, kl_target, kl_horizon
        self.clip_low, self.clip_high, self.clip_value = clip_low, clip_high, clip_value
        self.gamma, self.lam, self.bootstrap = gamma, lam, bootstrap
        self.whiten_advantages, self.whiten_rewards = whiten_advantages, whiten_rewards
        self.scale_scores, self.clip_scores, self.missing_stop_penalty = scale_scores, clip_scores, missing_stop_penalty
        self.value_coef, self.entropy_coef, self.ptx_coef = value_coef, entropy_coef, ptx_coef
        self.loss_mean, self.target_kl, self.old_logprobs = loss_mean, target_kl, old_logprobs
        self.reuse_passes = reuse_passes
        self.max_norm, self.max_skipped_updates, self.critic_lr, self.seed = (
            max_norm,
            max_skipped_updates,
            critic_lr,
            seed,
        )
        self.offload_frozen, self.bad_scores = offload_frozen, bad_scores
        self.running_scores = RunningMoments()
        self.reward = make_reward(reward, self.tokenizer, dtype, trust_remote_code)
        for stage in ("val", "test"):
            self.metrics[f"{stage}_score"] = TokenMean()
            self.metrics[f"{stage}_length"] = TokenMean()
        self.norms = {}

    def on_fit_start(self) -> None:
        """Refuses, before the first rollout, what would end the run in its middle, or do nothing.

        Raises:
            ValueError: There is no data for ``ptx_coef``, a text of it is over ``micro_batch_tokens``, or
                ``kl_horizon`` is too short for the completions of an iteration.
        """
        super().on_fit_start()
        data: Any = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, PromptDataModule):
            return
        if self.kl_target is not None:  # refuses what it can't go by
            samples = data.batch_size * self.samples_per_prompt
            adapt_kl_coef(self.kl_coef, self.kl_target, self.kl_target, self.kl_horizon, samples)
        if data.ptx is None:
            self._check_ptx(False)
        elif not self.ptx_coef:
            rank_zero_warn("data.ptx is read and not learned from: model.ptx_coef is 0. Set it, or leave out data.ptx.")
        elif self.micro_batch_tokens is not None and (longest := data.ptx.longest("train")) > self.micro_batch_tokens:
            raise ValueError(
                f"A text of data.ptx has {longest} tokens, over micro_batch_tokens={self.micro_batch_tokens}. Raise it "
                f"to {longest}, or set data.ptx_max_length to at most {self.micro_batch_tokens}."
            )

    def _check_ptx(self, given: bool) -> None:
        """Refuses a weight of texts that are not there."""
        if self.ptx_coef and not given:
            raise ValueError(
                f"ptx_coef={self.ptx_coef} weighs a loss on texts, and the data bring none. Give data.ptx (instruction "
                "data or plain texts), or set model.ptx_coef to 0."
            )

    # ------------------------------------------------------------------------------------------------- an iteration

    def training_step(self, batch: PromptBatch | dict[str, Any], batch_idx: int) -> None:
        """One iteration: sample, score, estimate advantages, learn."""
        clock = [time.perf_counter()]
        prompts, ptx = (batch["prompts"], batch["ptx"]) if isinstance(batch, dict) else (batch, None)
        self._check_ptx(ptx is not None)
        experience, samples = self.rollout(prompts, self.iteration)
        clock.append(time.perf_counter())
        experience.kept = {} if self.reuses_passes(experience) else None
        found = self.judge(experience, samples)
        clock.append(time.perf_counter())
        found |= self.learn(experience, ptx)
        clock.append(time.perf_counter())
        found["kl_coef"] = self.kl_coef
        if self.kl_target is not None:
            completions = prompts.total * self.samples_per_prompt
            self.kl_coef = adapt_kl_coef(self.kl_coef, found["kl"], self.kl_target, self.kl_horizon, completions)
        self.iteration += 1
        for name, start, end in zip(("rollout", "scoring", "learning"), clock, clock[1:], strict=False):
            found[f"{name}_seconds"] = end - start
        found["tokens_per_second"] = found.pop("tokens") / (clock[-1] - clock[0])
        metrics = {f"train/{name}": value for name, value in found.items()}
        self.step_schedules(metrics)
        for name, value in metrics.items():
            bar = name in ("train/score", "train/kl", "train/length_mean")
            self.log(name, value, prog_bar=bar, batch_size=1)

    @torch.no_grad()
    def judge(self, experience: Experience, samples: Samples | None) -> dict[str, float]:
        """Adds to an experience what the losses read: old log-probs, values, advantages, returns."""
        raw = self.score(samples).cpu()
        truncated = torch.tensor([] if samples is None else samples.truncated, dtype=torch.bool)
        heat = self.sampling.temperature
        with self.present("reference"):
            (reference,) = self.measure(experience, lambda b: self.play("reference", b, temperature=heat)[:1])
        now, entropies = self.measure(
            experience, lambda b: self.play_first("policy", b, experience, temperature=heat, entropy=True)[:2]
        )
        values, last_values = self.measure(experience, lambda b: self.play_first("critic", b, experience))
        sampled, sequence = experience.tokens["rollout_logprobs"].to(now), experience.sequence
        log_ratio = now - reference

        good = raw.isfinite()  # a sample without a score counts nowhere, and teaches nothing
        counts, by_token = good.to(now), good.to(now)[sequence]
        scores = torch.where(good, raw, 0.0).to(now) - self.missing_stop_penalty * truncated
        if self.scale_scores:
            self.running_scores.update(self.moments(scores, counts))
            scores = scores / self.running_scores.scale
        if self.clip_scores is not None:
            scores = scores.clamp(-self.clip_scores, self.clip_scores)
        penalty = k1(log_ratio) * (self.kl_coef if self.kl_penalty == "reward" else 0.0)
        rewards = token_rewards(penalty, scores, sequence)
        reward = torch.zeros_like(scores).index_add(0, sequence, rewards)
        if self.whiten_rewards:
            rewards = whiten(rewards, self.moments(rewards, by_token), shift_mean=False)
        ends = torch.where(truncated, last_values, 0.0) if self.bootstrap else torch.zeros_like(last_values)
        advantages, returns = gae(rewards, values, ends, sequence, self.gamma, self.lam)
        spread = self.moments(advantages, by_token)
        lengths = sequence.bincount(minlength=len(scores))
        experience.tokens |= {
            "old_logprobs": now if self.old_logprobs == "recompute" else sampled,
            "reference_logprobs": reference,
            "values": values,
            "returns": returns,
            "advantages": whiten(advantages, spread) if self.whiten_advantages else advantages,
            "weight": by_token if self.loss_mean == "token" else by_token / lengths.to(now)[sequence],
        }
        explained = variance_explained(self.moments(returns - values, by_token), self.moments(returns, by_token))
        parts = {name: (raw if samples is None else self.reward.last[name].cpu()) for name in self.reward.names}
        return {
            **self.summary(raw, reward, truncated, sequence, log_ratio, entropies, now - sampled),
            **{f"score/{k}": self.moments(v, (good & v.isfinite()).float())[1].item() for k, v in parts.items()},
            "advantage_mean": spread[1].item(),
            "advantage_std": variance(spread).sqrt().item(),
            "explained_variance": explained.item(),
        }

    def learn(self, experience: Experience, ptx: PackedBatch | None) -> dict[str, float]:
        """All updates of an iteration; means over those that were taken."""
        parameters = [p for role in self.trained() for p in role]
        taken: list[dict[str, float]] = []
        last: dict[str, float] = {}
        deals = (self.minibatches(experience, self.parts, epoch) for epoch in range(self.epochs))
        dropped = 0
        for chosen in (chosen for deal in deals for chosen in deal):
            last = self.gradients(experience, chosen, ptx)
            if not last:
                self._diverged = self.iteration
                continue
            if self.target_kl is not None and last["approx_kl"] > self.target_kl:
                break
            if self.update(parameters, last["loss"], first=not taken):
                taken.append({**last, **self.norms})
            else:
                dropped += 1
        if not taken:
            self.count_iteration(parameters)
        self.drop_gradients(parameters)
        means = {k: sum(t[k] for t in taken) / len(taken) for k in (taken[0] if taken else ())}
        peak = {"ratio_max": max(t["ratio_max"] for t in taken)} if taken else {}
        first = {"first_ratio_error": taken[0]["ratio_error"]} if taken else {}
        means.pop("ratio_error", None)
        return {**means, **peak, **first, "updates": float(len(taken)), "dropped_updates": float(dropped)}

    def gradients(self, experience: Experience, chosen: list[int], ptx: PackedBatch | None) -> dict[str, float]:
        """Forward and backward passes of one update: the gradients of a minibatch's mean loss over all ranks.

        The loss is the policy's, plus ``value_coef`` times the critic's, less ``entropy_coef`` times the entropy, plus
        ``ptx_coef`` times the language model's. Empty, and without gradients, where no sample of it has a score.
        """
        heat, kept = self.sampling.temperature, experience.kept or {}
        local = sum(float(t["weight"].sum()) for _, t in experience.micro_batches(chosen, None, torch.device("cpu")))
        total = self.all_reduce(torch.tensor(float(local))).item()
        if not total:
            return {}
        sums, ratio_max, ratio_error = torch.zeros(len(PARTS)), torch.zeros(()), torch.zeros(())
        with self.apart():
            for batch, t in self.micro_batches(experience, chosen):
                weight = t["weight"] / total
                out = kept.pop("policy", None) or self.play(
                    "policy", batch, temperature=heat, entropy=self.entropy_coef != 0
                )
                policy = policy_loss(out.logprobs, t["old_logprobs"], t["advantages"], self.clip_low, self.clip_high)
                loss = policy.loss
                if self.kl_penalty != "reward":
                    loss = loss + self.kl_coef * kl_loss(out.logprobs - t["reference_logprobs"], self.kl_penalty)
                if self.entropy_coef:
                    loss = loss - self.entropy_coef * out.entropies
                self.accumulate((weight * loss).sum())
                critic = kept.pop("critic", None) or self.play("critic", batch)
                value = value_loss(critic.values, t["values"], t["returns"], self.clip_value)
                self.accumulate((weight * value.loss).sum() * self.value_coef)
                moved = k3(t["old_logprobs"] - out.logprobs.detach())
                columns = (loss, policy.loss, value.loss, moved, policy.clipped, value.clipped, policy.ratio)
                sums[:-1] += torch.stack([(weight * c.detach()).sum() for c in columns]).cpu()
                real = policy.ratio[t["weight"] > 0]
                ratio_max = torch.cat([real.cpu(), ratio_max[None]]).max()
                ratio_error = torch.cat([(real.cpu() - 1).abs(), ratio_error[None]]).max()
            parts = [] if ptx is None or not self.ptx_coef else split(ptx, self.micro_batch_tokens or 2**62)
            for i in range(int(self.all_reduce(torch.tensor(float(len(parts))), torch.distributed.ReduceOp.MAX))):
                batch = parts[min(i, len(parts) - 1)]  # ranks with fewer parts run the last again, for nothing
                out = self.play("policy", batch, weights=batch.weight / batch.totals.tokens * (i < len(parts)))
                self.accumulate(self.ptx_coef * out.loss)
                sums[-1] += out.loss.detach().cpu()
        found = dict(zip(PARTS, self.all_reduce(sums).tolist(), strict=True))
        peaks = self.all_reduce(torch.stack([ratio_max, ratio_error]), torch.distributed.ReduceOp.MAX)
        found["ratio_max"], found["ratio_error"] = peaks.tolist()
        found["loss"] += self.value_coef * found["value_loss"] + self.ptx_coef * found["ptx_loss"]
        return found

    # ------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the KL coefficient and the running scale of scores."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["ppo"] = {"kl_coef": self.kl_coef, "running_scores": self.running_scores.state_dict()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        super().on_load_checkpoint(checkpoint)
        self.kl_coef = checkpoint["ppo"]["kl_coef"]
        self.running_scores.load_state_dict(checkpoint["ppo"]["running_scores"])
