"""Drops rows whose texts repeat themselves, as models do that don't find their end."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.cleaning.filters.base import Filter

_N = 4
_LETTERS = re.compile(r"([^\W\d_])\1{19}")


@dataclass(frozen=True)
class Repetition(Filter):
    """Drops rows whose texts repeat themselves, and answers that only repeat the instruction.

    Args:
        least: Least share of different runs of four tokens among all such runs of a text. A larger value drops more.
        min_tokens: Shorter texts are not looked at.
    """

    least: float = 0.5
    min_tokens: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise ValueError(f"Repetition: least is {self.least}. Give a share between 0 and 1.")

    def __call__(self, example: Example) -> str | None:
        """Looks at the instruction and at every answer."""
        if any(map(_LETTERS.search, (*example.questions, *example.answers))):
            return "one letter many times"
        if self._repeats(example.instruction_tokens):
            return "instruction repeats itself"
        if any(map(self._repeats, example.answer_tokens)):
            return "answer repeats itself"
        asked = example.instruction_tokens
        if example.kind == "instruction" and len(asked) >= self.min_tokens and asked in example.answer_tokens:
            return "answer repeats the instruction"
        return None

    def _repeats(self, tokens: Sequence[str]) -> bool:
        if len(tokens) < self.min_tokens:
            return False
        runs = list(zip(*(tokens[i:] for i in range(_N)), strict=False))
        return len(set(runs)) < self.least * len(runs)
