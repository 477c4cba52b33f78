"""Texts made fit to be shown, tokenized and sent."""

from __future__ import annotations

import re

#: Half of a surrogate pair, which JSON can spell, and neither UTF-8 nor a tokenizer can take.
SURROGATE = re.compile("[\ud800-\udfff]")


def replace_surrogates(text: str) -> str:
    r"""A text with U+FFFD in the place of halves of surrogate pairs.

    Example:
        >>> replace_surrogates("a\ud800b")
        'a\ufffdb'
    """
    return SURROGATE.sub("\ufffd", text)


def shorten(text: str, limit: int, count: bool = False) -> str:
    """A text, or its beginning if it is longer than ``limit`` characters.

    Args:
        text: The text.
        limit: Maximum number of characters.
        count: Say behind the beginning how many characters the whole text has; they are not counted in ``limit``.

    Example:
        >>> shorten("a quick brown fox", 8), shorten("a fox", 8)
        ('a quick…', 'a fox')
        >>> shorten("a quick brown fox", 8, count=True)
        'a quick … (17 characters)'
    """
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text):,} characters)" if count else f"{text[: limit - 1]}…"


def one_line(text: str, limit: int) -> str:
    """A text in one line of at most ``limit`` characters.

    Example:
        >>> one_line("a quick   brown fox", 12)
        'a quick bro…'
    """
    return shorten(" ".join(text.split()), limit)


def show(value: object, limit: int = 200) -> str:
    """The repr of a value in at most ``limit`` characters.

    Example:
        >>> show("a quick brown fox", 12)
        "'a quick br…"
    """
    return shorten(repr(value), limit)
