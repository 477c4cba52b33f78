"""Statistics of a data set: counts, lengths, scripts and duplicates, in one pass."""

from __future__ import annotations

import statistics
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.cleaning.near_duplicates import NearDuplicates, sketch
from lightning_rlhf.cleaning.pipeline import CHUNK
from lightning_rlhf.cleaning.text import scripts
from lightning_rlhf.data.preference_formats import read_name
from lightning_rlhf.data.unpaired_formats import Unpaired

#: Columns that name the type of a row, the first of which counts.
_TYPES = ("category", "type", "task")
_MOST = 20


class Lengths:
    """The lengths of texts, in words and single Chinese characters."""

    def __init__(self) -> None:
        self._values = array("I")

    def add(self, value: int) -> None:
        """Adds a length."""
        self._values.append(value)

    def to_json(self) -> dict[str, float]:
        """Number of texts; of their lengths the sum, the smallest, the median, the 95th percentile, the largest."""
        if not self._values:
            return {"texts": 0}
        ordered = sorted(self._values)
        return {
            "texts": len(ordered),
            "tokens": sum(ordered),
            "min": ordered[0],
            "median": statistics.median(ordered),
            "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
            "max": ordered[-1],
        }


@dataclass
class Statistics:
    """Counts of a data set.

    Attributes:
        rows: Number of rows.
        kinds: Rows by kind.
        formats: Rows by format.
        languages: Rows by the language of their instruction.
        types: Rows by the column ``category``, ``type`` or ``task``.
        turns: Rows by number of user turns.
        letters: Letters of the instructions by script.
        other_language: Rows whose column ``lang`` says another language than their instruction is in.
        labels: Single answers that are good, and bad; those with a rating have none.
        longer_won: Preferences whose best answer is longer than the worst, and shorter.
        instructions: Lengths of instructions.
        answers: Lengths of answers.
        equal: Rows whose instruction has the words of one before.
        near: Further rows whose instruction is a near duplicate of one before.
    """

    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    languages: Counter[str] = field(default_factory=Counter)
    types: Counter[str] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    letters: Counter[str] = field(default_factory=Counter)
    other_language: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    longer_won: Counter[str] = field(default_factory=Counter)
    instructions: Lengths = field(default_factory=Lengths)
    answers: Lengths = field(default_factory=Lengths)
    equal: int = 0
    near: int = 0

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values; most frequent first."""
        counters = {
            name: {str(key): count for key, count in getattr(self, name).most_common()}
            for name in ("kinds", "formats", "languages", "types", "turns", "letters", "labels", "longer_won")
        }
        return {
            "rows": self.rows,
            **counters,
            "other_language": self.other_language,
            "instruction_tokens": self.instructions.to_json(),
            "answer_tokens": self.answers.to_json(),
            "equal_instructions": self.equal,
            "near_duplicates": self.near,
        }

    def lines(self) -> Iterator[str]:
        """The figures as lines for people."""
        made = self.to_json()
        yield f"rows        {self.rows:,}"
        for name in ("kinds", "formats", "languages", "types", "turns"):
            yield f"{name:10s}  {_counts(made[name])}"
        yield f"letters     {_shares(self.letters)}"
        for name, label in (("instruction_tokens", "instruction"), ("answer_tokens", "answer")):
            found = made[name]
            if found["texts"]:
                spread = ", ".join(f"{key} {found[key]:,g}" for key in ("min", "median", "p95", "max"))
                total = f"{found['texts']:,} texts of {found['tokens']:,} words or Chinese characters"
                yield f"{label:11s} {total}: {spread}"
        yield f"duplicates  {self.equal:,} rows ask what one before asks, {self.near:,} more nearly the same"
        if self.other_language:
            yield f"language    {self.other_language:,} rows are in another language than their column says"
        if self.labels:
            yield f"labels      {_counts(made['labels'])}"
        if self.longer_won:
            yield f"preferred   the answer that is {_shares(self.longer_won)}"


def measure(examples: Iterable[Example]) -> Statistics:
    """Takes the statistics of examples, of which it holds a few at a time.

    Raises:
        ImportError: A package of the extra ``collect`` is missing.
    """
    found = Statistics()
    index, seen = NearDuplicates(), set[int]()
    examples = iter(examples)
    while chunk := list(islice(examples, CHUNK)):
        sketches = sketch([example.instruction_tokens for example in chunk])
        for example, one in zip(chunk, sketches, strict=True):
            _count(found, example)
            key = hash(tuple(example.instruction_tokens))
            if key in seen:
                found.equal += 1
            elif index.find(one) is not None:
                found.near += 1
            else:
                index.add(one)
            seen.add(key)
    return found


def _count(found: Statistics, example: Example) -> None:
    found.rows += 1
    found.kinds[example.kind] += 1
    found.formats[example.format] += 1
    found.languages[example.language or "none"] += 1
    found.types[read_name(example.row, *_TYPES) or "none"] += 1
    found.turns[len(example.questions)] += 1
    found.letters.update(scripts(example.instruction))
    found.other_language += bool(example.declared and example.language and example.declared != example.language)
    found.instructions.add(len(example.instruction_tokens))
    lengths = [len(tokens) for tokens in example.answer_tokens]
    for length in lengths:
        found.answers.add(length)
    if isinstance(example.parsed, Unpaired):
        found.labels.update({True: "good", False: "bad", None: "none"}[label] for label in example.parsed.labels)
    if example.kind == "preference":
        found.longer_won[_sign(lengths)] += 1


def _sign(lengths: Sequence[int]) -> str:
    first, last = lengths[0], lengths[-1]
    return "longer" if first > last else "shorter" if first < last else "equally long"


def _counts(found: dict[str, int]) -> str:
    shown = [f"{name} {count:,}" for name, count in list(found.items())[:_MOST]]
    return ", ".join(shown) + (f" and {len(found) - _MOST} others" if len(found) > _MOST else "")


def _shares(found: Counter[str]) -> str:
    total = found.total() or 1
    return ", ".join(f"{name} {count / total:.1%}" for name, count in found.most_common())
