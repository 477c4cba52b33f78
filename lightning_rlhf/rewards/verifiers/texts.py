"""Verifiers of texts: numbers, exact answers, patterns, repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation, Overflow, localcontext

import regex as expressions  # type: ignore[import-untyped]  # its searches can have a time limit
from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlhf.rewards.functions import marked_answer

#: Full-width forms, as Chinese texts have them, and the minus sign.
_ASCII = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {0x2212: ord("-")}
#: Seconds that a search may take.
_SECONDS = 1
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


def number(
    prompts: Sequence[object], completions: Sequence[str], answer: Sequence[object], tolerance: float = 0.0
) -> list[float | None]:
    """1 where the number that a completion ends in is the one in the column ``answer``, otherwise 0.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts.
        answer: (S,) numbers, or texts that hold one, such as GSM8K's.
        tolerance: Largest relative difference that counts as equal. A larger value is more lenient.

    Returns:
        (S,) scores; None where there is no answer.

    Raises:
        ValueError: An answer holds no number.

    Example:
        >>> number([""] * 3, ["So 1,000.", "So 12 or 13.", "?"], [1000, 12, None])
        [1.0, 0.0, None]
    """
    scores: list[float | None] = []
    for text, given in zip(completions, answer, strict=True):
        if given is None:
            scores.append(None)
            continue
        want, found = _decimal(read_number(str(given))), _decimal(read_number(text))
        if want is None:
            raise ValueError(f"number: the column answer has {str(given)[:60]!r}, in which there is no number.")
        with localcontext() as context:
            context.traps[Overflow] = False  # a completion may write 1e999999999
            near = found is not None and abs(found - want) <= Decimal(str(tolerance)) * abs(want)
        scores.append(float(near))
    return scores


def exact(prompts: Sequence[object], completions: Sequence[str], answer: Sequence[object]) -> list[float | None]:
    """1 where a completion is the text in the column ``answer``, but for blanks around both, otherwise 0.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts.
        answer: (S,) texts.

    Returns:
        (S,) scores; None where there is no answer.

    Example:
        >>> exact([""] * 3, [" yes", "Yes", "no"], ["yes", "yes", None])
        [1.0, 0.0, None]
    """
    each = zip(completions, answer, strict=True)
    return [None if want is None else float(text.strip() == str(want).strip()) for text, want in each]


def regex(prompts: Sequence[object], completions: Sequence[str], pattern: Sequence[str | None]) -> list[float | None]:
    r"""1 where the regular expression in the column ``pattern`` is found in a completion, otherwise 0.

    For an expression that must match all of a completion, and for one expression for all rows, there is
    ``lightning_rlhf.rewards.functions.format_match``.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts.
        pattern: (S,) expressions; a dot matches line breaks too.

    Returns:
        (S,) scores; None where there is no pattern. 0, with a warning, where the search takes more than a second.

    Raises:
        ValueError: An expression is none.

    Example:
        >>> regex([""] * 3, ["a cat sat", "dogs", "?"], [r"\bcat\b", r"\bcat\b", None])
        [1.0, 0.0, None]
    """
    scores: list[float | None] = []
    for text, wanted in zip(completions, pattern, strict=True):
        if not isinstance(wanted, str | None):
            raise ValueError(f"regex: the column pattern has {wanted!r}: give a regular expression, as a text.")
        try:
            found = wanted is not None and expressions.search(wanted, text, expressions.DOTALL, timeout=_SECONDS)
        except expressions.error as error:
            raise ValueError(f"regex: the column pattern has {wanted!r}, which is no expression: {error}.") from None
        except TimeoutError:
            rank_zero_warn(
                f"regex: searching {wanted!r} took more than {_SECONDS} s in a completion, which scores 0. Rewrite the "
                "expression: repeats within repeats try every way to divide a text."
            )
            found = None
        scores.append(None if wanted is None else float(bool(found)))
    return scores


def repetition(prompts: Sequence[object], completions: Sequence[str], size: int = 3) -> list[float]:
    """Minus the share of a completion's n-grams that occurred in it before: 0 if none is repeated.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts; those without blanks are read by characters, others by words.
        size: Words of an n-gram. A smaller value finds more repetition.

    Returns:
        (S,) scores from -1 to 0.

    Example:
        >>> repetition([""] * 2, ["a b c d e", "go on go on go on"], size=2)
        [0.0, -0.6]
    """
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
