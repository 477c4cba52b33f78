"""Several rewards as one, and what a config's ``reward`` means."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.arguments import nearest
from lightning_rlhf.models.loading import Dtype
from lightning_rlhf.models.runs import check_name
from lightning_rlhf.rewards import verifiers
from lightning_rlhf.rewards.base import BadScores, Reward, Samples, Scores, check_scores
from lightning_rlhf.rewards.function import FunctionReward, import_function, name_of
from lightning_rlhf.rewards.functions import answer_match
from lightning_rlhf.rewards.model import RewardModelReward
from lightning_rlhf.utils.text import one_line


@dataclass
class WeightedReward:
    """A part of a reward.

    Attributes:
        source: Directory or hub id of a reward model, or a function or its import path.
        weight: Its share of the sum.
        name: What it is logged as; default the last part of ``source``, and as many before it as tell it from others.
        options: Arguments of a function by name, such as ``{timeout: 5}``: settings, in place of columns of the data.
    """

    source: str | Callable[..., Any]
    weight: float = 1.0
    name: str | None = None
    options: dict[str, Any] | None = None


class WeightedSum(Reward):
    """The weighted sum of several rewards.

    Args:
        parts: Rewards by name.
        weights: Their weights, in the same order.
    """

    def __init__(self, parts: dict[str, Reward], weights: Sequence[float]) -> None:
        super().__init__()
        self.parts, self.weights = nn.ModuleList(parts.values()), list(weights)
        self.names = list(parts)
        self.needs = {name for part in parts.values() for name in part.needs}

    @property
    def limits(self) -> dict[str, int]:  # type: ignore[override]
        """Those of all parts."""
        return {name: limit for part in self.parts for name, limit in part.limits.items()}  # type: ignore[union-attr,operator]

    def load(self) -> None:
        """Loads all parts."""
        for part in self.parts:
            part.load()  # type: ignore[operator]

    def forward(self, samples: Samples) -> Scores:
        """Scores them.

        Args:
            samples: At least one.

        Returns:
            Sums, and the unweighted scores of each part. A part that does not apply to a completion is left out of its
            sum; where none applies, the score is absent.

        Raises:
            BadScores: Some scores of a part whose weight is not 0 are not finite numbers.
        """
        found: dict[str, Tensor] = {}
        extras: dict[str, Tensor] = {}
        absent: list[Tensor] = []
        errors: list[BadScores] = []
        for name, part, weight in zip(self.names, self.parts, self.weights, strict=True):
            try:
                scores = part(samples)
            except BadScores as error:
                scores = error.scores
                errors += [error] if weight else []
            found[name] = scores.total
            extras |= {f"{name}/{entry}": column for entry, column in scores.extras.items()}
            absent.append(torch.zeros_like(scores.total, dtype=torch.bool) if scores.absent is None else scores.absent)
        weights = torch.tensor(self.weights, dtype=torch.float32, device=samples.batch.last.device)
        left_out = torch.stack(absent, 1) | (weights == 0)
        none = torch.stack(absent, 1).all(1) | (left_out.all(1) & bool((weights != 0).any()))
        sums = torch.where(left_out, 0.0, torch.stack(list(found.values()), 1) * weights).sum(1)
        sums = sums.masked_fill(none, torch.nan)
        if errors:
            raise BadScores(str(errors[0]), Scores(sums, found, none, extras))
        try:
            return Scores(check_scores(sums, samples, "The weighted sum of rewards", absent=none), found, none, extras)
        except BadScores as error:
            raise BadScores(str(error), Scores(error.scores.total, found, none, extras)) from None


def make_reward(
    spec: str | os.PathLike[str] | Callable[..., Any] | Sequence[WeightedReward | Mapping[str, Any]] | Reward,
    tokenizer: PreTrainedTokenizerBase,
    dtype: Dtype = "float32",
    trust_remote_code: bool = False,
) -> Reward:
    """Makes a reward from a stage's argument ``reward``.

    Args:
        spec: A directory, a hub id (``org/name``), a function or its import path, a list of weighted ones (as
            :class:`WeightedReward` or as a dict of its settings), or a reward.
        tokenizer: The policy's.
        dtype: Of reward models' weights.
        trust_remote_code: Run code that comes with reward models.

    Raises:
        ValueError: It is none of these; the message says what was tried.
        ImportError: An import path at which there is nothing.
        OSError: A path at which there is nothing.
    """
    if isinstance(spec, Reward):
        return spec
    if isinstance(spec, (str, os.PathLike)):
        name = os.fspath(spec)
        if names_model(name):
            try:
                return RewardModelReward(name, tokenizer, dtype, trust_remote_code=trust_remote_code)
            except OSError as error:  # that of transformers has several lines
                why = one_line(str(error), 300)
                raise OSError(f"reward: {name} can't be loaded as a directory or from the model hub: {why}") from error
        if re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*[.:]\w+", name):
            return FunctionReward(_import(name))
        if os.sep in name:
            check_name(name)
        raise ValueError(
            f"reward: {name!r} is not a directory in {os.getcwd()}, a hub id (org/name) or an import path "
            f"(package.module.function){_near(name)}"
        )
    if isinstance(spec, (WeightedReward, Mapping)):
        spec = [spec]
    if isinstance(spec, Sequence):
        parts = [_part(part) for part in spec]
        if not parts:
            raise ValueError("reward: the list is empty. Give at least one {source: ..., weight: ...}.")
        rewards = [_make_part(part, tokenizer, dtype, trust_remote_code) for part in parts]
        return WeightedSum(dict(zip(part_names(parts), rewards, strict=True)), [part.weight for part in parts])
    if callable(spec) and not isinstance(spec, PreTrainedModel):
        return FunctionReward(spec)
    raise ValueError(
        f"reward: an object of type {type(spec).__name__} is none. Give the directory or hub id of a reward model, a "
        "function f(prompts, completions, **columns) -> scores or its import path, or a list of "
        "{source: ..., weight: ...}."
    )


def _import(path: str) -> Callable[..., Any]:
    try:
        return import_function(path)
    except ImportError as error:
        known = _known().get(re.split("[.:]", path)[-1])
        if known is None or isinstance(error, ModuleNotFoundError):  # it is there, and lacks a module
            raise
        raise ImportError(f"{str(error).partition('; did you mean')[0].rstrip('.')}; did you mean {known}?") from error


def _near(name: str) -> str:
    """The end of a sentence, with the path of the function of this package that may be meant."""
    known = _known()
    found = nearest(name, known)
    return f"; did you mean {known[found]}?" if found else "."


def _known() -> dict[str, str]:
    """This package's functions that are rewards: their import paths by name."""
    own = [name for name in verifiers.__all__ if hasattr(getattr(verifiers, name), "checks_options")]
    homes = {**dict.fromkeys(own, verifiers.__name__), answer_match.__name__: answer_match.__module__}
    return {name: f"{home}.{name}" for name, home in homes.items()}


