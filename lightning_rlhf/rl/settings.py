"""The settings of reinforcement learning, in groups that all its stages share."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.functional import Algorithm, kl_loss
from lightning_rlhf.functional.policy_gradient import Correction, Mean
from lightning_rlhf.rewards import WeightedReward
from lightning_rlhf.rollout import Sampling

_POSITIVE = Range(0, above=True)
_SHARE = Range(0, 1)
_SAMPLING = Sampling()


@dataclass(frozen=True)
class Rollout:
    """How completions are sampled.

    Args:
        samples_per_prompt: Completions per prompt and iteration. More of them share one pass over their prompt.
        sampling: Length limit, temperature and the like. In an environment the length limit is that of a turn.
        max_total_tokens: In an environment: most tokens of a completion, with all turns and what the environment says.
            A larger value allows more and longer turns. None: what the model's context leaves.

    Raises:
        ValueError: A value is out of range, or the temperature is 0: greedy completions teach nothing.
    """

    samples_per_prompt: int = 1
    sampling: Sampling = _SAMPLING
    max_total_tokens: int | None = None

    def __post_init__(self) -> None:
        check_arguments(Rollout, vars(self), "rollout.", samples_per_prompt=Range(1), max_total_tokens=Range(1))
        if self.sampling.temperature <= 0:
            raise ValueError("rollout.sampling.temperature must be above 0: greedy completions teach nothing.")


@dataclass(frozen=True)
class KL:
    """The penalty on the distance from the reference, which is the model that training starts from.

    Args:
        coef: Weight of the penalty. A larger value keeps the policy closer to the reference; 0 turns it off.
        where: ``reward`` subtracts ``coef * k1`` from the reward of each token; ``loss`` adds ``coef * estimator`` to
            the loss.
        estimator: ``k1`` for ``where: reward``; ``k2`` or ``k3`` for ``where: loss``; None takes ``k1`` or ``k3``.
        target: KL in nats per completion that an adaptive coefficient holds; None keeps ``coef`` fixed.
        horizon: Number of samples over which the adaptive coefficient reacts (Ziegler et al. 2019). A larger value
            makes it slower.

    Raises:
        ValueError: A value is out of range, an estimator that does not fit ``where``, or a target with ``coef: 0``.
    """

    coef: float = 0.05
    where: Literal["reward", "loss"] = "reward"
    estimator: Literal["k1", "k2", "k3"] | None = None
    target: float | None = None
    horizon: float = 10_000

    def __post_init__(self) -> None:
        check_arguments(KL, vars(self), "kl.", coef=Range(0), target=_POSITIVE, horizon=_POSITIVE)
        if self.where == "reward" and self.estimator not in (None, "k1"):
            raise ValueError(
                f"kl.where is reward, which takes k1, and kl.estimator is {self.estimator}: set where: loss."
            )
        if self.where == "loss":
            kl_loss(torch.zeros(0), self.loss_estimator)  # says why k1 is none
        if self.target is not None and not self.coef:
            raise ValueError("kl.target adapts kl.coef by a factor, and a factor of 0 is 0: set kl.coef above 0.")

    @property
    def loss_estimator(self) -> Any:
        """The estimator in the loss."""
        return self.estimator or "k3"


@dataclass(frozen=True)
class Shaping:
    """How scores become rewards: first the penalty, then scaling, then clipping, then whitening of rewards.

    Args:
        missing_eos_penalty: Subtracted from the score of a completion that was cut at its length limit. A larger value
            pushes the policy harder to end its answers.
        overlong_cache: Tokens below the length limit over which a further penalty grows from 0 to 1 (DAPO's soft
            penalty, Yu et al. 2025, eq. 13). A larger value starts earlier; None for no such penalty.
        mask_truncated: Leave completions that were cut out of the loss and of its mean; their scores still count in the
            statistics of scores.
        scale: Divide scores by their standard deviation in the run so far; by 1 while all are equal.
        clip: Largest absolute value of a score; None for no bound.
        whiten: Bring the rewards of tokens to variance 1 over an iteration.
        bad_scores: What happens when a score is NaN or infinite in fp32. ``stop`` ends the run and names the sample;
            ``drop`` leaves the sample out: it teaches nothing and is counted.

    Raises:
        ValueError: A value is out of range.
    """

    missing_eos_penalty: float = 0.0
    overlong_cache: int | None = None
    mask_truncated: bool = False
    scale: bool = False
    clip: float | None = None
    whiten: bool = False
    bad_scores: Literal["stop", "drop"] = "stop"

    def __post_init__(self) -> None:
        ranges = {"missing_eos_penalty": Range(0), "overlong_cache": Range(1), "clip": _POSITIVE}
        check_arguments(Shaping, vars(self), "shaping.", **ranges)


@dataclass(frozen=True)
class Critic:
    """The critic of PPO.

    Args:
        pretrained: Where the critic starts: a reward model keeps its head, another model begins with values of 0; None
            takes the policy's ``pretrained``. For an ``adapter``: the directory of a reward model's adapter, or None.
            For a ``head``: None.
        kind: ``separate``: a model of its own. ``adapter``: with ``lora``, an adapter and a head on the policy's
            backbone, which then serves policy, reference and critic, and the reward model where it is an adapter of the
            same weights. ``head``: a linear head on the policy's own hidden states, so that one pass computes log-probs
            and values. None: ``adapter`` with ``lora``, otherwise ``separate``.
        trunk_grad: For a ``head``: scale of the gradient of the critic's loss into the policy's weights. 1: the whole
            of it; 0: the critic's loss trains the head alone.
        lr: Learning rate of the critic, or of its head; None takes the optimizer's.
        clip: How far a value may move from its old value in an iteration; None for no bound.
        loss_coef: Weight of the critic's loss, where policy and critic share a gradient norm and an optimizer.

    Raises:
        ValueError: A value is out of range, or ``pretrained`` is neither a name nor a transformers model.
    """

    pretrained: str | os.PathLike[str] | PreTrainedModel | None = None
    kind: Literal["adapter", "head", "separate"] | None = None
    trunk_grad: float = 1.0
    lr: float | None = None
    clip: float | None = 0.2
    loss_coef: float = 0.1

    def __post_init__(self) -> None:
        ranges = dict(trunk_grad=Range(0), lr=Range(0), clip=_POSITIVE, loss_coef=Range(0))
        check_arguments(Critic, vars(self), "critic.", **ranges)
        if not isinstance(self.pretrained, (str, os.PathLike, PreTrainedModel, type(None))):
            raise ValueError(
                f"critic.pretrained is a {type(self.pretrained).__name__}. Give the directory or hub id of a reward "
                "model or of a language model, a transformers model, or null to start from the policy's weights."
            )
        if isinstance(self.pretrained, os.PathLike):
            object.__setattr__(self, "pretrained", os.fspath(self.pretrained))  # a checkpoint holds it as text
        if self.kind == "head" and self.pretrained is not None:
            raise ValueError(
                "critic.pretrained is for a critic with weights of its own, and critic.kind: head reads the policy's "
                "hidden states: set critic.pretrained to null, or critic.kind to separate."
            )
        if self.kind != "head" and self.trunk_grad != 1:
            raise ValueError(
                f"critic.trunk_grad={self.trunk_grad:g} is for critic.kind: head; other critics have weights of their "
                "own. Leave it out."
            )

    def kind_for(self, lora: object | None) -> Literal["adapter", "head", "separate"]:
        """The kind, with or without adapters.

        Raises:
            ValueError: An adapter is asked for without ``lora``.
        """
        if self.kind == "adapter" and lora is None:
            raise ValueError("critic.kind: adapter needs adapters: set lora, or critic.kind to head or separate.")
        return self.kind or ("separate" if lora is None else "adapter")


@dataclass(frozen=True)
class GAE:
    """Generalized advantage estimation (Schulman et al. 2016).

    Args:
        gamma: Discount per token. 1 counts all rewards alike, which is usual for completions.
        lam: GAE lambda: 0 trusts the critic, 1 trusts the observed rewards.
        bootstrap_truncated: Bootstrap completions that were cut at their length limit from the critic's value instead
            of 0.
        whiten: Bring advantages to mean 0 and variance 1 over an iteration.

    Raises:
        ValueError: A value is out of range.
    """

    gamma: float = 1.0
    lam: float = 0.95
    bootstrap_truncated: bool = False
    whiten: bool = True

    def __post_init__(self) -> None:
        check_arguments(GAE, vars(self), "gae.", gamma=_SHARE, lam=_SHARE)


@dataclass(frozen=True)
class Loss:
    """The policy's loss.

    Args:
        clip_low: How far the probability ratio may fall below 1 (Schulman et al. 2017). A smaller value makes steps
            more cautious.
        clip_high: How far it may rise above 1.
        entropy_coef: Weight of the entropy bonus. A larger value keeps completions more diverse.
        ptx_coef: Weight of the language-model loss (PPO-ptx, Ouyang et al. 2022); it needs ``data.ptx``.
        aggregation: ``token`` averages over the tokens of a minibatch, ``sequence`` over the means of its completions,
            ``prompt`` over the means of its prompts' tokens; ``constant`` divides the sum of a completion by
            ``max_new_tokens``.
        old_logprobs: Where the old log-probs come from: ``recompute`` takes a packed pass, so that ratios start at 1;
            ``rollout`` keeps those of the engine.

    Raises:
        ValueError: A value is out of range.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    aggregation: Mean = "token"
    old_logprobs: Literal["recompute", "rollout"] = "recompute"

    def __post_init__(self) -> None:
        check_arguments(
            Loss, vars(self), "loss.", clip_low=_SHARE, clip_high=Range(0), entropy_coef=Range(0), ptx_coef=Range(0)
        )


