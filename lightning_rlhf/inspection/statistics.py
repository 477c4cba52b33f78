"""Statistics of a whole split: lengths, scored tokens, rows that were left out, and the plan."""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import lightning.pytorch as L

from lightning_rlhf.data import PlannedLoader, PromptDataModule, Tree
from lightning_rlhf.data.base import TreeDataModule, count_keys
from lightning_rlhf.data.token_cache import TokenRows
from lightning_rlhf.inspection.prompts import batch_of, read_prompts
from lightning_rlhf.protocols import DrawsSamples
from lightning_rlhf.stages import RewardModule


class Bar(NamedTuple):
    """A bar of a histogram: lengths from ``low`` to ``high``, both included."""

    low: int
    high: int
    sequences: int


@dataclass
class Statistics:
    """Statistics in words.

    Attributes:
        facts: Name and text of each figure.
        histogram: The sequences' lengths.
        problems: Faults that keep a run from starting.
    """

    facts: list[tuple[str, str]]
    histogram: list[Bar]
    problems: list[str] = field(default_factory=list)


def measure(
    module: L.LightningModule,
    data: TreeDataModule[Any],
    loader: PlannedLoader,
    split: str,
    languages: Mapping[str, str],
) -> Statistics:
    """Takes the statistics.

    Args:
        module: The stage.
        data: Its data module, set up.
        loader: The loader of the split.
        split: Its name.
        languages: Language by place of the row.
    """
    rows: TokenRows = loader.rows  # type: ignore[assignment]
    sizes = [rows.size(i) for i in range(len(rows))]
    prompts = isinstance(data, PromptDataModule)
    tokens = (
        list(map(len, read_prompts(module, batch_of(loader, range(len(rows))))))
        if prompts
        else [size.num_tokens for size in sizes]
    )
    trees = [] if prompts or all(size.totals.sequences == 1 for size in sizes) else [rows(i) for i in range(len(rows))]
    # lengths of each row's sequences: prompt and answer
    lengths = [[len(t.prompt) + len(b.input_ids) for b in t.branches] for t in trees] or [[n] for n in tokens]
    every = sorted(n for row in lengths for n in row)
    facts = [("rows", f"{len(rows):,}")]
    if trees:
        facts += [("answers", f"{len(every):,}, behind {len(rows):,} prompts"), *_pairs(trees)]
    good, bad = (int(sum(getattr(size.totals, name) for size in sizes)) for name in ("good", "bad"))
    if good or bad:
        facts.append(("labels", f"{good:,} good, {bad:,} bad"))
    facts.append(("tokens", f"{sum(tokens):,}{', each prompt once' if trees else ''}"))
    scored = len(every) if isinstance(module, RewardModule) else int(sum(size.totals.tokens for size in sizes))
    if not prompts:
        what = ": the last of each answer" if isinstance(module, RewardModule) else ""
        facts.append(("read by the loss", f"{scored:,} ({scored / sum(tokens):.1%}){what}"))
    p95 = every[min(len(every) - 1, int(0.95 * len(every)))]
    spread = f"min {every[0]:,}, median {statistics.median(every):,.0f}, p95 {p95:,}, max {every[-1]:,}"
    facts.append(("tokens of a prompt" if prompts else "tokens of a sequence", spread))
    facts += _languages(rows, languages)
    facts += _left_out(data, rows, split)
    if data.unread[split]:
        facts.append(("keys that no setting reads", count_keys(data.unread[split])))
    if data.extra_stops[split]:
        facts.append(("own stop tokens of answers", f"{data.extra_stops[split]:,} rows: trained with one"))
    samples = module.samples_per_prompt if prompts and isinstance(module, DrawsSamples) else 1
    planned, problems = _plan(loader, tokens, [row * samples for row in lengths], samples, prompts)
    return Statistics(facts + planned, histogram(every), problems)


def histogram(values: Sequence[int], most: int = 10) -> list[Bar]:
    """Counts values in bars of a round width, at most ``most`` + 2 bars."""
    low, high = min(values), max(values)
    widths = (unit * 10**power for power in range(12) for unit in (1, 2, 5))
    width = next(w for w in widths if (high - low) / w <= most)
    counts = Counter(value // width for value in values)
    return [Bar(i * width, (i + 1) * width - 1, counts[i]) for i in range(low // width, high // width + 1)]


def _pairs(trees: Sequence[Tree]) -> list[tuple[str, str]]:
    pairs = [(tree, pair) for tree in trees for pair in tree.pairs]
    if not pairs:
        return []
    longer = sum(len(t.branches[p.better].input_ids) > len(t.branches[p.worse].input_ids) for t, p in pairs)
    return [("pairs", f"{len(pairs):,}; the better answer is the longer one in {longer / len(pairs):.1%}")]


def _languages(rows: TokenRows, named: Mapping[str, str]) -> list[tuple[str, str]]:
    counts = Counter(named.get(where, "none named") for where in rows.column("where"))
    if set(counts) == {"none named"}:
        return []
    return [("languages", ", ".join(f"{name} {n / len(rows):.1%}" for name, n in counts.most_common()))]


def _left_out(data: TreeDataModule[Any], rows: TokenRows, split: str) -> list[tuple[str, str]]:
    """Rows that the batches lack, or that were cut."""
    facts = []
    # held-out rows are read with those of training
    for part in dict.fromkeys((split, "val", "train") if data.sources.get(split) is None else (split,)):
        for bad in data.bad_rows.get(part, ()):
            name = "left out" if part == split else f"left out of {part}"
            facts += [(name, f"{n:,} x {kind}; first {bad.first[kind]}") for kind, n in bad.counts.most_common()]
    cut = sum(rows.column("cut"))
    if cut:
        facts.append(("cut", f"{cut:,} rows at max_length: the loss never reads their stop token"))
    return facts or [("left out or cut", "none")]


def _plan(
    loader: PlannedLoader, tokens: Sequence[int], lengths: Sequence[Sequence[int]], samples: int, prompts: bool
) -> tuple[list[tuple[str, str]], list[str]]:
    """The plan of an epoch, and the padding that packing avoids."""
    planner, problems = loader.planner, []
    try:
        steps = planner.steps(0)
    except ValueError as error:  # a bin over max_tokens
        problems = [str(error)]
        steps = dataclasses.replace(planner, max_tokens=None).steps(0)
    dealt = [b.rows for step in steps for b in step if b.rows]
    bins = [sum(tokens[row] for row in b) for b in dealt]
    padded = 0
    for b in dealt:
        sequences = [n for row in b for n in lengths[row]]
        padded += len(sequences) * max(sequences)
    step, batch, of = (
        ("iterations", "prompts' tokens", "prompts") if prompts else ("steps", "micro-batches", "sequences")
    )
    parts = planner.micro_batches * planner.ranks
    dealt_to = f", each dealt into {planner.micro_batches} micro-batches x {planner.ranks} ranks" if parts > 1 else ""
    bound = f"; max_tokens is {planner.max_tokens:,}" if planner.max_tokens else ""
    spread = f"{min(bins):,} to {max(bins):,} tokens, {statistics.fmean(bins):,.0f} in the mean{bound}"
    often = f" with each prompt {samples} times" if samples > 1 else ""
    once = "once" if samples > 1 else "packed"
    padding = f"{padded:,} tokens as padded batches{often}, {sum(bins):,} {once}: {padded / sum(bins):.2f} times"
    facts = [
        (f"{step} of an epoch", f"{len(steps):,} of {planner.batch_size:,} {of}{dealt_to}"),
        (batch, spread),
        ("padding avoided", padding),
    ]
    return facts, problems
