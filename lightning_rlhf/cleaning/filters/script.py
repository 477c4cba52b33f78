"""Drops rows in another language than they should be in, and rows of broken characters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.cleaning.filters.base import Filter

#: The replacement character, private use, and control characters other than white space.
_BROKEN = re.compile("[\ufffd\ue000-\uf8ff\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")


@dataclass(frozen=True)
class Script(Filter):
    """Drops rows whose instruction is in another language than the row says, or than you want.

    Texts without letters pass, as does a row without the column ``lang`` if no languages are given. Rows with
    characters that come of a wrong decoding are dropped too.

    Args:
        languages: Languages to keep, as codes such as ``en`` and ``zh``. Default: all.
    """

    languages: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.languages, str) or (self.languages is not None and not self.languages):
            raise ValueError(f"Script: languages is {self.languages!r}. Give a list of codes, such as [en, zh].")

    def __call__(self, example: Example) -> str | None:
        """Compares the language of the instruction with the wanted ones."""
        if any(_BROKEN.search(text) for text in (*example.questions, *example.answers)):
            return "broken characters"
        if self.languages is None and not example.declared:
            return None
        found = example.language
        if not found:
            return None
        example.notes["language"] = found
        if self.languages is not None and found not in self.languages:
            return f"instruction in {found}"
        if example.declared and found != example.declared:
            return f"instruction in {found}, not {example.declared}"
        return None
