"""Drops rows that hold what a test set asks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain

from lightning_rlhf.cleaning.example import Example, read_examples
from lightning_rlhf.cleaning.filters.near_duplicate import Sketched
from lightning_rlhf.cleaning.near_duplicates import NearDuplicates, sketch
from lightning_rlhf.data.sources import BadRows, Source

#: A run of tokens in more test rows than this is a phrase of the test's own template.
_TEMPLATE = 10


class Contamination(Sketched):
    """Drops rows whose user turns are near duplicates of a test row's, or share a long run of words with them.

    The run may stand anywhere in a row, its answers included: a test question that is quoted within a longer text is
    found. Runs that more than ten test rows share are their template, and don't count.

    Args:
        against: Files of the test set, in any format that the data modules read, or its rows.
        run: Number of words of a run; of Chinese characters twice as many. A smaller value drops more.
        threshold: Least Jaccard similarity of near duplicates.

    Attributes:
        tested: Number of test rows.
    """

    def __init__(self, against: Source, run: int = 13, threshold: float = 0.8) -> None:
        super().__init__()
        if run < 2:
            raise ValueError(f"Contamination: run is {run}. Give at least 2 words.")
        self.run = run
        self._index = NearDuplicates(threshold)
        self._places: list[str] = []
        counts: Counter[int] = Counter()
        for example in read_examples(against, BadRows(skip=None)):
            (made,) = sketch([example.instruction_tokens])
            self._index.add(made)
            self._places.append(example.where)
            counts.update(set(self._runs(example.instruction_tokens)))
        self._known = {key for key, count in counts.items() if count <= _TEMPLATE}
        if not self._places:
            raise ValueError(f"Contamination: there is no row in {against}. Give the files of a test set.")

    @property
    def tested(self) -> int:
        """Number of test rows."""
        return len(self._places)

    def __call__(self, example: Example) -> str | None:
        """Compares a row with the test set."""
        found = self._index.find(self.measured(example))
        if found is not None:
            example.notes["contamination"] = f"{found.similarity:.2f} of {self._places[found.number]}"
            return "near duplicate of a test row"
        texts = (example.instruction_tokens, *example.answer_tokens)
        if not self._known.isdisjoint(chain.from_iterable(map(self._runs, texts))):
            return "shares a run of words with a test row"
        return None

    def _runs(self, tokens: Sequence[str]) -> Iterator[int]:
        """Hashes of all runs; one that begins with a Chinese character is twice as long."""
        for i, token in enumerate(tokens):
            end = i + (2 * self.run if len(token) == 1 and not token.isascii() else self.run)
            if end <= len(tokens):
                yield hash(tuple(tokens[i:end]))
