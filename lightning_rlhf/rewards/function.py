"""Rewards by a Python function."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import os
import threading
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from lightning_rlhf.arguments import did_you_mean
from lightning_rlhf.data.packed import unpack
from lightning_rlhf.rewards.base import BadScores, Reward, RewardError, Samples, Scores, check_scores
from lightning_rlhf.utils.imports import import_object
from lightning_rlhf.utils.processes import end_if_forked, one_process
from lightning_rlhf.utils.text import one_line, show

#: What a function gets of the samples if it names them.
_OF_SAMPLES = {"completion_ids", "iteration", "truncated", "turns"}


class FunctionReward(Reward):
    """Scores by ``f(prompts, completions, **columns) -> scores``.

    Arguments are passed by their names: ``prompts``, each a text or a list of messages, ``completions``, texts, and of
    the further columns of the prompt data those that the function names, or all with ``**columns``; each has one entry
    a completion. If it names them, and the data have no such columns, it also gets ``completion_ids``, lists of tokens;
    ``truncated``, whether the length limit ended each; ``turns``, the messages of each, of which there are several
    where an environment took part; and ``iteration``, the number of the iteration that learns from
    the scores, or None in validation and elsewhere. An ``async def`` is awaited, on an event loop that stays.

    It returns a list, an array or a tensor, with a finite number per completion; None says that it does not apply to
    that completion. A dict in place of a number is ``{"score": number or None, name: number, ...}``; its further
    numbers are logged and stand in the table of completions.

    Args:
        function: The function, or its import path: ``package.module.function`` or ``package.module:function``.
        options: Values of arguments that are the same for all completions.

    Raises:
        ImportError: Nothing is at the import path.
        TypeError: What is there can't be called so.
        ValueError: An option is none of its arguments.
        RewardError: The function's attribute ``checks_options`` is true, and it refuses the value of an option: it is
            called without completions, so that wrong settings show before anything is sampled.
    """

    def __init__(self, function: str | Callable[..., Any], options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.function = import_function(function) if isinstance(function, str) else function
        self.name, self.options = name_of(self.function), dict(options or {})
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except ValueError as error:  # some that are written in C
            raise TypeError(f"The reward function {self.name} doesn't say what arguments it has.") from error
        by_name = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.accepts = {p.name for p in by_name}
        required = {p.name for p in by_name if p.default is p.empty}
        self.needs, self.requires_ids = (
            required - {"prompts", "completions"} - _OF_SAMPLES,
            "completion_ids" in required,
        )
        self.takes_all = any(p.kind == p.VAR_KEYWORD for p in parameters)
        if not (self.takes_all or {"prompts", "completions"} <= self.accepts):
            raise TypeError(
                f"The reward function {self.name} must have the arguments prompts and completions, and those columns "
                f"of the data that it reads; it has {', '.join(sorted(self.accepts)) or 'none'}."
            )
        known = sorted(self.accepts - {"prompts", "completions"})
        if strange := [name for name in self.options if name not in known and not self.takes_all]:
            raise ValueError(
                f"reward: {self.name} has no option {strange[0]!r}{did_you_mean(strange[0], known)} "
                f"All: {', '.join(known) or 'none'}."
            )
        self.needs -= self.options.keys()
        if getattr(self.function, "checks_options", False):
            empty: dict[str, list[Any]] = {name: [] for name in {"completion_ids"} & self.accepts | required}
            self.function(**empty | self.options)

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
        size = len(samples.completions)
        try:
            result = self.function(**self.arguments(samples))
            if inspect.isawaitable(result):
                result = wait_for(result)
            if inspect.isgenerator(result):
                result = list(result)
        except RewardError:
            raise
        except (Exception, SystemExit) as error:  # sys.exit() would end the run as if all were well
            if isinstance(error, SystemExit) and type(error) is not SystemExit:  # Ctrl-C or SIGTERM
                raise
            first: BaseException = error
            while inner := getattr(first, "exceptions", ()):  # a group, as of a TaskGroup, says nothing of its own
                first = inner[0]
            where = traceback.extract_tb(first.__traceback__)[-1]
            raise RewardError(
                f"The reward function {self.name} failed on {size} completions: {type(first).__name__}: "
                f"{one_line(str(first), 300)} ({where.filename}:{where.lineno})"
            ) from error
        try:
            if isinstance(result, (Mapping, Set)):  # keys, or scores in no order
                raise TypeError
            scores = list(result.tolist() if hasattr(result, "tolist") else result)
        except TypeError:
            raise RewardError(
                f"The reward function {self.name} returned {show(result)}; return a list of {size} numbers, one a "
                "completion."
            ) from None
        if len(scores) != size:
            raise RewardError(f"The reward function {self.name} returned {len(scores)} scores for {size} completions.")
        device = samples.batch.input_ids.device
        extras = {name: column.to(device) for name, column in self._extras(scores).items()}
        scores = [score["score"] if isinstance(score, Mapping) else score for score in scores]
        numbers = torch.tensor(list(map(_number, scores)), dtype=torch.float64).float().to(device)
        absent = torch.tensor([score is None for score in scores], device=device)
        try:
            check_scores(numbers, samples, f"The reward function {self.name}", scores, absent)
        except BadScores as error:
            raise BadScores(str(error), error.scores._replace(extras=extras)) from None
        return Scores(numbers, absent=absent, extras=extras)

    def arguments(self, samples: Samples) -> dict[str, Any]:
        """Returns what the function gets of samples: lists of its own.

        Raises:
            RewardError: The data lack a column that the function needs.
        """
        given: dict[str, Any] = {"prompts": samples.prompts, "completions": samples.completions}
        if clash := sorted(given.keys() & samples.columns.keys()):
            raise RewardError(f"Rename the column {clash[0]} of the prompt data: the argument of that name is ours.")
        wanted = self.accepts & _OF_SAMPLES - samples.columns.keys()
        if "truncated" in wanted:
            given["truncated"] = samples.truncated
        if "turns" in wanted:
            given["turns"] = samples.spoken
        if "completion_ids" in wanted:
            given["completion_ids"] = [b.input_ids for tree in unpack(samples.batch) for b in tree.branches]
        given |= samples.columns
        if missing := sorted(self.needs - given.keys()):
            option = "an option of that name" if len(missing) == 1 else "options of those names"
            raise RewardError(
                f"The reward function {self.name} needs the column {', '.join(missing)}, or {option}; the prompts' "
                f"rows have {', '.join(sorted(samples.columns)) or 'no further columns'}."
            )
        passed = {name: list(v) for name, v in given.items() if self.takes_all or name in self.accepts}
        return passed | ({"iteration": samples.iteration} if "iteration" in wanted else {}) | self.options

    def _extras(self, scores: Sequence[Any]) -> dict[str, Tensor]:
        """Further numbers of scores that are dicts, as columns."""
        columns: dict[str, list[float]] = {}
        for i, score in enumerate(scores):
            if not isinstance(score, Mapping):
                continue
            if "score" not in score:
                raise RewardError(
                    f"{self._returned(score, i)}: give it an entry score, the number that is learned from."
                )
            for name, value in score.items():
                if name == "score":
                    continue
                if (column := columns.get(name)) is None and isinstance(name, str):
                    column = columns[name] = [math.nan] * len(scores)
                if type(value) is float and column is not None:  # nearly all are
                    column[i] = value
                    continue
                if column is None or not (value is None or _is_number(value)):
                    raise RewardError(
                        f"{self._returned(score, i)}: {name!r} is {show(value, 40)}, and must be a number that has a "
                        "name."
                    )
                column[i] = _number(value)
        return {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}

    def _returned(self, score: object, i: int) -> str:
        return f"The reward function {self.name} returned {show(score)} for completion {i}"


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


def name_of(source: object) -> str:
    """Returns the name of a function, also within partials, or of an object's class."""
    while isinstance(source, functools.partial):
        source = source.func
    return str(getattr(source, "__name__", type(source).__name__))