@dataclass(frozen=True)
class GroupLoss:
    """What GRPO's loss has beside its algorithm.

    Args:
        entropy_coef: Weight of the entropy bonus. A larger value keeps completions more diverse.
        ptx_coef: Weight of the language-model loss (PPO-ptx, Ouyang et al. 2022); it needs ``data.ptx``.
        old_logprobs: Where the old log-probs come from: ``recompute`` takes a packed pass, so that ratios start at 1;
            ``rollout`` keeps those of the engine.
        correction: Weighs tokens by ``p_old / p_rollout``, for an engine whose log-probs differ from the policy's:
            ``token_...`` by the ratio of the token, ``sequence_...`` of the completion, ``..._truncate`` up to
            ``correction_max``, ``..._mask`` 0 beyond it.
        correction_max: The bound. A larger value has less bias and more variance.
        off_policy_threshold: Leaves out completions with a negative advantage whose mean ``log p_rollout - log p`` is
            above it, in nats per token (DeepSeek-V3.2). A smaller value leaves out more; None leaves out none.
        top_entropy: Share of tokens that the policy's loss has: those at which the policy was least certain, of the
            whole minibatch (Wang et al. 2025 take 0.2). The others still count in its mean; 1 takes all.

    Raises:
        ValueError: A value is out of range, or a correction of log-probs that are the engine's own.
    """

    entropy_coef: float = 0.0
    ptx_coef: float = 0.0
    old_logprobs: Literal["recompute", "rollout"] = "recompute"
    correction: Correction = "none"
    correction_max: float = 2.0
    off_policy_threshold: float | None = None
    top_entropy: float = 1.0

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("entropy_coef", "ptx_coef", "off_policy_threshold"), Range(0))
        ranges["top_entropy"] = Range(0, 1, above=True)
        check_arguments(GroupLoss, vars(self), "loss.", correction_max=_POSITIVE, **ranges)
        if self.correction != "none" and self.old_logprobs == "rollout":
            raise ValueError(
                f"loss.correction {self.correction} weighs by the old log-probs over the engine's, and with "
                "loss.old_logprobs rollout they are the same: set it to recompute, or correction to none."
            )


