"""Several rewards as one, and what a config's ``reward`` means."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.models.loading import Dtype
from lightning_rlhf.rewards.base import BadScores, Reward, Samples, check_scores
from lightning_rlhf.rewards.function import FunctionReward, import_function
from lightning_rlhf.rewards.model import RewardModelReward


@dataclass
class WeightedReward:
    """A part of a reward.

    Attributes:
        source: Directory or hub id of a reward model, or a function or its import path.
        weight: Its share of the sum.
        name: What it is logged as; default the last part of ``source``.
    """

    source: str | Callable[..., Any]
    weight: float = 1.0
    name: str | None = None


class WeightedSum(Reward):
    """The weighted sum of several rewards.

    Args:
        parts: Rewards by name.
        weights: Their weights, in the same order.

    Attributes:
        last: (S,) unweighted scores of each part in the last call, for logging.
    """

    def __init__(self, parts: dict[str, Reward], weights: Sequence[float]) -> None:
        super().__init__()
        self.parts, self.weights = nn.ModuleList(parts.values()), list(weights)
        self.names = list(parts)
        self.needs = {name for part in parts.values() for name in part.needs}
        self.last: dict[str, Tensor] = {}

    @property
    def limits(self) -> dict[str, int]:  # type: ignore[override]
        """Those of all parts."""
        return {name: limit for part in self.parts for name, limit in part.limits.items()}  # type: ignore[union-attr,operator]

    def load(self) -> None:
        """Loads all parts."""
        for part in self.parts:
            part.load()  # type: ignore[operator]

    def forward(self, samples: Samples) -> Tensor:
        """Scores them.

        Args:
            samples: At least one.

        Returns:
            (S,) sums in fp32.

        Raises:
            BadScores: Some are no finite numbers, of a part whose weight is not 0.
        """
        self.last, errors = {}, []
        for name, part, weight in zip(self.names, self.parts, self.weights, strict=True):
            try:
                self.last[name] = part(samples)
            except BadScores as error:
                self.last[name] = error.scores
                errors += [error] if weight else []
        weights = torch.tensor(self.weights, dtype=torch.float32, device=samples.batch.last.device)
        sums = torch.where(weights != 0, torch.stack(list(self.last.values()), 1) * weights, 0.0).sum(1)
        if errors:
            raise BadScores(str(errors[0]), sums)
        return check_scores(sums, samples, "The weighted sum of rewards")


def make_reward(
    spec: str | os.PathLike[str] | Callable[..., Any] | Sequence[WeightedReward] | Reward,
    tokenizer: PreTrainedTokenizerBase,
    dtype: Dtype = "float32",
    trust_remote_code: bool = False,
) -> Reward:
    """What a stage's argument ``reward`` means.

    Args:
        spec: A directory, a hub id (``org/name``), a function or its import path, a list of weighted ones, or a reward.
        tokenizer: The policy's.
        dtype: Of reward models' weights.
        trust_remote_code: Run code that comes with reward models.

    Raises:
        ValueError: It is none of these; the message says what was tried.
        ImportError: An import path at which there is nothing.
    """
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, (str, os.PathLike)):
        name = os.fspath(spec)
        if names_model(name):
            return RewardModelReward(name, tokenizer, dtype, trust_remote_code=trust_remote_code)
        if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*[.:]\w+", name):
            return FunctionReward(import_function(name))
        raise ValueError(
            f"reward: {name!r} is no directory here ({os.getcwd()}), no hub id (org/name) and no import path "
            "(package.module.function)."
        )
    if not callable(spec):
        parts: dict[str, Reward] = {}
        for part in spec:
            name = part.name or _short(part.source)
            while name in parts:
                name = f"{name}_"
            parts[name] = make_reward(part.source, tokenizer, dtype, trust_remote_code)
        if not parts:
            raise ValueError("reward: the list is empty. Give at least one {source: ..., weight: ...}.")
        return WeightedSum(parts, [part.weight for part in spec])
    return FunctionReward(spec)


def names_model(name: str) -> bool:
    """Whether a text is a directory that is there, or looks like a hub id (``org/name``)."""
    return os.path.isdir(name) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _short(source: str | Callable[..., Any]) -> str:
    if isinstance(source, str):
        return re.split(r"[/.:]", source.rstrip("/"))[-1]
    return getattr(source, "__name__", type(source).__name__)
