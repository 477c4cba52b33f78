"""Runs filters over examples, in the order of the list, and counts what each drops."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
#: Reasons of a filter that the table names.
_REASONS = 4


@dataclass
class FilterTally:
    """Counts of one filter.

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
    """Counts of all filters, possibly over several calls of :func:`clean`.

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

    def merge(self, found: Mapping[str, Any]) -> None:
        """Adds a tally of other examples.

        Args:
            found: What :meth:`to_json` returned.
        """
        self.seen += found["seen"]
        self.kept += found["kept"]
        for name, other in found["filters"].items():
            one = self.filters.setdefault(name, FilterTally())
            for figure in ("seen", "dropped", "changed", "seconds"):
                setattr(one, figure, getattr(one, figure) + other[figure])
            one.reasons.update(other["reasons"])
            one.examples = [*one.examples, *other["examples"]][:_EXAMPLES]

    def lines(self) -> Iterator[str]:
        """A table for people."""
        yield f"{'filter':24s}{'seen':>12s}{'dropped':>12s}{'share':>8s}{'CPU s':>9s}  reasons"
        for name, one in self.filters.items():
            reasons = [f"{reason} {count:,}" for reason, count in one.reasons.most_common(_REASONS)]
            if len(one.reasons) > _REASONS:
                reasons.append(f"{len(one.reasons) - _REASONS} other reasons")
            if one.changed:
                reasons.append(f"texts changed in {one.changed:,} rows")
            share = one.dropped / one.seen if one.seen else 0.0
            figures = f"{name:24s}{one.seen:12,}{one.dropped:12,}{share:8.1%}{one.seconds:9.1f}"
            yield f"{figures}  {', '.join(reasons)}".rstrip()
        yield f"{self.kept:,} of {self.seen:,} rows kept"


def clean(
    examples: Iterable[Example],
    filters: Sequence[Filter],
    tally: Tally | None = None,
    on_drop: Callable[[Example, str, str], None] | None = None,
) -> Iterator[Example]:
    """Runs filters over examples. Each filter sees what those before it in the list have kept.

    Args:
        examples: The examples; at most :data:`CHUNK` of them are held.
        filters: The filters. Those that remember rows go on from where they are.
        tally: Counts what happens. Default: nothing is counted.
        on_drop: Called with each example that is dropped, the filter's name and the reason.

    Yields:
        The examples that all filters keep, in order.
    """
    tally = Tally() if tally is None else tally
    steps = [
        _Step(name, filter, tally.filters.setdefault(name, FilterTally()), on_drop) for name, filter in _named(filters)
    ]
    split = next((i for i, step in enumerate(steps) if step.filter.remembers), len(steps))
    examples = iter(examples)
    while chunk := list(islice(examples, CHUNK)):
        tally.seen += len(chunk)
        for step in steps[:split]:  # they don't depend on each other's examples: one filter at a time
            step.prepare(chunk)
            chunk = [example for example in chunk if step.keeps(example)]
        for step in steps[split:]:
            step.prepare(chunk)
        for example in chunk:  # what the first keep decides on the next: one example at a time
            if all(step.keeps(example) for step in steps[split:]):
                for step in steps[split:]:
                    step.add(example)
                tally.kept += 1
                yield example


def _named(filters: Sequence[Filter]) -> Iterator[tuple[str, Filter]]:
    """The filters with names; of several with one name the later get a number."""
    seen: Counter[str] = Counter()
    for filter in filters:
        seen[filter.name] += 1
        yield filter.name if seen[filter.name] == 1 else f"{filter.name} {seen[filter.name]}", filter


@dataclass
class _Step:
    """A filter with its tally."""

    name: str
    filter: Filter
    tally: FilterTally
    on_drop: Callable[[Example, str, str], None] | None

    def prepare(self, chunk: Sequence[Example]) -> None:
        start = time.process_time()
        if chunk:
            self.filter.prepare(chunk)
        self.tally.seconds += time.process_time() - start

    def add(self, example: Example) -> None:
        if self.filter.remembers:
            start = time.process_time()
            self.filter.add(example)
            self.tally.seconds += time.process_time() - start

    def keeps(self, example: Example) -> bool:
        start, before = time.process_time(), example.rewritten
        reason = self.filter(example)
        self.tally.seconds += time.process_time() - start
        self.tally.seen += 1
        self.tally.changed += example.rewritten > before
        if reason is not None:
            self._drop(example, reason)
        return reason is None

    def _drop(self, example: Example, reason: str) -> None:
        self.tally.dropped += 1
        self.tally.reasons[reason] += 1
        if len(self.tally.examples) < _EXAMPLES:
            text = one_line(example.answer if "answer" in reason else example.instruction, _CHARACTERS)
            measured = dict(example.notes)
            self.tally.examples.append({"where": example.where, "reason": reason, "text": text, "measured": measured})
        if self.on_drop is not None:
            self.on_drop(example, self.name, reason)
