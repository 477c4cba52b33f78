"""How verifiers judge single completions in workers, and what they say of themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlhf.rewards import workers
from lightning_rlhf.rewards.base import RewardError
from lightning_rlhf.utils.text import show

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
        RewardError: ``timeout`` or ``failed_score`` is no number; or what ``score`` raises.
    """
    check_number(who, "timeout", timeout, "a number of seconds above 0", lambda value: 0 < value < 1e6)
    check_failed_score(who, failed_score)
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
    """Refuses an option that is not the number that is wanted.

    Raises:
        RewardError: The message says what to give.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not right(value):
        raise bad_option(who, name, value, wanted)


def check_flag(who: str, name: str, value: Any) -> None:
    """Refuses an option that is neither true nor false.

    Raises:
        RewardError: The message says what to give.
    """
    if not isinstance(value, bool):
        raise bad_option(who, name, value, "true or false")


def check_failed_score(who: str, value: Any) -> None:
    """Refuses an option ``failed_score`` that is neither a number nor None.

    Raises:
        RewardError: The message says what to give.
    """
    if value is not None:
        check_number(who, "failed_score", value, "a finite number, or null", math.isfinite)


def bad_option(who: str, name: str, value: Any, wanted: str) -> RewardError:
    """Returns the error for an option of a wrong value, which says what is wanted."""
    if is_column(value):
        return RewardError(f"{who}: the data have a column {name}: rename it, or give {wanted} as the option {name}.")
    return RewardError(f"{who}: the option {name} is {show(value, 60)}: give {wanted}.")


def bad_value(who: str, name: str, of_column: bool, value: Any, why: object) -> RewardError:
    """Returns the error for a value of a column, or of the option that takes its place."""
    where = f"the column {name} has" if of_column else f"the option {name} is"
    return RewardError(f"{who}: {where} {show(value, 60)}: {why}")


def is_column(value: Any) -> bool:
    """Returns whether an argument is a column of the data, and not an option."""
    return isinstance(value, list | tuple)


def each(
    who: str, name: str, value: Any, completions: Sequence[str], read: Callable[[Any], Any] = lambda value: value
) -> list[Any]:
    """Reads a column, or the one value of an option, which is for all completions.

    Args:
        who: The verifier's name, for messages.
        name: The argument's name.
        value: The column's values, or the option's value.
        completions: (S,) texts. The value of an option is read even if there are none.
        read: Reads a value that is not None. Its ValueError says what is wrong with it.

    Returns:
        (S,) what was read; None where there is no value.

    Raises:
        RewardError: A value can't be read; the message says whether it is the option or one of the column. Or a list
            has another length, which only an option can have.
    """
    column = is_column(value)
    if column and len(value) != len(completions):
        count = f" for {len(completions)} completions" if completions else ""
        raise RewardError(
            f"{who}: {name} is a list of {len(value)}{count}: as an option, give one value for all of them, and a list "
            "as JSON."
        )

    def checked(one: Any) -> Any:
        try:
            return None if one is None else read(one)
        except ValueError as error:
            raise bad_value(who, name, column, one, error) from None

    return [checked(one) for one in value] if column else [checked(value)] * len(completions)


def verifier(explain: Callable[..., str] | None = None) -> Callable[[Function], Function]:
    """Marks a function that checks its options even if it gets no completions: with ``checks_options``.

    A reward of such a function refuses a wrong option when it is made, before anything is sampled.

    Args:
        explain: Gives it the attribute ``explain``, by which ``lightning-rlhf verify`` says what it read. It gets
            ``completion``, and the columns and options that it names; it returns a line.
    """

    def mark(function: Function) -> Function:
        function.checks_options = True  # type: ignore[attr-defined]
        if explain is not None:
            function.explain = explain  # type: ignore[attr-defined]
        return function

    return mark
