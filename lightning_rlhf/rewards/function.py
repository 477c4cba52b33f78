"""Rewards by a Python function."""

from __future__ import annotations

import functools
import inspect
import math
import traceback
from collections.abc import Callable
from typing import Any, cast

import torch

from lightning_rlhf.data.packed import unpack
from lightning_rlhf.rewards.base import Reward, RewardError, Samples, Scores, check_scores
from lightning_rlhf.utils.imports import import_object
from lightning_rlhf.utils.text import show

#: What a function gets of the samples if it names them.
_OF_SAMPLES = {"completion_ids", "truncated"}


class FunctionReward(Reward):
    """Scores by ``f(prompts, completions, **columns) -> scores``.

    Arguments are passed by their names: ``prompts``, each a text or a list of messages, ``completions``, texts, and of
    the further columns of the prompt data those that the function names, or all with ``**columns``; each has one entry
    a completion. If it names them, and the data have no such columns, it also gets ``completion_ids``, lists of tokens,
    and ``truncated``, whether the length limit ended each. It returns as many finite numbers, in a list, an array or a
    tensor; None in a list says that it does not apply to that completion.

    Args:
        function: The function, or its import path: ``package.module.function`` or ``package.module:function``.

    Raises:
        ImportError: Nothing is at the import path.
        TypeError: What is there can't be called so.
    """

    def __init__(self, function: str | Callable[..., Any]) -> None:
        super().__init__()
        self.function = import_function(function) if isinstance(function, str) else function
        self.name = _name(self.function)
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except ValueError as error:  # some that are written in C
            raise TypeError(f"The reward function {self.name} doesn't say what arguments it has.") from error
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.accepts = {p.name for p in by_name}
        self.needs = {p.name for p in by_name if p.default is p.empty} - {"prompts", "completions"} - _OF_SAMPLES
        self.takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        if not (self.takes_all or {"prompts", "completions"} <= self.accepts):
            raise TypeError(
                f"The reward function {self.name} must have the arguments prompts and completions, and those columns "
                f"of the data that it reads; it has {', '.join(sorted(self.accepts)) or 'none'}."
            )

    def forward(self, samples: Samples) -> Scores:
        """Calls the function, with lists of its own, and checks what it returns.

        Args:
            samples: S completions.

        Returns:
            Scores.

        Raises:
            RewardError: The data lack a column that the function needs, or the function fails or returns another number
                of scores.
            BadScores: Some scores are not finite numbers.
        """
        given: dict[str, list[Any]] = {"prompts": samples.prompts, "completions": samples.completions}
        if clash := sorted(given.keys() & samples.columns.keys()):
            raise RewardError(f"Rename the column {clash[0]} of the prompt data: the argument of that name is ours.")
        wanted = self.accepts & _OF_SAMPLES - samples.columns.keys()
        if "truncated" in wanted:
            given["truncated"] = samples.truncated
        if "completion_ids" in wanted:
            given["completion_ids"] = [b.input_ids for tree in unpack(samples.batch) for b in tree.branches]
        given |= samples.columns
        if missing := sorted(self.needs - given.keys()):
            raise RewardError(
                f"The reward function {self.name} needs the column {', '.join(missing)}; the prompts' rows have "
                f"{', '.join(sorted(samples.columns)) or 'no further columns'}."
            )
        passed = {name: list(v) for name, v in given.items() if self.takes_all or name in self.accepts}
        size = len(samples.completions)
        try:
            result = self.function(**passed)
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"The reward function {self.name} failed on {size} completions: {type(error).__name__}: {error} "
                f"({where.filename}:{where.lineno})"
            ) from error
        try:
            scores = list(result.tolist() if hasattr(result, "tolist") else result)
        except TypeError:
            raise RewardError(
                f"The reward function {self.name} returned {show(result)}; return a list of {size} numbers, one a "
                "completion."
            ) from None
        if len(scores) != size:
            raise RewardError(f"The reward function {self.name} returned {len(scores)} scores for {size} completions.")
        device = samples.batch.input_ids.device
        numbers = torch.tensor(list(map(_number, scores)), dtype=torch.float64).float().to(device)
        absent = torch.tensor([score is None for score in scores], device=device)
        name = f"The reward function {self.name}"
        return Scores(check_scores(numbers, samples, name, scores, absent), absent=absent)


def import_function(path: str) -> Callable[..., Any]:
    """Imports a reward function; the current directory is searched too.

    Args:
        path: ``package.module.function`` or ``package.module:function``.

    Returns:
        The function, or another object that can be called.

    Raises:
        ImportError: No such module or name, or a module that imports what isn't there.
        TypeError: Something that can't be called.
    """
    function = import_object(path, "reward")
    if not callable(function):
        raise TypeError(f"The reward {path} is a {type(function).__name__}, which can't be called.")
    return cast(Callable[..., Any], function)


def _name(function: Callable[..., Any]) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def _number(score: Any) -> float:
    """NaN for what is none."""
    try:
        return math.nan if isinstance(score, (str, bytes)) else float(score)
    except (TypeError, ValueError, OverflowError):
        return math.nan
