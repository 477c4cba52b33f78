"""The verifier of length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_rlhf.rewards.base import RewardError
from lightning_rlhf.rewards.verifiers.constraints import count_words
from lightning_rlhf.rewards.verifiers.judging import bad_option, check_number, each, is_column, verifier

UNITS = ("characters", "words", "tokens")


def _explain(completion: str, unit: str = "characters") -> str:
    if unit == "tokens":
        return "tokens are known in a run only"
    return f"{_measure(completion, (), unit)} {unit}"


@verifier(_explain)
def length(
    prompts: Sequence[object],
    completions: Sequence[str],
    low: int | Sequence[int | None] = 1,
    high: int | Sequence[int | None] = 1000,
    unit: str = "characters",
    completion_ids: Sequence[Sequence[int]] | None = None,
) -> list[float | None]:
    """1 from ``low`` to ``high``, falling in a straight line to 0 at none and at twice ``high``.

    A target is a window with ``low`` and ``high`` alike.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts.
        low: The least; an option, or a column of (S,).
        high: The most; an option, or a column of (S,).
        unit: ``characters``; ``words``, where a Chinese character is one; or ``tokens``, of the policy, with the stop
            token.
        completion_ids: (S,) tokens.

    Returns:
        (S,) scores; None where a column has no limit.

    Raises:
        RewardError: Limits other than ``1 <= low <= high``, or another unit.

    Example:
        >>> length([""] * 4, ["", "five!", "ten chars!", "fifteen chars.."], low=10, high=10)
        [0.0, 0.5, 1.0, 0.5]
        >>> length([""], ["two words"], high=2, unit="words")
        [1.0]
    """
    if unit not in UNITS:
        raise bad_option("length", "unit", unit, ", ".join(UNITS[:-1]) + f" or {UNITS[-1]}")
    if unit == "tokens" and completion_ids is None:
        raise RewardError("length: the option unit is 'tokens', and tokens are known in a run only.")
    for name, limit in (("low", low), ("high", high)):
        if not is_column(limit):
            check_number("length", name, limit, "a number, 1 or more", lambda value: value >= 1)
    ids: Sequence[Sequence[int]] = completion_ids or [()] * len(completions)
    scores: list[float | None] = []
    lows = each("length", "low", low, completions, _read_limit)
    highs = each("length", "high", high, completions, _read_limit)
    if not is_column(low) and not is_column(high):
        _check_order(low, high)
    for text, tokens, least, most in zip(completions, ids, lows, highs, strict=True):
        if least is None or most is None:
            scores.append(None)
            continue
        _check_order(least, most)
        size = _measure(text, tokens, unit)
        scores.append(min(1.0, size / least, max(0.0, 2 - size / most)))
    return scores


def _read_limit(given: object) -> float:
    if not isinstance(given, int | float) or not given >= 1:
        raise ValueError("give a number, 1 or more.")
    return given


def _check_order(low: Any, high: Any) -> None:
    if low > high:
        raise RewardError(f"length: low is {low}, and high is {high}: give a high that is low or more.")


def _measure(text: str, tokens: Sequence[int], unit: str) -> int:
    return len(text) if unit == "characters" else count_words(text) if unit == "words" else len(tokens)
