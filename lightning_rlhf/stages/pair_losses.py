"""Losses over pairs as settings name them: one, several with weights, or a function of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Real
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_rlhf.arguments import did_you_mean
from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.functional import LOSSES, PairLogprobs, PairLoss
from lightning_rlhf.utils.imports import import_object
from lightning_rlhf.utils.text import show

FDivergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
#: The better answers' log-prob may fall by this share before a warning.
DROP = 0.1
#: What is logged of pairs beside their loss, see :meth:`LossSum.measure`.
MEASURES = ("accuracy", "margin", "chosen_reward", "rejected_reward", "chosen_logprob", "rejected_logprob")
_POSITIVE, _SHARE = Range(0, above=True), Range(0, 0.5, below=True)
#: Allowed numbers of settings; those of one loss alone are listed by both names.
_RANGES = {
    "beta": _POSITIVE,
    "label_smoothing": _SHARE,
    "exo.label_smoothing": Range(0, 0.5, above=True, below=True),  # it takes the logarithm
    "tau": _POSITIVE,
    "gamma": Range(0),
    "odds_weight": Range(0),
    "sft_weight": Range(0),
    "drop_weight": Range(0),
}


@dataclass(frozen=True)
class WeightedLoss:
    """A loss with its weight and its settings.

    Args:
        name: A loss of ``docs/dpo.md``, or the import path of a function of your own.
        weight: Its weight in the sum.
        settings: Its own settings, such as ``{label_smoothing: 0.1}``.

    Raises:
        ValueError: The weight is not above 0, or the settings have no names.
    """

    name: str
    weight: float = 1.0
    settings: dict[str, float | bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_arguments(WeightedLoss, vars(self), "loss.", weight=_POSITIVE)
        if not isinstance(self.settings, Mapping):
            raise ValueError(f"The settings of the loss {self.name} are {show(self.settings)}: give {{name: value}}.")


@dataclass(frozen=True)
class PairShaping:
    """How log-probs of pairs become what losses read.

    Args:
        length_alpha: Weight of the difference of lengths, by which a longer better answer must win (R-DPO). A larger
            value prefers shorter answers; 0 turns it off.
        ld_alpha: Weight of the tokens behind the shorter answer's length (LD-DPO). 1 counts all tokens alike; a smaller
            value attends less to length.
        f_divergence: The divergence from the reference: ``reverse_kl`` (DPO), ``forward_kl``, ``js_divergence`` or
            ``alpha_divergence``.
        f_alpha: Order of the alpha divergence.

    Raises:
        ValueError: A value is out of range.
    """

    length_alpha: float = 0.0
    ld_alpha: float = 1.0
    f_divergence: FDivergence = "reverse_kl"
    f_alpha: float = 0.5

    def __post_init__(self) -> None:
        ranges = {"length_alpha": Range(0), "ld_alpha": Range(0, 1), "f_alpha": Range(0, 1, above=True, below=True)}
        check_arguments(PairShaping, vars(self), "shaping.", **ranges)


@dataclass(frozen=True)
class OnlinePairShaping(PairShaping):
    """As ``PairShaping``, and how completions are ranked.

    Args:
        length_alpha: See ``PairShaping``, as the next three.
        ld_alpha: Weight of the tokens behind the shorter answer's length.
        f_divergence: The divergence from the reference.
        f_alpha: Order of the alpha divergence.
        missing_eos_penalty: Subtracted from the score of a completion that was cut at its length limit. A larger value
            ranks it lower.
        bad_scores: What happens when a score is NaN or infinite in fp32. ``stop`` ends the run and names the sample;
            ``drop`` leaves the sample out of all pairs.
        max_flat: Number of iterations in a row without a pair after which the run ends. A larger value waits longer;
            None never ends it.

    Raises:
        ValueError: A value is out of range.
    """

    missing_eos_penalty: float = 0.0
    bad_scores: Literal["stop", "drop"] = "stop"
    max_flat: int | None = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {"missing_eos_penalty": Range(0), "max_flat": Range(1)}
        check_arguments(OnlinePairShaping, vars(self), "shaping.", **ranges)


# checkpoints hold these settings; torch.load reads them without trusting arbitrary classes
torch.serialization.add_safe_globals([WeightedLoss, PairShaping, OnlinePairShaping])


class LossSum:
    """A weighted sum of losses over pairs.

    Args:
        given: The name of a loss, a function, or several with weights.
        beta: Strength of the losses that have one; None keeps each loss's own default.

    Attributes:
        needs_reference: Whether one of them reads log-ratios.
        reads_offset: Whether all of them read margins and length penalties; SFT beside such a loss is no exception.
        scale: Factor of implicit rewards: that of the first loss that has one, otherwise 1.
        per_token: Whether implicit rewards are means per token, as the first loss reads them; otherwise sums.

    Raises:
        ImportError: A function that is not there.
        ValueError: There is no such loss, or it has no such setting.
    """

    def __init__(self, given: str | Sequence[WeightedLoss] | Callable[..., Tensor], beta: float | None) -> None:
        if isinstance(given, (str, PairLoss)) or callable(given):
            self._parts = [_Part(given, 1.0, {}, beta)]
        else:
            losses = [_weighted(one) for one in given]
            self._parts = [_Part(one.name, one.weight, one.settings, beta) for one in losses]
        if not self._parts:
            raise ValueError(f"loss is an empty list. Choose of: {', '.join(LOSSES)}.")
        betas = [part.settings["beta"] for part in self._parts if "beta" in part.settings]
        if beta is not None and not betas:
            names = " and ".join(part.name for part in self._parts)
            raise ValueError(f"beta is {beta:g}, but the loss {names} has no beta. Leave it out.")
        self.scale = float(betas[0]) if betas else 1.0
        self.needs_reference = any(part.loss.reference for part in self._parts)
        offsets = [part.loss.offset for part in self._parts if part.loss is not LOSSES["sft"]]
        self.reads_offset = bool(offsets) and all(offsets)
        first = next((part for part in self._parts if part.loss is not LOSSES["sft"]), self._parts[0])
        self.per_token = first.loss.per_token and bool(first.settings.get("average", True))

    def check_shaping(self, shaping: PairShaping) -> None:
        """Refuses what the loss would not read.

        Raises:
            ValueError: A divergence without a reference, or a length penalty without a place for it.
        """
        if not self.needs_reference and shaping.f_divergence != "reverse_kl":
            raise ValueError(f"shaping.f_divergence is {shaping.f_divergence}, but the loss reads no reference.")
        if not self.reads_offset and shaping.length_alpha:
            raise ValueError("shaping.length_alpha is set, but the loss has no place for it (docs/dpo.md).")

    def implicit_rewards(self, pairs: PairLogprobs) -> tuple[Tensor, Tensor]:
        """(P,) implicit rewards of the better and the worse answers.

        They are ``beta`` times what the loss compares: log-ratios, or log-probs if it reads no reference, as sums or as
        means per token.
        """
        better, worse = self.scale * pairs.better_ratio, self.scale * pairs.worse_ratio
        if self.per_token:
            return better / pairs.better_length, worse / pairs.worse_length
        return better, worse

    def measure(self, pairs: PairLogprobs) -> dict[str, Tensor]:
        """(P,) values by the names of :data:`MEASURES`; an accuracy of 0.5 is a tie."""
        better, worse = self.implicit_rewards(pairs)
        margin = better - worse
        won = (margin > 0).double() + 0.5 * (margin == 0).double()
        return dict(zip(MEASURES, (won, margin, better, worse, pairs.better, pairs.worse), strict=True))

    def __call__(self, pairs: PairLogprobs, delta: float = 0.0) -> Tensor:
        """Computes (P,) losses.

        Args:
            pairs: The pairs' log-probs.
            delta: The running mean of implicit rewards, for losses that have such a setting.

        Raises:
            ValueError: A function of one's own did not return a loss per pair.
        """
        losses = [part.weight * part(pairs, delta) for part in self._parts]
        return torch.stack(losses).sum(0) if len(losses) > 1 else losses[0]


def warn_of_drop(ratio: float, logprob: float) -> bool:
    """Warns if better answers became less likely, which pairs alone allow.

    Args:
        ratio: Mean log-ratio of the better answers.
        logprob: Their mean log-prob.

    Returns:
        Whether there was a warning.
    """
    if ratio >= DROP * (logprob - ratio):
        return False
    rank_zero_warn(
        f"The better answers' log-prob fell from {logprob - ratio:.1f} to {logprob:.1f} nats: both answers of pairs "
        "are becoming less likely. The loss dpop prevents it, and so does sft beside the loss: loss: [{name: sigmoid}, "
        "{name: sft, weight: 0.2}]."
    )
    return True


def _weighted(given: Any) -> WeightedLoss:
    """One of several losses, which may be a dict of its settings."""
    names = [field.name for field in fields(WeightedLoss)]
    if isinstance(given, Mapping) and "name" in given and given.keys() <= {*names}:
        given = WeightedLoss(**given)
    if not isinstance(given, WeightedLoss):
        raise ValueError(f"loss has the part {show(given)}: give a WeightedLoss, or a dict of {', '.join(names)}.")
    return given


class _Part:
    """A loss with all its settings but the one that moves."""

    def __init__(
        self,
        given: str | PairLoss | Callable[..., Tensor],
        weight: float,
        settings: Mapping[str, Any],
        beta: float | None,
    ) -> None:
        self.loss, self.name, self.weight = *_find(given), weight
        parameters = list(inspect.signature(self.loss.function).parameters.items())[1:]
        known = {name: parameter.default for name, parameter in parameters}
        for key, value in settings.items():
            self._check(key, value, known)
        defaults = {key: default for key, default in known.items() if default is not inspect.Parameter.empty}
        self.settings = {**defaults, **({"beta": beta} if beta is not None and "beta" in known else {}), **settings}
        self.follows_delta = "delta" in known and "delta" not in settings

    def _check(self, key: str, value: Any, known: Mapping[str, Any]) -> None:
        if key not in known:
            has = ", ".join(known) or "none"
            raise ValueError(f"The loss {self.name} has no setting {key!r}{did_you_mean(key, known)} It has: {has}.")
        if isinstance(known[key], bool) != isinstance(value, bool) or not isinstance(value, Real):
            what = "true or false" if isinstance(known[key], bool) else "a number"
            raise ValueError(f"The setting {key} of the loss {self.name} must be {what}, got {value!r}.")
        allowed = _RANGES.get(f"{self.name}.{key}", _RANGES.get(key, Range())) if self.name in LOSSES else Range()
        if value not in allowed:
            raise ValueError(f"The setting {key} of the loss {self.name} must be {allowed}, got {value!r}.")

    def __call__(self, pairs: PairLogprobs, delta: float) -> Tensor:
        settings = {**self.settings, "delta": delta} if self.follows_delta else self.settings
        loss = self.loss.function(pairs, **settings)
        if not isinstance(loss, Tensor) or loss.shape != pairs.better.shape:
            what = f"the shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else show(loss, 40)
            raise ValueError(
                f"The loss {self.name} returned {what} for {len(pairs.better)} pairs: return a tensor with a loss per "
                "pair, without a mean."
            )
        return loss


def _find(given: str | PairLoss | Callable[..., Tensor]) -> tuple[PairLoss, str]:
    """A loss and what it is called."""
    if isinstance(given, str) and given in LOSSES:
        return LOSSES[given], given
    found: Any = given
    name = given if isinstance(given, str) else getattr(given, "__name__", type(given).__name__)
    if isinstance(given, str):
        if "." not in given and ":" not in given:
            raise ValueError(
                f"There is no loss {given!r}{did_you_mean(given, LOSSES)} All: {', '.join(LOSSES)}; or the import path "
                "of a function."
            )
        found = import_object(given, "loss")
    if isinstance(found, PairLoss):
        return found, name
    if not callable(found):
        raise ValueError(f"loss: {name} is a {type(found).__name__}. Give a function of PairLogprobs.")
    return PairLoss(found), name
