"""Batches planned from lengths: each optimizer step's trees dealt into balanced bins, one a micro-batch and rank."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from lightning_rlhf.data.packed import Branch, PackedBatch, StepTotals, Tree, pack


class Bin(NamedTuple):
    """One micro-batch of one rank.

    Attributes:
        rows: Indices of its trees; empty where a step has fewer trees than bins.
        totals: Of the whole step.
    """

    rows: tuple[int, ...]
    totals: StepTotals


class Size(NamedTuple):
    """What the planner needs to know of a tree: tokens, scored tokens, branches, and pairs by weight."""

    tokens: int
    scored: float
    sequences: int
    pairs: float = 0.0


@dataclass(frozen=True)
class Planner:
    """Deals trees into steps and bins.

    Args:
        sizes: Of every tree.
        batch_size: Sequences of an optimizer step, over all ranks and micro-batches.
        micro_batches: Micro-batches of a step on each rank (``accumulate_grad_batches``).
        ranks: Data-parallel size.
        max_tokens: Most tokens of a bin; None for no bound.
        shuffle: Deal in a new order each epoch.
        seed: Of the shuffle. The plan is a function of (seed, epoch).
        drop_last: Leave out an epoch's last step where it has fewer than ``batch_size`` sequences.
    """

    sizes: Sequence[Size]
    batch_size: int
    micro_batches: int = 1
    ranks: int = 1
    max_tokens: int | None = None
    shuffle: bool = True
    seed: int = 0
    drop_last: bool = False

    def steps(self, epoch: int) -> list[list[Bin]]:
        """The epoch's steps, each ``micro_batches * ranks`` bins; rank r's k-th is number ``k * ranks + r``.

        Raises:
            ValueError: A bin over ``max_tokens``; the message names the ``accumulate_grad_batches`` that fits.
        """
        order = list(range(len(self.sizes)))
        if self.shuffle:
            order = torch.randperm(len(order), generator=generator(self.seed, epoch)).tolist()
        return [self._deal(rows) for rows in self._cut(order)]

    def _cut(self, order: list[int]) -> Iterator[list[int]]:
        step: list[int] = []
        count = 0
        for i in order:
            if step and count + self.sizes[i].sequences > self.batch_size:
                yield step
                step, count = [], 0
            step.append(i)
            count += self.sizes[i].sequences
        if step and not (self.drop_last and count < self.batch_size):
            yield step

    def _deal(self, rows: list[int]) -> list[Bin]:
        bins = self.micro_batches * self.ranks
        sizes = [self.sizes[i] for i in rows]
        totals = StepTotals(
            tokens=sum(s.scored for s in sizes),
            sequences=sum(s.sequences for s in sizes),
            bins=bins,
            pairs=sum(s.pairs for s in sizes),
        )
        dealt = balance([self.sizes[i].tokens for i in rows], bins)
        largest = max(sum(self.sizes[rows[i]].tokens for i in b) for b in dealt)
        if self.max_tokens is not None and largest > self.max_tokens:
            raise ValueError(self._too_large(rows, largest))
        return [Bin(tuple(rows[i] for i in b), totals) for b in dealt]

    def _too_large(self, rows: list[int], largest: int) -> str:
        tokens = [self.sizes[i].tokens for i in rows]
        message = f"A micro-batch of {largest} tokens is over max_tokens={self.max_tokens}"
        if max(tokens) > (self.max_tokens or 0):
            return f"{message}: one row alone has {max(tokens)}. Raise max_tokens, or lower max_length."
        k = self.micro_batches
        while max(sum(tokens[i] for i in b) for b in balance(tokens, k * self.ranks)) > (self.max_tokens or 0):
            k += 1
        return f"{message}: set trainer.accumulate_grad_batches={k} (now {self.micro_batches}), or lower batch_size."


def generator(*keys: int) -> torch.Generator:
    """A generator of its own for a tuple of keys; the global one is never touched."""
    seed = 0
    for key in keys:
        seed = (seed * 6364136223846793005 + key + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)


def balance(tokens: Sequence[int], bins: int) -> list[list[int]]:
    """Deals items into ``bins`` by longest processing time: the largest item to the lightest bin.

    Every item lands once; items keep their order inside a bin; ties go to the bin with the lower number.
    """
    heap = [(0, b) for b in range(bins)]
    dealt: list[list[int]] = [[] for _ in range(bins)]
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        load, b = heapq.heappop(heap)
        dealt[b].append(i)
        heapq.heappush(heap, (load + tokens[i], b))
    return [sorted(b) for b in dealt]


def pack_bin(trees: Sequence[Tree], chosen: Bin) -> PackedBatch:
    """A bin's trees as a packed batch; a row without weight where there are none."""
    return pack(trees or [Tree([0], [Branch([0])], weight=0.0)], chosen.totals, chosen.rows)


class _Bins(Dataset[Any]):
    """Bins to batches; runs in worker processes."""

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

    A plain iterable: Lightning injects no sampler. Its state is a global position, the same on all ranks, counted
    when a batch is handed over, so that neither workers that read ahead nor a loop state kept by one rank matter.

    Args:
        rows: Index to tree, or to what else ``collate`` takes; must pickle where ``num_workers`` > 0.
        planner: The plan.
        rank: Data-parallel rank.
        num_workers: Processes that pack ahead.
        pin_memory: Hand over batches in page-locked memory.
        collate: Makes a batch of a bin: its rows and the bin; must pickle as well.
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
        """Where Lightning looks for ``sampler.set_epoch`` at the start of each epoch: this loader.

        Not as ``sampler``, which Lightning takes for a DataLoader's.
        """
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch's plan; the place in it is kept when it is the epoch that was restored."""
        if epoch != self.epoch:
            self.epoch, self.position, self._resume = epoch, 0, False

    def _bins(self) -> list[Bin]:
        if self._planned is None or self._planned[0] != self.epoch:
            steps = self.planner.steps(self.epoch)
            self._planned = self.epoch, [b for step in steps for b in step[self.rank :: self.planner.ranks]]
        return self._planned[1]

    def __len__(self) -> int:
        """Micro-batches of the whole epoch, also after a resume."""
        return len(self._bins())

    def __iter__(self) -> Iterator[Any]:
        self.position, self._resume = (self.position if self._resume else 0), False
        bins = self._bins()
        loader = DataLoader(
            _Bins(self.rows, bins[self.position :], self.collate),
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
        """The place in the plan, and what the plan was made from."""
        return {"epoch": self.epoch, "position": self.position, "plan": self._fingerprint()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved place.

        Raises:
            ValueError: The plan is another one: other data, batch size, accumulation, ranks or seed.
        """
        if state.get("plan") != self._fingerprint():
            raise ValueError(
                f"The checkpoint was made with another plan: {state.get('plan')}, now {self._fingerprint()}. Resume "
                "with the same data, batch_size, accumulate_grad_batches, number of ranks and seed, or start a new run "
                "from its weights."
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._resume = self.position < len(self)

    def _fingerprint(self) -> dict[str, int]:
        p = self.planner
        return {
            "rows": len(p.sizes),
            "tokens": sum(s.tokens for s in p.sizes),
            "batch_size": p.batch_size,
            "micro_batches": p.micro_batches,
            "ranks": p.ranks,
            "seed": p.seed,
        }