@dataclass(frozen=True)
class Groups:
    """What happens to the completions of a prompt that all have the same score: a flat group, which teaches nothing.

    Args:
        flat_groups: ``keep`` counts their tokens in the loss's mean, ``drop`` leaves them out. ``refill`` drops them
            and samples further prompts of the same batch instead (DAPO's dynamic sampling): ``spare * rounds`` prompts
            of each batch are held back for it, and those that are not needed are not sampled.
        spare: Prompts of each further round. A larger value fills up faster.
        rounds: Most further rounds. With more of them, fewer updates are short of prompts.
        pass_score: A completion with at least this score solves its prompt: for ``pass@k``, ``solved`` and ``failed``.
        max_flat: Iterations in a row in which all groups are flat, before the run ends; None for no bound.
        rest_after: A prompt that is solved so many times in a row rests; None: none does. A larger value samples easy
            prompts for longer.
        rest_for: Iterations of its rest, in which it is left out of its batch. A prompt comes once an epoch, so this
            should be the iterations of several epochs.

    Raises:
        ValueError: A value is out of range, ``refill`` without ``spare``, or ``spare`` without ``refill``.
    """

    flat_groups: Literal["keep", "drop", "refill"] = "keep"
    spare: int = 0
    rounds: int = 1
    pass_score: float = 1.0
    max_flat: int | None = 10
    rest_after: int | None = None
    rest_for: int = 100

    def __post_init__(self) -> None:
        ranges = dict.fromkeys(("rounds", "max_flat", "rest_after", "rest_for"), Range(1))
        check_arguments(Groups, vars(self), "groups.", spare=Range(0), **ranges)
        if (self.flat_groups == "refill") != (self.spare > 0):
            raise ValueError(
                f"groups.spare is {self.spare} with flat_groups {self.flat_groups}: refill samples so many further "
                "prompts a round, so it needs at least 1, and the others need 0."
            )


