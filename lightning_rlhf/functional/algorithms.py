"""The algorithms of the GRPO family: how rewards become advantages, and what loss they weigh. One line each."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

from torch import Tensor

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.functional.groups import Baseline, Scale
from lightning_rlhf.functional.policy_gradient import Mean, cispo_loss, gmpo_loss, reinforce_loss, sapo_loss
from lightning_rlhf.functional.policy_gradient import sequence_policy_loss as sequence_loss
from lightning_rlhf.functional.ppo import PolicyLoss, policy_loss


@dataclass(frozen=True)
class Algorithm:
    """An algorithm of the GRPO family; the defaults are GRPO's. ``docs/grpo.md`` has the formulas.

    Args:
        baseline: What is subtracted from a reward: the group's ``mean``, that of the others (``leave_one_out``), that
            over the group's tokens (``length_weighted``), or nothing (``none``).
        scale: What the difference is divided by: the standard deviation of the ``group`` or of the ``batch``, the
            group's ``mean``, or nothing (``none``).
        whiten: Bring advantages to mean 0 and variance 1 over the tokens of an iteration.
        combine: Several rewards: ``sum`` adds them up first, ``normalize`` standardizes each in its group first (GDPO).
        loss: ``clip`` is PPO's; ``reinforce`` has no ratio; ``cispo``, ``gmpo`` and ``sapo`` bound it in other ways.
        ratio: Of each ``token``, or one per completion: ``sequence`` is the geometric mean of its tokens (GSPO),
            ``completion`` their product.
        clip_low: How far a ratio may fall below 1; ``gmpo``: its log below 0. None sets no bound, with ``cispo`` only.
        clip_high: How far it may rise above 1.
        dual_clip: Largest ratio where the advantage is negative; None for no bound.
        tau_positive: Steepness of SAPO's gate where the advantage is positive.
        tau_negative: Its steepness elsewhere.
        mean: Over what losses are averaged: every ``token``, the means of completions (``sequence``), of prompts
            (``prompt``), or their sums divided by ``max_new_tokens`` (``constant``).

    Raises:
        ValueError: A value is out of range, or two contradict each other.
    """

    baseline: Baseline = "mean"
    scale: Scale = "group"
    whiten: bool = False
    combine: Literal["sum", "normalize"] = "sum"
    loss: Literal["clip", "reinforce", "cispo", "gmpo", "sapo"] = "clip"
    ratio: Literal["token", "sequence", "completion"] = "token"
    clip_low: float | None = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    tau_positive: float = 1.0
    tau_negative: float = 1.05
    mean: Mean = "sequence"

    def __post_init__(self) -> None:
        above = Range(0, above=True)
        ranges = {"clip_low": Range(0), "clip_high": Range(0), "tau_positive": above, "tau_negative": above}
        check_arguments(Algorithm, vars(self), "algorithm.", dual_clip=Range(1, above=True), **ranges)
        one_each = self.ratio != "token" or self.loss == "gmpo"
        what = "loss gmpo" if self.loss == "gmpo" else f"ratio {self.ratio}"
        for wrong, why in (
            (one_each and self.mean != "sequence", f"{what} has one loss per completion: set mean to sequence"),
            (self.ratio != "token" and self.loss != "clip", f"ratio {self.ratio} is for loss clip, not {self.loss}"),
            (self.clip_low is None and self.loss != "cispo", f"clip_low null is for loss cispo, not {self.loss}"),
            (self.loss == "clip" and (self.clip_low or 0) > 1, "clip_low must be at most 1: ratios are positive"),
            (self.dual_clip is not None and self.loss != "clip", f"dual_clip is for loss clip, not {self.loss}"),
            (self.baseline == "none" and self.scale != "none", f"scale {self.scale} needs a baseline"),
            (self.scale == "mean" and self.baseline != "mean", "scale mean is for baseline mean"),
            (self.whiten and self.scale != "none", f"whiten and scale {self.scale} both scale: set scale to none"),
            (self.combine == "normalize" and (self.baseline, self.scale) != ("mean", "group"),
             "combine normalize is for baseline mean and scale group"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(f"algorithm: {why}.")

    def policy_loss(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, sequence: Tensor) -> PolicyLoss:
        """(N,) losses of tokens; see :mod:`~lightning_rlhf.functional.policy_gradient` for the shapes."""
        given, low, high = (logprobs, old_logprobs, advantages), self.clip_low or 0.0, self.clip_high
        if self.loss == "reinforce":
            return reinforce_loss(*given)
        if self.loss == "cispo":
            return cispo_loss(*given, self.clip_low, high)
        if self.loss == "gmpo":
            return gmpo_loss(*given, sequence, low, high)
        if self.loss == "sapo":
            return sapo_loss(*given, self.tau_positive, self.tau_negative)
        if self.ratio == "token":
            return policy_loss(*given, low, high, self.dual_clip)
        return sequence_loss(*given, sequence, low, high, self.dual_clip, self.ratio == "sequence")


ALGORITHMS = {
    "grpo": Algorithm(),  # Shao et al. 2024 (DeepSeekMath), eq. 3
    "dr_grpo": Algorithm(scale="none", mean="constant"),  # Liu et al. 2025
    "dapo": Algorithm(clip_high=0.28, mean="token"),  # Yu et al. 2025, sec. 3.1, 3.3
    "rloo": Algorithm("leave_one_out", "none", loss="reinforce", mean="constant"),  # Ahmadian et al. 2024
    "reinforce++": Algorithm("none", "none", whiten=True, mean="token"),  # Hu 2025
    "reinforce++baseline": Algorithm("mean", "none", whiten=True, mean="token"),  # Hu 2025
    "gspo": Algorithm(ratio="sequence", clip_low=3e-4, clip_high=4e-4),  # Zheng et al. 2025, sec. 5.1
    "cispo": Algorithm(loss="cispo", clip_low=None, clip_high=4.0, mean="token"),  # MiniMax 2025: ratios up to 5
    "gmpo": Algorithm(loss="gmpo", clip_low=0.4, clip_high=0.4),  # Zhao et al. 2025
    "sapo": Algorithm(loss="sapo"),  # Gao et al. 2025
    "opo": Algorithm("length_weighted", "none", loss="reinforce", mean="token"),  # Hao et al. 2025
    "gdpo": Algorithm(combine="normalize"),  # Liu et al. 2026
    "maxrl": Algorithm(scale="mean", mean="token"),  # Tajwar et al. 2026
}


def make_algorithm(given: str | Algorithm) -> Algorithm:
    """Returns the algorithm of a name, or the given one; raises a ValueError that has the nearest name."""
    if not isinstance(given, str | Algorithm):
        raise ValueError(f"algorithm is {given!r}: give a name ({', '.join(ALGORITHMS)}) or an Algorithm.")
    if isinstance(given, str) and given not in ALGORITHMS:
        near = max(ALGORITHMS, key=lambda name: SequenceMatcher(None, name, given.lower()).ratio())
        raise ValueError(f"algorithm {given!r} is unknown; did you mean {near}? All: {', '.join(ALGORITHMS)}.")
    return ALGORITHMS[given] if isinstance(given, str) else given
