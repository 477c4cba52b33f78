"""Online DPO: direct alignment on pairs of the policy's own samples, which a reward or a judge ranks."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data import PackedBatch
from lightning_rlhf.functional import PairLogprobs, k2, k3, pair_logprobs
from lightning_rlhf.models import Load, LoRA
from lightning_rlhf.protocols import KnowsLengths
from lightning_rlhf.rewards import JudgedReward, Reward, Samples, WeightedReward
from lightning_rlhf.rewards.judges import Judge
from lightning_rlhf.rl import KL, Experience, Rollout, Shaping, Updates, UpdateStats
from lightning_rlhf.rl.checks import PAIRS
from lightning_rlhf.rl.groups import stop_at_flat
from lightning_rlhf.rl.metrics import sample_metrics
from lightning_rlhf.rl.pairs import Choice, choose_pairs, cut_pairs, pair_weight, pairs_of_data
from lightning_rlhf.rollout import RolloutEngine
from lightning_rlhf.stages.base import LOAD
from lightning_rlhf.stages.optim import CosineWarmup, rl_optimizer
from lightning_rlhf.stages.pair_losses import LossSum, OnlinePairShaping, PairShaping, WeightedLoss
from lightning_rlhf.stages.rl import LOSS, UPDATES, RLStage
from lightning_rlhf.utils.collectives import all_reduce

#: At least two completions of a prompt make a pair.
ROLLOUT, SHAPING = Rollout(samples_per_prompt=2), OnlinePairShaping()


class OnlineDPOModule(RLStage):
    """Trains a policy on pairs of its own samples by DPO, or by another loss of its family (arXiv 2402.04792).

    One ``training_step`` is one iteration: several completions of each prompt are sampled and ranked, pairs are made of
    them, and ``updates.epochs`` passes over the pairs train the policy. ``max_steps``, schedules and checkpoints count
    iterations. A prompt stands once in a batch, its completions behind it, for the policy and for the reference.

    Args:
        pretrained: Where the policy starts, and what the reference is: usually what SFT exported.
        reward: Directory or hub id of a reward model; a function ``f(prompts, completions, **columns) -> scores`` or
            its import path; or a list of both with weights. None: give ``judge``.
        judge: Ranks the completions of a prompt in the place of a reward, two by two in both orders; see
            :class:`~lightning_rlhf.rewards.JudgedReward`.
        tokenizer: Directory, hub id or tokenizer; None takes that of ``pretrained``.
        chat_template: Preset name, path of a Jinja file, or None for the tokenizer's own.
        lora: Adapters; None trains all weights, and keeps a frozen copy as the reference.
        engine: The rollout engine; None takes the built-in one.
        rollout: How completions are sampled: at least two per prompt.
        pairs: ``best_worst`` makes a pair of a prompt's best and worst completion, ``all`` of each two.
        margin: A pair's scores must differ by more. A larger value leaves fewer, clearer pairs.
        loss: A loss of ``docs/dpo.md``; a function of :class:`~lightning_rlhf.functional.PairLogprobs` or its import
            path; or a list of ``{name: ..., weight: ..., settings: {...}}``, which are added.
        beta: Strength of the pull towards the reference. A larger value keeps the policy closer to it. None: the loss's
            own default, 0.1 for most.
        shaping: Length penalties and the divergence, how cut completions and bad scores count, and how many iterations
            may be without a pair.
        mixture: Share of the data's pairs in the loss: it is ``(1 - mixture)`` times the mean over sampled pairs, plus
            ``mixture`` times the mean over those of ``data.pairs``.
        updates: The optimizer steps of an iteration: epochs, minibatches, micro-batches, gradient norm.
        load: How weights are held: dtype, quantization (QLoRA), gradient checkpointing, layout.
        offload_frozen: Keep reference and reward model in CPU memory while they are not asked.
        optimizer: Makes an optimizer of parameter groups.
        lr_scheduler: Makes a schedule of an optimizer; it is stepped once per iteration.
        seed: Seed of samples and shuffles.

    Attributes:
        policy: The policy, from ``configure_model`` on.
        without_pairs: Iterations that left no pair, and so took no update.
        flat_iterations: How many of them were the last ones in a row.

    Logged: see ``docs/dpo.md``.

    Raises:
        ImportError: A loss or a reward that is not there.
        ValueError: An argument is out of its range, or arguments do not fit together.
    """

    beside = PAIRS
    entries: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **RLStage.entries,
        "online_dpo": ("iterations", "delta", "without_pairs", "flat_iterations"),
    }

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | PreTrainedModel,
        reward: str | list[WeightedReward] | Reward | Callable[..., Any] | None = None,
        judge: Judge | None = None,
        tokenizer: str | os.PathLike[str] | PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        lora: LoRA | None = None,
        engine: RolloutEngine | None = None,
        rollout: Rollout = ROLLOUT,
        pairs: Choice = "best_worst",
        margin: float = 0.0,
        loss: str | list[WeightedLoss] | Callable[..., Any] = "sigmoid",
        beta: float | None = None,
        shaping: OnlinePairShaping = SHAPING,
        mixture: float = 0.0,
        updates: Updates = UPDATES,
        load: Load = LOAD,
        offload_frozen: bool = False,
        optimizer: OptimizerCallable = rl_optimizer,
        lr_scheduler: LRSchedulerCallable = CosineWarmup,
        seed: int = 0,
    ) -> None:
        beta_, margin_, mixture_ = Range(0, above=True), Range(0), Range(0, 1, below=True)
        ranges = dict(beta=beta_, margin=margin_, mixture=mixture_)
        check_arguments(OnlineDPOModule.__init__, locals(), "", **ranges)
        if (reward is None) == (judge is None):
            given = "neither reward nor judge" if reward is None else "both reward and judge"
            raise ValueError(f"There is {given}: give one of them, which ranks the completions of a prompt.")
        if not isinstance(shaping, OnlinePairShaping):
            raise ValueError(f"shaping is {shaping!r}: give an OnlinePairShaping(...), a group of settings.")
        ranked = Shaping(missing_eos_penalty=shaping.missing_eos_penalty, bad_scores=shaping.bad_scores)
        source: Any = reward if judge is None else JudgedReward(judge)
        super().__init__(
            pretrained,
            source,
            tokenizer,
            chat_template,
            lora,
            engine,
            rollout,
            KL(coef=0.0),  # beta holds the policy
            ranked,
            LOSS,
            updates,
            load,
            offload_frozen,
            optimizer,
            lr_scheduler,
            seed,
        )
        if rollout.samples_per_prompt < 2:
            raise ValueError("rollout.samples_per_prompt is 1, and a pair needs two completions: set it to 2 or more.")
        self.pairs, self.margin, self.mixture = pairs, margin, mixture
        self.pair_loss, self.pair_shaping = LossSum(loss, beta), shaping
        self.pair_loss.check_shaping(shaping)
        self._iterations, self._delta, self.without_pairs, self.flat_iterations = 0, 0.0, 0, 0

    @property
    def needs_reference(self) -> bool:
        """Whether the loss reads one: SimPO, ORPO and CPO load none."""
        return self.pair_loss.needs_reference

    @property
    def beside_weight(self) -> float:
        """Share of the data's pairs."""
        return self.mixture

    def forget(self) -> None:
        """As the base, and the running mean of implicit rewards."""
        super().forget()
        self._iterations, self._delta, self.without_pairs, self.flat_iterations = 0, 0.0, 0, 0

    def check_fit(self) -> None:
        """As the base; refuses pairs that could be too long for a micro-batch.

        Raises:
            ValueError: There are such prompts.
        """
        super().check_fit()
        data, limit = getattr(self.trainer, "datamodule", None), self.updates.micro_batch_tokens
        longest = data.longest("train") if isinstance(data, KnowsLengths) else 0
        if limit is not None and (whole := longest + 2 * self.sampling.max_new_tokens) > limit:
            raise ValueError(
                f"A prompt of {longest} tokens and two completions of rollout.sampling.max_new_tokens="
                f"{self.sampling.max_new_tokens} have {whole}, over updates.micro_batch_tokens={limit}, and a pair is "
                f"learned in one pass. Set updates.micro_batch_tokens to at least {whole}, or shorter ones."
            )

    # ------------------------------------------------------------------------------------------------- an iteration

    @torch.no_grad()
    def score_experience(self, experience: Experience, samples: Samples | None) -> None:
        """Sets scores and metrics of an experience; all ranks must call."""
        experience.scored = scores = self.score(samples)
        experience.scores = scores.total.cpu()
        experience.metrics |= sample_metrics(experience) | self.part_means(experience, scores)

    def update_policy(self, experience: Experience, beside: PackedBatch | None) -> dict[str, float]:
        """Makes pairs of ranked completions, then takes all updates of an iteration.

        Returns:
            Means over the updates that were taken, by name, and what became of the completions.

        Raises:
            RewardError: There was no pair for ``shaping.max_flat`` iterations.
        """
        scores = experience.scores - self.shaping.missing_eos_penalty * experience.truncated
        chosen = choose_pairs(experience, scores.tolist(), self.pairs, self.margin)
        counts = torch.tensor([pair_weight(chosen.experience), chosen.ties, chosen.flat], dtype=torch.float32)
        pairs, ties, flat = all_reduce(counts, self.device).tolist()
        data = None
        if not pairs:
            self.without_pairs, self.flat_iterations = self.without_pairs + 1, self.flat_iterations + 1
            if self.without_pairs == 1:
                rank_zero_warn(
                    f"Iteration {self.iteration} takes no update: no prompt has two completions whose scores differ by "
                    f"more than margin={self.margin:g}. Further ones are counted (train/without_pairs)."
                )
            most, setting = self.pair_shaping.max_flat, "shaping.max_flat"
            stop_at_flat(self.flat_iterations, most, self.reward.names, experience, setting)
        else:
            self.flat_iterations = 0
            data = pairs_of_data(beside) if beside is not None and self.mixture else None
            for one in (chosen.experience, *([] if data is None else [data])):
                self._read_reference(one)
        found = super().update_policy(chosen.experience, data)
        if found["updates"]:
            self._iterations += 1
            center = 0.5 * (found["chosen_reward"] + found["rejected_reward"])
            self._delta += (center - self._delta) / self._iterations
        return {**found, "pairs": pairs, "ties": ties, "flat_groups": flat, "without_pairs": float(self.without_pairs)}

    def _read_reference(self, experience: Experience) -> None:
        if self.needs_reference:
            options = {"temperature": self.sampling.temperature}
            with self.actors.on_device(self.device, "reference"):
                (experience.reference_logprobs,) = self.forward_all(
                    experience, lambda b: self.actors.forward("reference", b.batch, **options)[:1]
                )

    def backward_minibatch(
        self, experience: Experience, chosen: list[int], beside: Experience | None
    ) -> dict[str, float]:
        """Forward and backward passes of one update: gradients of the mean loss over the pairs of all ranks.

        Args:
            experience: This rank's prompts with pairs.
            chosen: Those of the minibatch.
            beside: This rank's pairs of the data.

        Returns:
            What is logged.
        """
        stats = UpdateStats()
        with self.updater.no_sync():
            self._learn(experience, chosen, 1.0 if beside is None else 1 - self.mixture, stats, sampled=True)
            if beside is not None:
                self._learn(beside, range(len(beside.trees)), self.mixture, stats, sampled=False)
        return stats.reduce(self.device)

    def compute_pair_losses(self, pairs: PairLogprobs) -> Tensor:
        """(P,) losses of P pairs; a subclass may have one of its own."""
        return self.pair_loss(pairs, self._delta)

    def _learn(
        self, experience: Experience, chosen: Sequence[int], share: float, stats: UpdateStats, sampled: bool
    ) -> None:
        """Backward passes of the mean loss over the pairs of some trees, as a share of the whole loss."""
        part = cut_pairs(experience, chosen, self.updates.micro_batch_tokens)
        total = all_reduce(torch.tensor(pair_weight(part)), self.device).item()
        shaping = {field.name: getattr(self.pair_shaping, field.name) for field in dataclasses.fields(PairShaping)}
        for batch in self.micro_batches(part):
            packed, found = batch.batch, batch.batch.pairs
            logprobs = self.actors.forward("policy", packed, temperature=self.sampling.temperature).logprobs
            reference = batch.reference_logprobs if self.needs_reference else None
            tokens = (logprobs, reference, packed.sequence, packed.num_sequences)
            pairs = pair_logprobs(*tokens, found.better, found.worse, **shaping)
            losses, weight = self.compute_pair_losses(pairs), found.weight.to(pairs.better) / total
            loss = share * (weight * losses).sum()
            self.updater.backward(loss)
            stats.add_sums(loss=loss)
            if not sampled:
                stats.add(weight, data_loss=losses)
                continue
            moved = {"approx_kl": k3(batch.rollout_logprobs - logprobs)}
            moved |= {} if reference is None else {"kl": k2(logprobs - reference)}
            for name, by_token in moved.items():  # a mean per answer: how trees are cut must not change it
                mean = batch.sum_by_sequence(by_token.detach()) / packed.lengths
                stats.add(weight, **{name: 0.5 * (mean[found.better] + mean[found.worse])})
            stats.add(weight, **self.pair_loss.measure(pairs))

    # ------------------------------------------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the running mean of implicit rewards, and the count of iterations without pairs."""
        super().on_save_checkpoint(checkpoint)
        state = {"iterations": self._iterations, "delta": self._delta, "without_pairs": self.without_pairs}
        state["flat_iterations"] = self.flat_iterations
        checkpoint["online_dpo"] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restores them."""
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["online_dpo"]
        self._iterations, self._delta, self.without_pairs = state["iterations"], state["delta"], state["without_pairs"]
        self.flat_iterations = state["flat_iterations"]
