"""Drops rows whose texts are too short or too long."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.cleaning.filters.base import Filter


@dataclass(frozen=True)
class Length(Filter):
    """Drops rows whose texts are too short or too long, in words and single Chinese characters.

    Args:
        min_instruction: Fewest tokens of all user turns together.
        max_instruction: Most tokens of all user turns together.
        min_answer: Fewest tokens of every answer. Above 1 it drops right answers such as "Paris".
        max_answer: Most tokens of every answer.
    """

    min_instruction: int = 1
    max_instruction: int = 8192
    min_answer: int = 1
    max_answer: int = 8192

    def __post_init__(self) -> None:
        for name in ("instruction", "answer"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if not 0 <= least <= most:
                raise ValueError(f"Length: min_{name} is {least} and max_{name} {most}. Make it 0 <= min <= max.")

    def __call__(self, example: Example) -> str | None:
        """The first text that is too short or too long."""
        if fault := self._fault(len(example.instruction_tokens), self.min_instruction, self.max_instruction):
            return f"instruction too {fault}"
        for tokens, text in zip(example.answer_tokens, example.answers, strict=True):
            short = len(tokens) < self.min_answer and not (self.min_answer == 1 and text.strip())  # "+" is an answer
            if fault := "short" if short else self._fault(len(tokens), 0, self.max_answer):
                return f"answer too {fault}"
        return None

    def _fault(self, count: int, least: int, most: int) -> str:
        return "short" if count < least else "long" if count > most else ""
