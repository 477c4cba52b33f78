"""Runs filters over examples, in the order of the list, and counts what each drops."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.cleaning.filters.base import Filter
from lightning_rlhf.utils.text import one_line

#: Examples that are measured together.
CHUNK = 256
#: Dropped examples that a tally keeps of each filter, and characters of each.
_EXAMPLES, _CHARACTERS = 5, 200


@dataclass
class FilterTally:
    """What one filter did.

    Attributes:
        seen: Examples that reached it.
        dropped: Examples that it dropped.
        changed: Examples whose texts it changed.
        seconds: CPU time that it took.
        reasons: Number of dropped examples by reason.
        examples: The first few that it dropped: place, reason, text, and what was measured.
    """

    seen: int = 0
    dropped: int = 0
    changed: int = 0
    seconds: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Tally:
    """What all filters did; it may go over several calls of :func:`clean`.

    Attributes:
        seen: Examples that came in.
        kept: Examples that all filters kept.
        filters: What each filter did, by name, in their order.
    """

    seen: int = 0
    kept: int = 0
    filters: dict[str, FilterTally] = field(default_factory=dict)

    def to_json(self, seconds: bool = True) -> dict[str, Any]:
        """The tally as JSON values.

        Args:
            seconds: With the CPU time, which differs from run to run.
        """
        filters = {name: {**vars(tally), "reasons": dict(tally.reasons)} for name, tally in self.filters.items()}
        if not seconds:
            filters = {name: {k: v for k, v in tally.items() if k != "seconds"} for name, tally in filters.items()}
        return {"seen": self.seen, "kept": self.kept, "filters": filters}


def clean(examples: Iterable[Example], filters: Sequence[Filter], tally: Tally | None = None) -> Iterator[Example]:
    """Runs filters over examples. Each filter sees what those before it in the list have kept.

    Args:
        examples: The examples; at most :data:`CHUNK` of them are held.
        filters: The filters. Those that remember rows go on from where they are.
        tally: Counts what happens. Default: nothing is counted.

    Yields:
        The examples that all filters keep, in order.
    """
    tally = Tally() if tally is None else tally
    named = _named(filters)
    for name in named:
        tally.filters.setdefault(name, FilterTally())
    split = next((i for i, filter in enumerate(filters) if filter.remembers), len(filters))
    steps = list(named.items())
    examples = iter(examples)
    while chunk := list(islice(examples, CHUNK)):
        tally.seen += len(chunk)
        for name, filter in steps[:split]:  # they don't depend on each other's examples: one filter at a time
            _prepare(filter, chunk, tally.filters[name])
            chunk = [example for example in chunk if _keeps(filter, example, tally.filters[name])]
        for name, filter in steps[split:]:
            _prepare(filter, chunk, tally.filters[name])
        for example in chunk:  # what the first keep decides on the next: one example at a time
            if all(_keeps(filter, example, tally.filters[name]) for name, filter in steps[split:]):
                for _, filter in steps[split:]:
                    if filter.remembers:
                        filter.add(example)
                tally.kept += 1
                yield example


def _named(filters: Sequence[Filter]) -> Mapping[str, Filter]:
    """The filters by name; of several with one name the later get a number."""
    named: dict[str, Filter] = {}
    for filter in filters:
        name, number = filter.name, 2
        while name in named:
            name, number = f"{filter.name} {number}", number + 1
        named[name] = filter
    return named


def _prepare(filter: Filter, chunk: Sequence[Example], tally: FilterTally) -> None:
    start = time.process_time()
    if chunk:
        filter.prepare(chunk)
    tally.seconds += time.process_time() - start


def _keeps(filter: Filter, example: Example, tally: FilterTally) -> bool:
    start, before = time.process_time(), example.rewritten
    reason = filter(example)
    tally.seconds += time.process_time() - start
    tally.seen += 1
    tally.changed += example.rewritten > before
    if reason is None:
        return True
    tally.dropped += 1
    tally.reasons[reason] += 1
    if len(tally.examples) < _EXAMPLES:
        tally.examples.append(
            {
                "where": example.where,
                "reason": reason,
                "text": one_line(example.answer if "answer" in reason else example.instruction, _CHARACTERS),
                "measured": dict(example.notes),
            }
        )
    return False
