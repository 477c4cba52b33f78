"""How verifiers judge single completions in workers, and what they say of themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlhf.rewards import workers

Function = TypeVar("Function", bound=Callable[..., Any])
#: A number; None where a verifier does not apply; or with the fault for which a completion could not be judged.
Score = float | dict[str, float | None] | None


def judge(
    who: str,
    job: str,
    tasks: Sequence[Sequence[Any] | None],
    score: Callable[[Any], Score],
    timeout: float,
    failed_score: float | None,
    wall: float | None = None,
) -> list[Score]:
    """Runs a job for each completion, and makes scores of what it returns.

    Args:
        who: The verifier's name, for messages.
        job: See :meth:`~lightning_rlhf.rewards.workers.Workers.run`.
        tasks: Arguments for each completion; None where the verifier does not apply.
        score: Makes a score of what the job returned.
        timeout: CPU seconds for a completion.
        failed_score: Score of a completion that could not be judged in time, or whose process died.
        wall: Seconds by the clock; None: ten times as many.

    Raises:
        ValueError: ``timeout`` or ``failed_score`` is no number; or what ``score`` raises.
    """
    check_number(who, "timeout", timeout, "a number of seconds above 0", lambda value: 0 < value < 1e6)
    if failed_score is not None:
        check_number(who, "failed_score", failed_score, "a finite number, or null", math.isfinite)
    given = [task for task in tasks if task is not None]
    outcomes = iter(workers.run(job, given, timeout, wall) if given else ())
    scores: list[Score] = []
    for task in tasks:
        if task is None:
            scores.append(None)
            continue
        outcome = next(outcomes)
        if outcome.fault is None:
            scores.append(score(outcome.value))
        else:
            scores.append(failed(who, outcome.fault, outcome.why, failed_score))
    return scores


def failed(who: str, fault: str, why: str, failed_score: float | None) -> Score:
    """The score of a completion that could not be judged, after a warning."""
    counts = "does not count" if failed_score is None else f"scores {failed_score:g}"
    rank_zero_warn(f"{who}: a completion could not be judged, as {why}; it {counts}.")
    return {"score": failed_score, fault: 1.0}


def check_number(who: str, name: str, value: Any, wanted: str, right: Callable[[Any], bool]) -> None:
    """Refuses a setting that is no such number; a column of its name gives a list.

    Raises:
        ValueError: The message says what to give.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not right(value):
        raise ValueError(f"{who}: {name} is {str(value)[:60]}: give {wanted}, and no column of that name.")


def each(who: str, name: str, value: Any, completions: Sequence[str]) -> Sequence[Any]:
    """Returns a column as it is, and one value of an option for all completions.

    Raises:
        ValueError: A list of another length, which only an option can be; the message says what to give.
    """
    if not isinstance(value, list | tuple):
        return [value] * len(completions)
    if len(value) != len(completions):
        raise ValueError(
            f"{who}: {name} is a list of {len(value)} for {len(completions)} completions: as an option, give one value "
            "for all of them, and a list as JSON."
        )
    return value


def check_flag(who: str, name: str, value: Any) -> None:
    """Refuses a setting that is neither true nor false; a column of its name gives a list.

    Raises:
        ValueError: The message says what to give.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{who}: {name} is {str(value)[:60]}: give true or false, and no column of that name.")


def explained_by(explain: Callable[..., str]) -> Callable[[Function], Function]:
    """Gives a verifier the function by which ``lightning-rlhf verify`` says what it read: its attribute ``explain``.

    Args:
        explain: Gets ``completion``, and the columns and settings that it names; it returns a line.
    """

    def add(verifier: Function) -> Function:
        verifier.explain = explain  # type: ignore[attr-defined]
        return verifier

    return add
