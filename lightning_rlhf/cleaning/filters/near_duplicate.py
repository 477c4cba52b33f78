"""Drops rows whose instruction is nearly the same as that of a row before."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.cleaning.filters.base import Filter
from lightning_rlhf.cleaning.near_duplicates import NearDuplicates, Sketch, sketch


class Sketched(Filter):
    """Base of filters that sketch instructions, many at once."""

    def __init__(self) -> None:
        self._sketches: dict[int, tuple[Example, Sketch]] = {}  # with the example, so that no other gets its id

    def prepare(self, examples: Sequence[Example]) -> None:
        """Sketches the instructions."""
        made = sketch([example.instruction_tokens for example in examples])
        self._sketches = {id(example): (example, one) for example, one in zip(examples, made, strict=True)}

    def sketched(self, example: Example) -> Sketch:
        """The sketch of an instruction."""
        if id(example) not in self._sketches:
            self.prepare([example])
        return self._sketches[id(example)][1]


class NearDuplicate(Sketched):
    """Drops rows whose user turns are nearly the same as those of a row before, which was kept.

    Two texts are compared by their words (in Chinese: characters) and pairs of neighboring ones, without case, width,
    white space and punctuation. It drops no row that is like a dropped one but not like a kept one. System prompts and
    answers don't count.

    Args:
        threshold: Least Jaccard similarity of near duplicates. A smaller value drops more.
    """

    remembers = True

    def __init__(self, threshold: float = 0.8) -> None:
        super().__init__()
        self.threshold = threshold
        self._index = NearDuplicates(threshold)

    def __call__(self, example: Example) -> str | None:
        """Looks for a near duplicate among the rows that were kept."""
        found = self._index.find(self.sketched(example))
        if found is None:
            return None
        example.notes["near_duplicate"] = f"{found.similarity:.2f} of row {found.number + 1} that was kept"
        return "near duplicate"

    def add(self, example: Example) -> None:
        """Remembers the row."""
        self._index.add(self.sketched(example))
