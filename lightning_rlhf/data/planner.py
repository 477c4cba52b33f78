"""Batches planned from lengths: the trees of each optimizer step are dealt into balanced bins.

A bin is one micro-batch of one rank.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from lightning_rlhf.data.errors import DataError
from lightning_rlhf.data.packed import Branch, PackedBatch, Size, StepTotals, Tree, pack
from lightning_rlhf.utils.random import generator


class Bin(NamedTuple):
    """One micro-batch of one rank.

    Attributes:
        rows: Indices of its trees; empty if a step has fewer trees than bins.
        totals: Totals of the whole step.
        epoch: The epoch that the step belongs to.
    """

    rows: tuple[int, ...]
    totals: StepTotals
    epoch: int = 0


@dataclass(frozen=True, eq=False)
class Planner:
    """Deals trees into steps and bins.

    All trees are put in one order. Step i takes the trees whose first branch is among the i-th ``batch_size`` branches,
    so it has that many branches, give or take part of a tree. Every epoch has the same number of steps, as Lightning
    requires.

    Args:
        sizes: The size of every tree; a list, or an array (trees, ``len(Size.NAMES)``) of their numbers, which may be
            memory-mapped.
        batch_size: Sequences per optimizer step, over all ranks and micro-batches; at least those of the largest
            tree.
        micro_batches: Micro-batches per step on each rank (``accumulate_grad_batches``).
        ranks: Data-parallel size.
        max_tokens: Maximum number of tokens per bin; None for no limit.
        shuffle: Deal in a new order each epoch.
        seed: Seed of the shuffle. The plan is a function of (seed, epoch).
        drop_last: Leave out the last step of an epoch if it has fewer than ``batch_size`` sequences.
        sources: Number of trees and weight of each source, in order; None for one source of weight 1. An epoch takes
            ``weight * trees`` trees of a source, rounded up, and continues where the epoch before stopped: no tree
            comes again before all others of its source came as often.
        window: Number of trees to shuffle and plan at a time, about; None for all. A window joins runs of neighboring
            trees, which are fast to read, from 64 random places.
        overhead: Tokens that every tree costs besides its own.
        keys: (trees,) numbers by which each epoch is sorted, the smallest first, in place of the shuffle, which orders
            equal ones; not with ``window``. None: no such order.
        content: A hash of the trees and their order, which checkpoints keep; empty if unknown.
    """

    sizes: Sequence[Size] | NDArray[np.float64]
    batch_size: int
    micro_batches: int = 1
    ranks: int = 1
    max_tokens: int | None = None
    shuffle: bool = True
    seed: int = 0
    drop_last: bool = False
    sources: Sequence[tuple[int, float]] | None = None
    window: int | None = None
    overhead: int = 0
    keys: NDArray[np.float64] | None = None
    content: str = ""

    def steps(self, epoch: int) -> list[list[Bin]]:
        """The epoch's steps. Each has ``micro_batches * ranks`` bins; bin ``k * ranks + r`` is the k-th of rank r.

        Raises:
            ValueError: A bin exceeds ``max_tokens``; the message names the ``accumulate_grad_batches`` that fits.
        """
        return [step for steps in self.windows(epoch) for step in steps]

    def windows(self, epoch: int, start: int = 0) -> Iterator[list[list[Bin]]]:
        """The same steps from ``start`` on, planned one window at a time; a step in two windows is in the second.

        Raises:
            ValueError: As for :meth:`steps`, when the window is reached.
        """
        done = 0  # branches, or trees, of the windows before
        held = rows = np.empty(0, dtype=np.int64)
        held_numbers = held
        for rows, last in self._orders(epoch):
            units = self._branches[rows].astype(np.int64) if self._cut.by_branches else np.ones_like(rows)
            before = done + np.cumsum(units) - units
            done += int(units.sum())
            numbers = before * self._cut.numerator // self._cut.denominator
            if not self.drop_last:
                numbers = np.minimum(numbers, self.num_steps - 1)
            kept = (numbers >= start) & (numbers < self.num_steps)
            rows, numbers = np.append(held, rows[kept]), np.append(held_numbers, numbers[kept])
            ready = len(rows) if last or not len(rows) else int(np.searchsorted(numbers, numbers[-1]))
            held, held_numbers = rows[ready:], numbers[ready:]
            if ready:
                ends = np.flatnonzero(np.diff(numbers[:ready])) + 1
                yield [self._deal(step.tolist(), epoch) for step in np.split(rows[:ready], ends)]

    @property
    def num_steps(self) -> int:
        """Steps per epoch."""
        return self._cut.steps

    @property
    def num_trees(self) -> int:
        """Trees per epoch; a tree that comes twice counts twice."""
        return sum(take for _, _, take in self._drawn)

    @cached_property
    def _table(self) -> NDArray[np.float64]:
        """(trees, ``len(Size.NAMES)``) the sizes as numbers."""
        sizes = self.sizes if isinstance(self.sizes, np.ndarray) else [size.numbers for size in self.sizes]
        return np.asarray(sizes, dtype=np.float64).reshape(-1, len(Size.NAMES))

    @property
    def _branches(self) -> NDArray[np.float64]:
        """(trees,) number of branches of each tree."""
        return self._table[:, Size.NAMES.index("sequences")]

    @cached_property
    def _drawn(self) -> list[tuple[int, int, int]]:
        """(first tree, number of trees, trees that an epoch takes) of each source that has trees."""
        drawn, first = [], 0
        for count, weight in self.sources or [(len(self._table), 1.0)]:
            if count:
                drawn.append((first, count, math.ceil(Fraction(str(weight)) * count)))  # 1.1 x 10 is 11, not 12
            first += count
        return drawn

    @cached_property
    def _cut(self) -> _Cut:
        """How an epoch is cut into steps. Every epoch has the same number of steps, and none is empty."""
        branches = self._branches
        if not len(branches):
            return _Cut(0, True, 1, 1)
        most = int(branches.max())
        alike = most == int(branches.min())
        size = max(self.batch_size, most)
        if alike:
            size -= size % most
        mean = sum(take * float(branches[first : first + count].mean()) for first, count, take in self._drawn)
        if alike or all(take % count == 0 for _, count, take in self._drawn):
            total = round(mean)
            steps = (total - most) // size + 1  # the last tree begins at branch total - most or later
            drops = self.drop_last and total < steps * size
            return _Cut(steps - drops, True, 1, size)
        # epochs have different trees, so different numbers of branches: every step gets the same number of trees
        steps = max(1, min(self.num_trees, math.ceil(mean / size)))
        return _Cut(steps, False, steps, self.num_trees)

    def _orders(self, epoch: int) -> Iterator[tuple[NDArray[np.int64], bool]]:
        """An epoch's trees in order, one window at a time, and whether the window is the last."""
        whole = self.window is None
        stretch = 1 if self.window is None else max(1, self.window // 64)
        starts, lengths = self._stretches(epoch, stretch)
        if self.shuffle:
            order = _permutation(len(starts), self.seed, epoch)
            starts, lengths = starts[order], lengths[order]
        each = max(1, len(starts) if whole else 64)
        for i in range(0, len(starts), each):
            n, ends = lengths[i : i + each], np.cumsum(lengths[i : i + each])
            rows = np.arange(ends[-1]) + np.repeat(starts[i : i + each] - (ends - n), n)
            if self.shuffle and not whole:
                rows = rows[_permutation(len(rows), self.seed, epoch, i)]
            if self.keys is not None:
                rows = rows[np.argsort(self.keys[rows], kind="stable")]
            yield rows, i + each >= len(starts)

    def _stretches(self, epoch: int, stretch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First tree and length of each run of neighboring trees that the epoch takes.

        Each source is an endless sequence of passes over its trees, and each epoch takes the next part of it. Every
        pass has its own order of runs.
        """
        found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for source, (first, count, take) in enumerate(self._drawn):
            starts = np.arange(0, count, stretch)
            lengths = np.minimum(stretch, count - starts)
            begin, end = epoch * take, (epoch + 1) * take
            while begin < end:
                number, low = divmod(begin, count)
                high = min(count, low + end - begin)
                begin += high - low
                if high - low == count:
                    found.append((first + starts, lengths))
                    continue
                order = _permutation(len(starts), self.seed, number, source)
                ends = np.cumsum(lengths[order])
                begins = ends - lengths[order]
                lows, highs = np.maximum(begins, low), np.minimum(ends, high)
                kept = lows < highs
                found.append(((first + starts[order] + lows - begins)[kept], (highs - lows)[kept]))
        nothing = np.empty(0, dtype=np.int64)
        return np.concatenate([nothing, *(s for s, _ in found)]), np.concatenate([nothing, *(n for _, n in found)])

    def _deal(self, rows: list[int], epoch: int) -> list[Bin]:
        bins = self.micro_batches * self.ranks
        table = self._table[rows]
        tokens = [int(n) + self.overhead for n in table[:, 0]]
        sums = {name: sum(table[:, i].tolist()) for i, name in enumerate(Size.NAMES) if i}
        totals = StepTotals(**sums, bins=bins)
        dealt = balance(tokens, bins)
        largest = max(sum(tokens[i] for i in b) for b in dealt)
        if self.max_tokens is not None and largest > self.max_tokens:
            raise ValueError(self._too_large(tokens, largest))
        return [Bin(tuple(rows[i] for i in b), totals, epoch) for b in dealt]

    def _too_large(self, tokens: list[int], largest: int) -> str:
        message = f"A micro-batch of {largest} tokens exceeds max_tokens={self.max_tokens}"
        if max(tokens) > (self.max_tokens or 0):
            return f"{message}: one row alone has {max(tokens)}. Raise max_tokens, or lower max_length."
        k = self.micro_batches
        while max(sum(tokens[i] for i in b) for b in balance(tokens, k * self.ranks)) > (self.max_tokens or 0):
            k += 1
        return f"{message}: set trainer.accumulate_grad_batches={k} (now {self.micro_batches}), or lower batch_size."

    def fingerprint(self) -> dict[str, Any]:
        """All that the plan depends on, for checkpoints."""
        count = len(self._table)
        found: dict[str, Any] = {
            "rows": count,
            "tokens": int(self._table[:, 0].sum()) + count * self.overhead,
            "batch_size": self.batch_size,
            "micro_batches": self.micro_batches,
            "ranks": self.ranks,
            "seed": self.seed,
        }
        if self.content:
            found["content"] = self.content
        if self.keys is not None:
            found["order"] = hashlib.sha256(np.ascontiguousarray(self.keys).tobytes()).hexdigest()[:16]
        if self.sources and any(weight != 1 for _, weight in self.sources):
            found["sources"] = [[count, float(weight)] for count, weight in self.sources]
        return found if self.window is None else {**found, "window": self.window}


class _Cut(NamedTuple):
    """``steps`` per epoch. A tree after x branches (or trees) is in step ``x * numerator // denominator``."""

    steps: int
    by_branches: bool
    numerator: int
    denominator: int


def _permutation(n: int, *keys: int) -> NDArray[np.int64]:
    return torch.randperm(n, generator=generator(*keys)).numpy()


def balance(tokens: Sequence[int], bins: int) -> list[list[int]]:
    """Deals items into ``bins``, the largest item first, each into the lightest bin (longest processing time).

    Items keep their order inside a bin. Of equally light bins, the one with the lower number is taken.
    """
    heap = [(0, b) for b in range(bins)]
    dealt: list[list[int]] = [[] for _ in range(bins)]
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        load, b = heapq.heappop(heap)
        dealt[b].append(i)
        heapq.heappush(heap, (load + tokens[i], b))
    return [sorted(b) for b in dealt]


def pack_bin(trees: Sequence[Tree], chosen: Bin) -> PackedBatch:
    """Packs a bin's trees; an empty bin gives a row of weight 0."""
    return pack(trees or [Tree([0], [Branch([0])], weight=0.0)], chosen.totals, chosen.rows)


class _Bins(Dataset[Any]):
    """Makes batches of bins; runs in worker processes."""

    def __init__(self, rows: Callable[[int], Any], bins: list[Bin], collate: Callable[[list[Any], Bin], Any]) -> None:
        self.rows, self.bins, self.collate = rows, bins, collate

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> Any:
        chosen = self.bins[index]
        return self.collate([self.rows(i) for i in chosen.rows], chosen)


def _whole(batch: Any) -> Any:
    return batch


class PlannedLoader:
    """One rank's micro-batches of each epoch, in the planned order.

    It is a plain iterable, so Lightning injects no sampler. Its state is a global position, the same on all ranks. The
    position counts batches that were handed over, so it doesn't depend on workers that read ahead.

    Args:
        rows: Index to tree, or to whatever ``collate`` takes. It must pickle if ``num_workers`` > 0.
        planner: The plan.
        rank: Data-parallel rank.
        num_workers: Number of processes that pack batches ahead of time; 0 packs in this process.
        pin_memory: Put batches into page-locked memory.
        collate: Makes a batch of a bin's rows and the bin. It must pickle if ``num_workers`` > 0.
    """

    def __init__(
        self,
        rows: Callable[[int], Any],
        planner: Planner,
        rank: int = 0,
        num_workers: int = 0,
        pin_memory: bool = False,
        collate: Callable[[list[Any], Bin], Any] = pack_bin,
    ) -> None:
        self.rows, self.planner, self.rank = rows, planner, rank
        self.num_workers, self.pin_memory, self.collate = num_workers, pin_memory, collate
        self.epoch, self.position = 0, 0
        self._planned: tuple[int, list[Bin]] | None = None
        self._resume = False

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """This loader: Lightning looks here for ``sampler.set_epoch`` at the start of each epoch.

        An attribute ``sampler`` would make Lightning take the loader for a DataLoader.
        """
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's plan. The place in it is kept if it is the epoch that was restored."""
        if epoch != self.epoch:
            self.epoch, self.position, self._resume = epoch, 0, False

    def _mine(self, steps: list[list[Bin]]) -> list[Bin]:
        return [b for step in steps for b in step[self.rank :: self.planner.ranks]]

    def _bins(self, position: int = 0) -> Iterator[list[Bin]]:
        """This rank's bins from ``position`` on, one window at a time; a plan without windows is kept."""
        if self.planner.window is None:
            if self._planned is None or self._planned[0] != self.epoch:
                self._planned = self.epoch, self._mine(self.planner.steps(self.epoch))
            yield self._planned[1][position:]
            return
        step, passed = divmod(position, self.planner.micro_batches)
        for steps in self.planner.windows(self.epoch, step):
            yield self._mine(steps)[passed:]
            passed = 0

    def __len__(self) -> int:
        """Micro-batches per epoch, also after a resume."""
        if self.planner.window is None:
            next(self._bins())  # errors of the plan show before training starts
        return self.planner.num_steps * self.planner.micro_batches

    def __iter__(self) -> Iterator[Any]:
        self.position, self._resume = (self.position if self._resume else 0), False
        for bins in self._bins(self.position):
            loader = DataLoader(
                _Bins(self.rows, bins, self.collate),
                batch_size=None,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                collate_fn=_whole,
                generator=generator(self.planner.seed, self.epoch),
            )
            for batch in loader:
                self.position += 1
                yield batch

    def state_dict(self) -> dict[str, Any]:
        """The place in the plan, and all that the plan depends on."""
        return {"epoch": self.epoch, "position": self.position, "plan": self.planner.fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the place.

        Raises:
            DataError: The plan differs: other rows or another order, batch size, accumulation, number of ranks or seed.
        """
        plan, saved = self.planner.fingerprint(), state.get("plan") or {}
        if saved != plan:
            names = [name for name in {**saved, **plan} if saved.get(name) != plan.get(name)]
            changes = ", ".join(f"{name!r}: {saved.get(name)}, now {plan.get(name)}" for name in names)
            rows = " (the rows differ, or their order)" if names == ["content"] else ""
            raise DataError(
                f"The checkpoint was made with another plan: {changes}{rows}. Resume with the same data, weights, "
                "batch_size, accumulate_grad_batches, number of ranks and seed, or start a new run from the model in "
                "the checkpoint."
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._resume = self.position < len(self)
