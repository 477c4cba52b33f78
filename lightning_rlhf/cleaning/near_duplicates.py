"""An index of texts that finds near duplicates: MinHash finds candidates, exact Jaccard similarity confirms them."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from lightning_rlhf.utils.imports import require

#: MinHash values of a text, and bands of them that are looked up: texts that share all values of a band are compared.
#: At a similarity of 0.8 a pair is found with a probability of 0.95, at 0.9 with 0.9999.
VALUES, BANDS = 128, 16
_SEED = 42
#: Texts of one table. A hash table of Rust's doubles when it is 7/8 full; tables that never double past this hold no
#: more empty places than the last of them, whatever the number of texts.
_TABLE = 7 * 2**15
_BYTES = 4


class Sketch(NamedTuple):
    """A text as the index compares it.

    Attributes:
        shingles: Hashes of its words and pairs of words, without repeats.
        values: Their MinHash.
    """

    shingles: frozenset[int]
    values: Any


class Match(NamedTuple):
    """A text of the index that is like another.

    Attributes:
        number: Its number, in the order in which texts were added, from 0.
        similarity: Jaccard similarity of both sets of shingles, between 0 and 1.
    """

    number: int
    similarity: float


def shingles(tokens: Sequence[str]) -> list[str]:
    """The different tokens and pairs of neighboring tokens of a text.

    Example:
        >>> sorted(shingles(["a", "rose", "is", "a", "rose"]))
        ['a', 'a rose', 'is', 'is a', 'rose', 'rose is']
    """
    return list({*tokens, *map(" ".join, pairwise(tokens))})


def sketch(texts: Sequence[Sequence[str]]) -> list[Sketch]:
    """Sketches texts, faster together than one by one.

    Args:
        texts: The tokens of each.

    Raises:
        ImportError: rensa is not installed.
    """
    minhash = require("rensa", "Finding near duplicates", "collect").RMinHash
    sets = [shingles(tokens) for tokens in texts]
    hashes = minhash.hash_token_sets(sets)
    values = minhash.from_token_sets(sets, VALUES, _SEED)
    # the upper halves: the hash ends with a multiplication, which mixes those best
    return [Sketch(frozenset([h >> 32 for h in some]), value) for some, value in zip(hashes, values, strict=True)]


def similarity(one: frozenset[Any], other: frozenset[Any]) -> float:
    """Jaccard similarity: the share of the shingles of either text that both have.

    Example:
        >>> similarity(frozenset({1, 2, 3}), frozenset({2, 3, 4}))
        0.5
    """
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared) if one or other else 0.0


class NearDuplicates:
    """Texts that were kept, of which it finds those that are like a new one.

    It holds the MinHash tables (1.25 KB a text) and an offset in memory; shingles are in a temporary file, from which
    candidates are read. Texts without tokens are like no other.

    Args:
        threshold: Least Jaccard similarity of near duplicates. Below 0.7 pairs are missed by the tables.
    """

    def __init__(self, threshold: float = 0.8) -> None:
        if not 0 < threshold <= 1:
            raise ValueError(f"The threshold of near duplicates is {threshold}. Give a number above 0, at most 1.")
        self.threshold = threshold
        self._new_table = partial(
            require("rensa", "Finding near duplicates", "collect").RMinHashLSH, threshold, VALUES, BANDS
        )
        self._tables = [self._new_table()]
        self._offsets = array("Q", [0])
        self._file = tempfile.TemporaryFile(prefix="lightning_rlhf_shingles_")  # noqa: SIM115  # it goes with the index
        self._recent: dict[int, frozenset[int]] = {}

    def __len__(self) -> int:
        """Number of texts."""
        return len(self._offsets) - 1

    def find(self, new: Sketch) -> Match | None:
        """The most similar of the texts that are near duplicates; of equally similar ones the first."""
        best = None
        size = len(new.shingles)
        candidates = [number for table in self._tables for number in table.query(new.values)] if size else []
        for number in sorted(candidates):
            count = (self._offsets[number + 1] - self._offsets[number]) // _BYTES
            if min(count, size) < self.threshold * max(count, size):
                continue
            found = similarity(new.shingles, self._read(number))
            if found >= self.threshold and (best is None or found > best.similarity):
                best = Match(number, found)
        return best

    def add(self, new: Sketch) -> int:
        """Adds a text.

        Returns:
            Its number.
        """
        number = len(self)
        self._offsets.append(self._offsets[-1] + _BYTES * len(new.shingles))
        self._recent[number] = new.shingles
        if len(self._recent) == 256:
            self._flush()
        if number and number % _TABLE == 0:
            self._tables.append(self._new_table())
        if new.shingles:
            self._tables[-1].insert(number, new.values)
        return number

    def _flush(self) -> None:
        for some in self._recent.values():
            self._file.write(array("I", some).tobytes())
        self._recent.clear()

    def _read(self, number: int) -> frozenset[int]:
        if number in self._recent:
            return self._recent[number]
        self._file.seek(self._offsets[number])
        read = array("I")
        read.frombytes(self._file.read(self._offsets[number + 1] - self._offsets[number]))
        self._file.seek(0, 2)
        return frozenset(read)
