"""Drops rows whose instruction is nearly the same as that of a row before."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.cleaning.filters.base import Measuring
from lightning_rlhf.cleaning.near_duplicates import NearDuplicates, Sketch, sketch


class Sketched(Measuring[Sketch]):
    """Base of filters that sketch instructions."""

    def measure(self, examples: Sequence[Example]) -> list[Sketch]:
        """Sketches the instructions."""
        return sketch([example.instruction_tokens for example in examples])


class NearDuplicate(Sketched):
    """Drops rows whose user turns are nearly the same as those of a row before, which was kept.

    A single answer with a label is dropped only if its answer is nearly the same too, because a prompt may have several
    answers.

    Two texts are compared by their words (in Chinese: characters) and pairs of neighboring ones, without case, width,
    white space and punctuation. It drops no row that is like a dropped one but not like a kept one. System prompts and
    other answers don't count.

    Args:
        threshold: Least Jaccard similarity of near duplicates. A smaller value drops more.
    """

    remembers = True

    def __init__(self, threshold: float = 0.8) -> None:
        super().__init__()
        self.threshold = threshold
        self._index = NearDuplicates(threshold)

    def measure(self, examples: Sequence[Example]) -> list[Sketch]:
        """Sketches the user turns, and for single answers with labels the answer too."""
        return sketch([example.distinct_tokens for example in examples])

    def __call__(self, example: Example) -> str | None:
        """Looks for a near duplicate among the rows that were kept."""
        found = self._index.find(self.measured(example))
        if found is None:
            return None
        example.notes["near_duplicate"] = f"{found.similarity:.2f} of row {found.number + 1} that was kept"
        return "near duplicate"

    def add(self, example: Example) -> None:
        """Remembers the row, with the text that it was compared by."""
        self._index.add(self.last_measured(example))