def wait_for(awaitable: Awaitable[Any]) -> Any:
    """Waits for what an ``async def`` returns, on one event loop in a thread of its own.

    The loop stays, so that sessions and clients that a function keeps work in the next batch too; and it runs where the
    caller's thread has a loop already, as in a notebook.
    """
    loop = _loop(os.getpid())

    async def main() -> Any:
        try:
            return await awaitable
        except (SystemExit, KeyboardInterrupt) as error:  # either ends the loop, and then nobody would hear of it
            raise RuntimeError(f"it raised {type(error).__name__}: {error}") from error

    future = asyncio.run_coroutine_threadsafe(main(), loop)
    try:
        return future.result()
    finally:
        future.cancel()  # Ctrl-C


@functools.lru_cache(1)
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """The event loop of a process; a fork has no threads, so it gets another."""
    loop = asyncio.new_event_loop()
    loop.set_task_factory(partial(_guarded_task, process))
    loop.set_default_executor(_GuardedThreads())
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop


class _Guarded(Coroutine[Any, Any, Any]):
    """A coroutine that ends a fork of its process where it would go back to the loop.

    The loop of a fork would do all the other work that waits a second time, on the sockets and selector of its parent.
    """

    def __init__(self, process: int, inner: Coroutine[Any, Any, Any]) -> None:
        self.process, self.inner = process, inner

    def send(self, value: Any) -> Any:
        """As a coroutine's."""
        try:
            return self.inner.send(value)
        finally:
            end_if_forked(self.process)

    def throw(self, *error: Any) -> Any:
        """As a coroutine's."""
        try:
            return self.inner.throw(*error)
        finally:
            end_if_forked(self.process)

    def close(self) -> None:
        """As a coroutine's."""
        self.inner.close()

    def __await__(self) -> Any:
        return self.inner.__await__()


def _guarded_task(process: int, loop: Any, inner: Any, **options: Any) -> Any:
    return asyncio.Task(_Guarded(process, inner), loop=loop, **options)


class _GuardedThreads(ThreadPoolExecutor):
    """The threads of ``asyncio.to_thread``: a fork that a call leaves would wait for work for ever."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **options: Any) -> Future[Any]:
        """As its base."""
        return super().submit(_alone, fn, *args, **options)


def _alone(function: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    with one_process():
        return function(*args, **options)


def _is_number(value: Any) -> bool:
    return not isinstance(value, (str, bytes)) and hasattr(value, "__float__") and getattr(value, "ndim", 0) == 0


def _number(score: Any) -> float:
    """NaN for what is none."""
    try:
        return math.nan if isinstance(score, (str, bytes)) else float(score)
    except (TypeError, ValueError, OverflowError):
        return math.nan
