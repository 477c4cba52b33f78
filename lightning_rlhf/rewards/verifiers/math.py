"""The verifier of mathematical answers."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.rewards import workers
from lightning_rlhf.rewards.verifiers.judging import Score, each, judge, verifier
from lightning_rlhf.utils.imports import require

_JOB = "lightning_rlhf.rewards.jobs.answers"


def _explain(completion: str, answer: object) -> str:
    outcome = workers.run(f"{_JOB}:explain", [(completion, str(answer))], 5.0)[0]
    return outcome.why or str(outcome.value)


@verifier(_explain)
def math(
    prompts: Sequence[object],
    completions: Sequence[str],
    answer: object,
    timeout: float = 5.0,
    failed_score: float | None = 0.0,
) -> list[Score]:
    r"""1 where a completion's answer equals the one in the column ``answer``, otherwise 0.

    The answer is the marked one (``\boxed{...}``, ``####``, ``Answer:``), as
    :func:`~lightning_rlhf.rewards.functions.answer_match` reads it, or otherwise what math-verify finds in the text.
    Two answers are equal if their texts or numbers are, or if math-verify says so: ``\frac{1}{2}`` and ``0.5``,
    ``(x+1)^2`` and ``x^2+2x+1``, ``[0, 1)`` and ``0 \le x < 1``. Alternatives, ``\boxed{4} or \boxed{5}``, are one
    answer and equal neither.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts.
        answer: Column of (S,) numbers, LaTeX or other texts, marked or not; or one as an option.
        timeout: CPU seconds for a completion.
        failed_score: Score of a completion that could not be judged in time; None leaves it out.

    Returns:
        (S,) scores; None where there is no answer.

    Raises:
        ImportError: The package math-verify is missing.
        RewardError: An answer is empty, or an option is wrong.

    Source:
        https://github.com/huggingface/Math-Verify, without its time limit, which works in main threads alone.
    """
    require("math_verify", "The verifier math", "verify")
    pairs = zip(completions, each("math", "answer", answer, completions, _read_answer), strict=True)
    tasks = [None if want is None else (text, want) for text, want in pairs]
    return judge("math", f"{_JOB}:equal", tasks, float, timeout, failed_score)


def _read_answer(given: object) -> str:
    if not (answer := str(given)).strip():
        raise ValueError("it is empty. Give an answer, or null where there is none.")
    return answer
