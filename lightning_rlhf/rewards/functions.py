"""A reward function that reads marked answers. More are in :mod:`lightning_rlhf.rewards.verifiers`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation


def answer_match(prompts: Sequence[object], completions: Sequence[str], answer: Sequence[object]) -> list[float]:
    r"""1 where a completion's answer is the one in the column ``answer``, else 0.

    The answer is what the last ``\boxed{...}`` holds, with the braces inside it, or else follows the last ``####`` or
    ``Answer:`` on its line, or else is all of the text; so too in the column, where GSM8K keeps its reasoning.
    Alternatives, such as ``\boxed{4} or \boxed{5}``, are one answer, "4 or 5", and match neither of the two. Numbers
    are compared as numbers (``1,000.0`` is ``1000``), other answers without regard to case, blanks and a full stop
    behind.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts.
        answer: (S,) texts or numbers.

    Returns:
        (S,) scores.

    Example:
        >>> answer_match([""] * 3, ["2 + 2 is 4.\n#### 4.0", "Answer: five", "I can't say."], answer=[4, "Five.", "5"])
        [1.0, 1.0, 0.0]
    """
    each = zip(completions, answer, strict=True)
    return [float(_canonical(marked_answer(text)) == _canonical(marked_answer(str(wanted)))) for text, wanted in each]


#: Words between two answers that make them alternatives, at a line's end too.
_OR = r"(?:\band/or\b|\bor\b|\band\b|或者?|还是|和)"
#: What else may stand between them: a mark on the same line.
_BESIDE = re.compile(rf"[\s,;，；]*{_OR}[\s,:]*(?:maybe|perhaps|possibly)?\s*|[ \t,;/、，；]*", re.IGNORECASE)
#: How LaTeX and Markdown dress it.
_DRESS = re.compile(r"\\text|\\q?quad|\\[,;! ]|[{}$*()]")
_BLANKS = re.compile(r"[^\S\n]+")
_MARK = re.compile(r"(?:####|\banswer:|答案[：:])[ \t]*([^\n]+)", re.IGNORECASE)
_OR_LAST = re.compile(rf"{_OR}\Z", re.IGNORECASE)


def marked_answer(text: str) -> str:
    r"""The answer that a text marks, as :func:`answer_match` reads it; all of the text if it marks none.

    Its time grows with the text's length alone, whatever the text: a completion can't make it hang.

    Example:
        >>> marked_answer(r"It is \boxed{4}."), marked_answer("2 + 2\n#### 4"), marked_answer("4")
        ('4', '4', '4')
    """
    parts: list[str | slice] = [text]
    end = -1
    for start, stop, inner, inner_end in _boxed(text) or _marked(text):
        between = text[end:start] if 0 <= end <= start <= end + 10_000 else "no"
        between = _BLANKS.sub(" ", _DRESS.sub(" ", between))
        content = slice(inner, inner_end)
        if _BESIDE.fullmatch(between):
            parts += between, content
        else:
            parts = [content]
        end = stop
    return "".join(text[part] if isinstance(part, slice) else part for part in parts)


def _marked(text: str) -> list[tuple[int, int, int, int]]:
    """Where each marked answer starts and ends, and its content: the rest of the line, but for an "or" at its end."""
    found = []
    for mark in _MARK.finditer(text):
        content = mark[1].rstrip(" \t")
        alone = _OR_LAST.search(content)
        content = (content[: alone.start()].rstrip(" \t") if alone else "") or content
        end = mark.start(1) + len(content)
        found.append((mark.start(), end, mark.start(1), end))
    return found


def _boxed(text: str) -> list[tuple[int, int, int, int]]:
    r"""Where each ``\boxed{...}`` whose braces close starts and ends, and its content, in the order of the starts."""
    found: list[tuple[int, int, int, int]] = []
    opened: list[tuple[int, int] | None] = []
    for mark in re.finditer(r"\\boxed\s*\{|\\(?!\\boxed).|[{}]", text):
        if mark[0] == "}":
            box = opened.pop() if opened else None
            if box is not None:
                found.append((box[0], mark.end(), box[1], mark.start()))
        elif mark[0][-1] == "{" and mark[0] != "\\{":
            opened.append(mark.span() if mark[0] != "{" else None)
    return sorted(found)


def _canonical(answer: str) -> str | Decimal:
    answer = " ".join(answer.split()).casefold().rstrip(".。").strip("$ ")
    try:
        number = Decimal(re.sub(r"(?<=\d),(?=\d{3})", "", answer))
    except InvalidOperation:
        return answer
    return number if number.is_finite() else answer
