"""Verifiers of texts: numbers, exact answers, patterns, repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation, Overflow, localcontext

from lightning_rlhf.rewards import workers
from lightning_rlhf.rewards.functions import marked_answer
from lightning_rlhf.rewards.verifiers.judging import Score, check_flag, check_number, each, judge, verifier

#: Full-width forms, as Chinese texts have them, and the minus sign.
_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: ord("-")}
_SEARCH = "lightning_rlhf.rewards.jobs.texts:search"
_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?!\w)", re.ASCII)


def read_number(text: str) -> str:
    r"""Reads what :func:`number` compares: the last number of the marked answer, otherwise of the text; "" if none.

    An answer is marked by ``\boxed{...}``, ``####``, ``Answer:`` or ``答案：``. Full-width digits and signs are read
    too. A number may touch Chinese characters, but no Latin letters.

    Example:
        >>> read_number("2 and 3 make\n#### 1,005"), read_number("It is 4, not 5. So 4.0!"), read_number("?")
        ('1,005', '4.0', '')
        >>> read_number("一共有7个苹果。"), read_number("等于１，000元")
        ('7', '1,000')
    """
    found = _NUMBER.findall(marked_answer(text).translate(_ASCII))
    return found[-1] if found else ""


@verifier(lambda completion: read_number(completion) or "no number")
def number(
    prompts: Sequence[object], completions: Sequence[str], answer: object, tolerance: float = 0.0
) -> list[float | None]:
    """1 where the number that a completion ends in is the one in the column ``answer``, otherwise 0.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts.
        answer: Column of (S,) numbers, or texts that hold one, such as GSM8K's; or one as an option.
        tolerance: Largest relative difference that counts as equal. A larger value is more lenient.

    Returns:
        (S,) scores; None where there is no answer.

    Raises:
        RewardError: An answer holds no number, or ``tolerance`` is no number.

    Example:
        >>> number([""] * 3, ["So 1,000.", "So 12 or 13.", "?"], [1000, 12, None])
        [1.0, 0.0, None]
    """
    check_number("number", "tolerance", tolerance, "a number, 0 or more", lambda value: 0 <= value < float("inf"))
    scores: list[float | None] = []
    for text, want in zip(completions, each("number", "answer", answer, completions, _read_answer), strict=True):
        if want is None:
            scores.append(None)
            continue
        found = _decimal(read_number(text))
        with localcontext() as context:
            context.traps[Overflow] = False  # a completion may write 1e999999999
            near = found is not None and abs(found - want) <= Decimal(str(tolerance)) * abs(want)
        scores.append(float(near))
    return scores


def _read_answer(given: object) -> Decimal:
    found = _decimal(read_number(str(given)))
    if found is None:
        raise ValueError("there is no number in it.")
    return found


@verifier()
def exact(prompts: Sequence[object], completions: Sequence[str], answer: object) -> list[float | None]:
    """1 where a completion is the text in the column ``answer``, but for blanks around both, otherwise 0.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts.
        answer: Column of (S,) texts, or one as an option.

    Returns:
        (S,) scores; None where there is no answer.

    Example:
        >>> exact([""] * 3, [" yes", "Yes", "no"], ["yes", "yes", None])
        [1.0, 0.0, None]
    """
    pairs = zip(completions, each("exact", "answer", answer, completions), strict=True)
    return [None if want is None else float(text.strip() == str(want).strip()) for text, want in pairs]


def _explain_regex(completion: str, pattern: str, whole: bool = False) -> str:
    outcome = workers.run(_SEARCH, [(completion, pattern, whole)], 5.0)[0]
    return outcome.why or ("no match" if outcome.value is None else repr(outcome.value))


@verifier(_explain_regex)
def regex(
    prompts: Sequence[object],
    completions: Sequence[str],
    pattern: str | Sequence[str | None],
    whole: bool = False,
    timeout: float = 1.0,
    failed_score: float | None = 0.0,
) -> list[Score]:
    r"""1 where a regular expression is found in a completion, otherwise 0.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts.
        pattern: Column of (S,) expressions, or one as an option; a dot matches line breaks too.
        whole: It must match all of the completion, but for blanks around it.
        timeout: CPU seconds for a completion.
        failed_score: Score of a completion in which the search took longer; None leaves it out.

    Returns:
        (S,) scores; None where there is no pattern.

    Raises:
        RewardError: An expression can't be read, or an option is wrong.

    Example:
        >>> regex([""] * 3, ["a cat sat", "dogs", "?"], [r"\bcat\b", r"\bcat\b", None])
        [1.0, 0.0, None]
        >>> regex(["", ""], ["<think>so</think> 4", "4"], "<think>.*</think>.+", whole=True)
        [1.0, 0.0]
    """
    check_flag("regex", "whole", whole)
    pairs = zip(completions, each("regex", "pattern", pattern, completions, _read_pattern), strict=True)
    tasks = [None if wanted is None else (text, wanted, whole) for text, wanted in pairs]
    return judge("regex", _SEARCH, tasks, lambda found: float(found is not None), timeout, failed_score)


def _read_pattern(given: object) -> str:
    if not isinstance(given, str):
        raise ValueError("give a regular expression, as a text.")
    try:
        re.compile(given)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no regular expression: {error}.") from None
    return given


@verifier()
def repetition(prompts: Sequence[object], completions: Sequence[str], size: int = 3) -> list[float]:
    """Minus the share of a completion's n-grams that occurred in it before: 0 if none is repeated.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts; those without blanks are read by characters, others by words.
        size: Words of an n-gram. A smaller value finds more repetition.

    Returns:
        (S,) scores from -1 to 0.

    Raises:
        RewardError: ``size`` is no whole number above 0.

    Example:
        >>> repetition([""] * 2, ["a b c d e", "go on go on go on"], size=2)
        [0.0, -0.6]
    """
    right = "a whole number of words, 1 or more"
    check_number("repetition", "size", size, right, lambda value: isinstance(value, int) and value >= 1)
    scores = []
    for text in completions:
        words: Sequence[str] = text.split() if len(text.split()) > 1 else text.strip()
        grams = [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
        scores.append(len(set(grams)) / len(grams) - 1.0 if grams else 0.0)
    return scores


def _decimal(text: str) -> Decimal | None:
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
