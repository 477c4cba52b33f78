"""The verifier of programs."""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.rewards import workers
from lightning_rlhf.rewards.base import RewardError
from lightning_rlhf.rewards.verifiers.judging import (
    Score,
    check_failed_score,
    check_flag,
    check_number,
    each,
    judge,
    verifier,
)
from lightning_rlhf.utils.text import show

_JOB = "lightning_rlhf.rewards.jobs.programs"
#: Seconds over ``timeout`` in which the worker ends programs itself.
_GRACE = 30.0


def _explain(completion: str, tests: object, timeout: float = 10.0, memory: int = 512, network: bool = False) -> str:
    if tests is None:
        return "no tests"
    task = (completion, read_tests(tests), timeout, memory, network, _isolates(network))
    outcome = workers.run(f"{_JOB}:judge", [task], timeout + _GRACE, timeout + _GRACE)[0]
    if outcome.fault is not None:
        return outcome.why
    passed = outcome.value["passed"]
    return f"{sum(passed)} of {len(passed)} tests passed" + (f"; {why}" if (why := outcome.value["why"]) else "")


@verifier(_explain)
def code(
    prompts: Sequence[object],
    completions: Sequence[str],
    tests: object,
    timeout: float = 10.0,
    memory: int = 512,
    network: bool = False,
    all_or_nothing: bool = False,
    failed_score: float | None = 0.0,
) -> list[Score]:
    """The share of the tests in the column ``tests`` that a completion's Python program passes.

    The program is the last fenced block, or all of the completion. See ``docs/verifiers.md`` for what it can do: this
    contains accidents, and is no sandbox.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts.
        tests: Column of (S,), or one as an option: Python source, of which each ``assert``, loop, ``with``, ``try``
            and call at the top is a test, or each function ``test_...``; a list of sources, each a test; or a list of
            ``{stdin: ..., stdout: ...}``; or JSON of a list.
        timeout: Seconds for all tests of a completion, by the clock.
        memory: MiB of address space of each process.
        network: Let programs use the network. Without it, programs are refused where they can't be cut off from it.
        all_or_nothing: 1 where all tests pass, otherwise 0.
        failed_score: Score of a completion that could not be judged: its tests did not start. None leaves it out.
            Tests that a program does not reach in time have failed.

    Returns:
        (S,) scores; None where there are no tests. A completion whose time was over has the entry ``timeout``.

    Raises:
        RewardError: Programs can't be cut off from the network here; or tests can't be read, or an option is wrong.
    """
    check_number("code", "timeout", timeout, "a number of seconds above 0", lambda value: 0 < value < 1e6)
    check_number("code", "memory", memory, "a number of MiB, 64 or more", lambda value: 64 <= value < 1e6)
    check_flag("code", "network", network)
    check_flag("code", "all_or_nothing", all_or_nothing)
    check_failed_score("code", failed_score)
    read = each("code", "tests", tests, completions, read_tests)
    if all(given is None for given in read):
        return [None] * len(read)
    settings = (timeout, int(memory), network, _isolates(network))
    tasks = [None if given is None else (text, given, *settings) for text, given in zip(completions, read, strict=True)]

    def score(value: dict[str, Any]) -> Score:
        passed = value["passed"]
        share = float(all(passed)) if all_or_nothing else sum(passed) / len(passed)
        return {"score": share, "timeout": 1.0} if value["timeout"] else share

    return judge("code", f"{_JOB}:judge", tasks, score, timeout + _GRACE, failed_score, wall=timeout + _GRACE)


def read_tests(given: object) -> dict[str, list[list[Any]]]:
    """Reads tests as :func:`code` takes them.

    Returns:
        ``cases``: pairs of standard input and output; or ``parts``: sources, and whether each counts as a test.

    Raises:
        ValueError: They can't be read.
    """
    if isinstance(given, str) and given.lstrip().startswith("["):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"no JSON ({error}).") from None
    if isinstance(given, str):
        return {"parts": _split(given)}
    if not isinstance(given, Sequence) or not given:
        raise ValueError("give Python source, a list of sources, or a list of {stdin: ..., stdout: ...}.")
    if all(isinstance(one, str) for one in given):
        for source in given:
            _parse(source)
        return {"parts": [[source, True] for source in given]}
    for one in given:
        if not isinstance(one, Mapping) or not all(isinstance(one.get(name), str) for name in ("stdin", "stdout")):
            raise ValueError(f"a test has stdin and stdout, which are texts, and one is {show(one, 60)}.")
    return {"cases": [[one["stdin"], one["stdout"]] for one in given]}


def _split(source: str) -> list[list[Any]]:
    """Top statements, and whether each counts as a test."""
    parts = []
    for node in _parse(source).body:
        asserts = any(isinstance(inner, ast.Assert) for inner in ast.walk(node))
        called = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        defines = isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        tests = isinstance(node, ast.FunctionDef) and node.name.startswith("test")
        parts.append([ast.unparse(node), tests or called or (asserts and not defines)])
    if not any(counts for _, counts in parts):
        raise ValueError("there is no test in it: no assert, no call, no function test_....")
    return parts


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"no Python ({error}).") from None


@functools.lru_cache
def _isolates(network: bool) -> bool:
    """Returns whether programs get namespaces here.

    Raises:
        RewardError: They don't, and the network is not allowed.
    """
    outcome = workers.run(f"{_JOB}:probe", [(network,)], _GRACE)[0]
    why = outcome.why or outcome.value
    if why and not network:
        raise RewardError(
            f"code: programs can't be cut off from the network and from files here ({why}). Run as a user who may make "
            "namespaces, or in a container without network, with the verifier's option network: true."
        )
    return not why
