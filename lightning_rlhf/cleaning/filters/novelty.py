"""Drops instructions that are too much like a seed or an instruction that was accepted before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.cleaning.filters.base import Filter
from lightning_rlhf.cleaning.text import tokens
from lightning_rlhf.utils.imports import require

_SURROGATES = range(0xD800, 0xE000)


class Novelty(Filter):
    """Drops instructions whose ROUGE-L with a seed or an instruction accepted before is too high.

    ROUGE-L is the F measure of the longest common subsequence of tokens (Lin 2004; Self-Instruct, Wang et al. 2023).
    It is exact: each instruction is compared with all before it. Unlike :class:`NearDuplicate` it also drops different
    tasks of one template, as growth wants and cleaning does not.

    Args:
        most: Largest ROUGE-L that is kept. A smaller value drops more.
        seeds: Instructions that count as accepted from the start.
    """

    remembers = True

    def __init__(self, most: float = 0.7, seeds: Iterable[str] = ()) -> None:
        if not 0 <= most <= 1:
            raise ValueError(f"Novelty: most is {most}. Give a number between 0 and 1.")
        self.most = most
        self._characters: dict[str, str] = {}
        self._pool: list[str] = []
        self._texts: list[str] = []
        for seed in seeds:
            self._add(seed, tokens(seed))

    def __call__(self, example: Example) -> str | None:
        """Compares the user turns with all that were accepted; notes the highest ROUGE-L and what it is with."""
        value, text = self.closest(example.instruction_tokens)
        example.notes["novelty"] = round(value, 4)
        if text:
            example.notes["closest"] = text
        return "like another instruction" if value > self.most else None

    def add(self, example: Example) -> None:
        """Remembers the instruction."""
        self._add(example.instruction, example.instruction_tokens)

    def closest(self, words: Sequence[str]) -> tuple[float, str]:
        """The highest ROUGE-L of a text with those accepted, and the first of these that has it.

        Args:
            words: Its tokens.
        """
        fuzz = require("rapidfuzz", "Measuring novelty", "collect")
        if not words or not self._pool:
            return 0.0, ""
        # Indel similarity is 2 * LCS / (m + n), which is ROUGE-L's F
        scorer = fuzz.distance.Indel.normalized_similarity
        _, value, place = fuzz.process.extractOne(self._spelt(words), self._pool, scorer=scorer, processor=None)
        return float(value), self._texts[place] if value else ""

    def _add(self, text: str, words: Sequence[str]) -> None:
        if words:
            self._pool.append(self._spelt(words))
            self._texts.append(text)

    def _spelt(self, words: Sequence[str]) -> str:
        """A text with one character for each token: so its tokens are compared, and fast."""
        return "".join([self._characters.get(word) or self._new(word) for word in words])

    def _new(self, word: str) -> str:
        code = len(self._characters)
        code += len(_SURROGATES) if code >= _SURROGATES.start else 0
        self._characters[word] = chr(code)
        return self._characters[word]