@dataclass(frozen=True)
class Updates:
    """The optimizer steps of an iteration.

    Args:
        epochs: Passes over the completions of an iteration.
        minibatches: Optimizer steps per pass.
        micro_batch_tokens: Most tokens of one forward and backward pass; None takes a whole minibatch at once. A larger
            value needs more memory; the result does not depend on it.
        max_grad_norm: Gradients of policy and critic, each with its own norm, are clipped beyond it; None for no bound.
        target_kl: The iteration ends before an update whose approximate KL from the sampling policy is above it, in
            nats per token; None for no bound.
        max_skipped: Iterations in a row that may take no update, because values were not finite, before the run ends.
        reuse_forward: Where one micro-batch holds a whole iteration, the first update goes back through the passes that
            scored it. This saves two forward passes and keeps the activations of policy and critic at the same time.

    Raises:
        ValueError: A value is out of range.
    """

    epochs: int = 4
    minibatches: int = 1
    micro_batch_tokens: int | None = None
    max_grad_norm: float | None = 1.0
    target_kl: float | None = None
    max_skipped: int = 5
    reuse_forward: bool = True

    def __post_init__(self) -> None:
        check_arguments(
            Updates,
            vars(self),
            "updates.",
            epochs=Range(1),
            minibatches=Range(1),
            micro_batch_tokens=Range(1),
            max_grad_norm=_POSITIVE,
            target_kl=_POSITIVE,
            max_skipped=Range(1),
        )


# checkpoints hold these settings; torch.load reads them without trusting arbitrary classes
torch.serialization.add_safe_globals(
    [WeightedReward, Algorithm, Sampling, Rollout, KL, Shaping, Critic, GAE, Loss, GroupLoss, Groups, Updates]
)


def check_kind(name: str, kind: type, given: object) -> None:
    """Refuses what is no group of settings of this kind.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(given, kind):
        raise ValueError(f"{name} is {given!r}: give a {kind.__name__}(...), a group of settings.")