def _make_part(part: WeightedReward, tokenizer: PreTrainedTokenizerBase, dtype: Dtype, trust: bool) -> Reward:
    reward = make_reward(part.source, tokenizer, dtype, trust)
    if part.options is None:
        return reward
    if not isinstance(reward, FunctionReward):
        raise ValueError(f"reward: {_shown(part.source)} has options, which are for functions. Leave them out.")
    return FunctionReward(reward.function, part.options)


def names_model(name: str) -> bool:
    """Returns whether a text is an existing directory or looks like a hub id (``org/name``)."""
    return os.path.isdir(name) or re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _part(given: Any) -> WeightedReward:
    """A part of a list: as it is, of a dict of its settings, or of a source that weighs 1."""
    if isinstance(given, Mapping):
        known = [field.name for field in fields(WeightedReward)]
        if strange := sorted(map(str, given.keys() - {*known})):
            raise ValueError(f"reward: a part has the key {strange[0]!r}. Its keys are {', '.join(known)}.")
        if "source" not in given:
            raise ValueError("reward: a part has no source. Write {source: ..., weight: ...}.")
        given = WeightedReward(**given)
    part = given if isinstance(given, WeightedReward) else WeightedReward(given)
    if not isinstance(part.weight, (int, float)) or not math.isfinite(part.weight):
        raise ValueError(f"reward: the weight of {_shown(part.source)} is {part.weight!r}: give a finite number.")
    if not isinstance(part.options, Mapping | None):
        raise ValueError(f"reward: the options of {_shown(part.source)} are {part.options!r}: give {{name: value}}.")
    return part


def _shown(source: object) -> str:
    """A source in messages."""
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else name_of(source)


def part_names(parts: Sequence[WeightedReward]) -> list[str]:
    """Names parts for logging: the last pieces of their sources, as many as are needed to tell them apart."""
    given = Counter(part.name for part in parts if part.name)
    if twice := [name for name, count in given.items() if count > 1]:
        raise ValueError(f"reward: {given[twice[0]]} parts have the name {twice[0]!r}. Give each its own.")
    pieces = [(part.name,) if part.name else tuple(_pieces(part.source)) for part in parts]
    taken = dict.fromkeys(pieces, 1)  # the same source twice is numbered below, as more of its path tells nothing
    while True:
        short = {p: "".join(p[-2 * k + 1 :]) for p, k in taken.items()}
        uses = Counter(short.values())
        longer = [p for p, k in taken.items() if uses[short[p]] > 1 and 2 * k < len(p)]
        if not longer:
            break
        for p in longer:
            taken[p] += 1
    names = [short[p] for p in pieces]
    counts = Counter(names)
    found: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}_{number}" for number in count(2))
        found[name if name not in found else next(n for n in numbered if n not in counts and n not in found)] = None
    return list(found)


def _pieces(source: object) -> list[str]:
    """A source's name, cut where a path or an import path has its parts, with what stands between them."""
    if isinstance(source, (str, os.PathLike)):
        path = os.fspath(source).rstrip("/")
        return re.split("(/)" if "/" in path or os.path.isdir(path) else r"([.:])", path)
    return [name_of(source)]
