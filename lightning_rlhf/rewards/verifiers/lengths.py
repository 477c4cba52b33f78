"""The verifier of length."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.rewards.verifiers.constraints import count_words
from lightning_rlhf.rewards.verifiers.judging import each, explained_by

UNITS = ("characters", "words", "tokens")


def _explain(completion: str, unit: str = "characters") -> str:
    if unit == "tokens":
        return "tokens are known in a run only"
    return f"{_measure(completion, (), unit)} {unit}"


@explained_by(_explain)
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
        ValueError: Limits other than ``1 <= low <= high``, or another unit.

    Example:
        >>> length([""] * 4, ["", "five!", "ten chars!", "fifteen chars.."], low=10, high=10)
        [0.0, 0.5, 1.0, 0.5]
        >>> length([""], ["two words"], high=2, unit="words")
        [1.0]
    """
    if unit not in UNITS or (unit == "tokens" and completion_ids is None):
        raise ValueError(f"length: unit is {unit!r}: give {', '.join(UNITS)}; tokens are known in a run only.")
    ids: Sequence[Sequence[int]] = completion_ids or [()] * len(completions)
    scores: list[float | None] = []
    lows, highs = each("length", "low", low, completions), each("length", "high", high, completions)
    for text, tokens, least, most in zip(completions, ids, lows, highs, strict=True):
        if (least is None and low is not None) or (most is None and high is not None):
            scores.append(None)
            continue
        if not all(isinstance(limit, int | float) for limit in (least, most)) or not 1 <= least <= most:
            raise ValueError(f"length needs 1 <= low <= high, got low={least!r} and high={most!r}.")
        size = _measure(text, tokens, unit)
        scores.append(min(1.0, size / least, max(0.0, 2 - size / most)))
    return scores


def _measure(text: str, tokens: Sequence[int], unit: str) -> int:
    return len(text) if unit == "characters" else count_words(text) if unit == "words" else len(tokens)
