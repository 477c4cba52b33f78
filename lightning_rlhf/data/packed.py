"""A batch as one row of tokens: every prompt once, followed by its completions.

Shapes: T packed tokens, N scored tokens, S sequences (branches), B trees, P pairs of compared completions, L
completions with a label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate, groupby
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.utils.transfer import send


class Branch(NamedTuple):
    """A completion. Its tokens follow a prompt, and the loss reads some of them.

    Attributes:
        input_ids: The completion's tokens, at least one.
        scored: For each token, whether a loss reads it; None means all.
    """

    input_ids: Sequence[int]
    scored: Sequence[bool] | None = None

    @property
    def num_scored(self) -> int:
        """Tokens that the loss reads."""
        return len(self.input_ids) if self.scored is None else sum(self.scored)


class Pair(NamedTuple):
    """Two completions of one tree, the first better than the second.

    Attributes:
        better: Number of the better branch in its tree.
        worse: Number of the other one.
        margin: By how much the better one should win.
        weight: Weight of the pair in a loss.
    """

    better: int
    worse: int
    margin: float = 0.0
    weight: float = 1.0


class Tree(NamedTuple):
    """A prompt of at least one token and the completions that continue it.

    Attributes:
        prompt: Tokens that are never scored.
        branches: At least one completion.
        weight: Weight of its scored tokens in a loss. A tree of weight 0 only fills an empty bin.
        pairs: Which completions are better than which.
        origin: Number of the row's source and language, for separate metrics.
        labels: For each completion, whether it is good; empty where nobody says.
    """

    prompt: Sequence[int]
    branches: Sequence[Branch]
    weight: float = 1.0
    pairs: Sequence[Pair] = ()
    origin: int = 0
    labels: Sequence[bool] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the tree takes in a packed row."""
        return len(self.prompt) + sum(len(b.input_ids) for b in self.branches)

    @property
    def num_scored(self) -> int:
        """Tokens that the loss reads."""
        return sum(branch.num_scored for branch in self.branches)

    @property
    def size(self) -> Size:
        """What the planner needs to know about the tree."""
        return Size(self.num_tokens, StepTotals.of([self]))


class Span(NamedTuple):
    """The place of a prompt or branch in the packed row."""

    start: int
    length: int


class Attend(NamedTuple):
    """Sequences that lie side by side, and attend alike: to all of ``prefix`` and, causally, to themselves.

    Either a prompt, or the branches of one, or whole sequences of the same length.

    Attributes:
        own: The place of all of them.
        lengths: Tokens of each.
        prefix: The place of their prompt; None if they see themselves only.
    """

    own: Span
    lengths: tuple[int, ...]
    prefix: Span | None = None


@dataclass(eq=False)
class Forest:
    """The places of the trees in a packed row. Attention layers get it as a keyword; it stays on the host.

    Attributes:
        trees: For each tree the span of its prompt and the spans of its branches.
        masks: Attention masks of any kind, which all layers of a forward pass share.
    """

    trees: tuple[tuple[Span, tuple[Span, ...]], ...]
    masks: dict[Any, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Lists the attention calls. A tree with one branch is a plain causal sequence."""
        calls: list[Attend] = []
        for prompt, branches in self.trees:
            lengths = tuple(branch.length for branch in branches)
            if len(branches) == 1:
                length = prompt.length + lengths[0]
                last = calls[-1] if calls else None
                if last is not None and last.prefix is None and last.lengths[0] == length:
                    calls[-1] = Attend(Span(last.own.start, last.own.length + length), (*last.lengths, length))
                else:
                    calls.append(Attend(Span(prompt.start, length), (length,)))
            else:
                calls.append(Attend(prompt, (prompt.length,)))
                if branches:
                    calls.append(Attend(Span(branches[0].start, sum(lengths)), lengths, prompt))
        self.calls: tuple[Attend, ...] = tuple(calls)

    def mask(self, prefix: int, own: int, window: int | None, device: torch.device) -> Tensor:
        """(own, prefix + own) bool, True where a query may look: causal, and at most ``window`` tokens back."""
        key = (prefix, own, window, device)
        if key not in self.masks:
            causal = torch.ones(own, prefix + own, dtype=torch.bool, device=device).tril(prefix)
            self.masks[key] = causal if window is None else causal.triu(prefix - window + 1)
        mask: Tensor = self.masks[key]
        return mask


def _total(count: Callable[[Tree], float]) -> Any:
    return field(default=0.0, metadata={"count": count})


@dataclass(unsafe_hash=True)  # not frozen: FSDP's precision plugin refuses a batch that holds a frozen dataclass
class StepTotals:
    """Totals over all bins and ranks of the optimizer step that a batch belongs to.

    A further total is one line: its name, and what a tree adds to it. Packing, the token cache and the planner go by
    these lines.

    Attributes:
        tokens: Scored tokens by weight.
        sequences: Sequences by weight.
        pairs: Pairs by weight.
        good: Completions that are labeled good.
        bad: Completions that are labeled bad.
        bins: Micro-batches of all ranks (``accumulate_grad_batches`` x data-parallel size): a mean over the step is
            ``loss_sum * bins / tokens``, since Lightning divides by the first factor and the ranks by the second.
    """

    tokens: float = _total(lambda tree: tree.weight * tree.num_scored)
    sequences: float = _total(lambda tree: tree.weight * len(tree.branches))
    pairs: float = _total(lambda tree: sum(pair.weight for pair in tree.pairs))
    good: float = _total(lambda tree: sum(tree.labels))
    bad: float = _total(lambda tree: len(tree.labels) - sum(tree.labels))
    bins: int = 1

    @classmethod
    def of(cls, trees: Sequence[Tree]) -> StepTotals:
        """The totals of some trees in one bin."""
        sums: dict[str, Any] = {name: sum(count(tree) for tree in trees) for name, count in _COUNTS.items()}
        return cls(**sums)


#: What a tree adds to each total.
_COUNTS: dict[str, Callable[[Tree], float]] = {
    entry.name: entry.metadata["count"] for entry in fields(StepTotals) if entry.metadata
}


@dataclass(frozen=True)
class Size:
    """What the planner needs to know about a tree.

    Attributes:
        num_tokens: Tokens that it takes in a packed row.
        totals: What it adds to the totals of its step.
    """

    num_tokens: int
    totals: StepTotals

    #: Names of ``numbers``, in order.
    NAMES: ClassVar[tuple[str, ...]] = ("num_tokens", *_COUNTS)

    @property
    def numbers(self) -> list[float]:
        """The size as a row of numbers."""
        return [float(self.num_tokens), *(float(getattr(self.totals, name)) for name in _COUNTS)]

    @classmethod
    def of_numbers(cls, numbers: Sequence[float]) -> Size:
        """The inverse of ``numbers``."""
        totals: dict[str, Any] = dict(zip(_COUNTS, numbers[1:], strict=True))
        return cls(int(numbers[0]), StepTotals(**totals))


class Pairs(NamedTuple):
    """The compared completions of a batch.

    Attributes:
        better: (P,) sequence of the better completion.
        worse: (P,) sequence of the other one.
        margin: (P,) fp32, by how much the better one should win.
        weight: (P,) fp32 weight in a loss.
        origin: (P,) origin of the pair's tree.
    """

    better: Tensor
    worse: Tensor
    margin: Tensor
    weight: Tensor
    origin: Tensor


class Labels(NamedTuple):
    """The completions of a batch that are labeled good or bad.

    Attributes:
        sequence: (L,) sequence of the completion.
        good: (L,) bool: whether it is good.
        origin: (L,) origin of the completion's tree.
    """

    sequence: Tensor
    good: Tensor
    origin: Tensor


@dataclass(eq=False)
class PackedBatch:
    """A batch in which a prompt's tokens appear once and its completions are branches.

    Attributes:
        input_ids: (T,) all tokens.
        position_ids: (T,) positions; each branch continues those of its prompt.
        forest: The places of the trees.
        predictor: (N,) index into T of the token that predicts a scored token. The prompt's last token predicts the
            first token of *every* branch.
        target: (N,) the scored tokens.
        sequence: (N,) the branch that a scored token belongs to.
        last: (S,) index into T of each branch's last token.
        weight: (N,) fp32 weight of each scored token.
        pairs: Which sequences are better than which; P = 0 in data without comparisons.
        labels: Which sequences are good and which are bad; L = 0 in data without labels.
        totals: Totals of the optimizer step; of this batch alone if no planner made it.
        rows: Row numbers of the trees in their data, to put predictions in order; empty if no planner made it.
        mismatched: The same prompts, each with as many completions of other prompts, for KTO's reference point; None
            in other data.
    """

    input_ids: Tensor
    position_ids: Tensor
    forest: Forest
    predictor: Tensor
    target: Tensor
    sequence: Tensor
    last: Tensor
    weight: Tensor
    pairs: Pairs
    labels: Labels
    totals: StepTotals
    rows: tuple[int, ...] = ()
    mismatched: PackedBatch | None = None

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.shape[0]

    @property
    def num_scored(self) -> int:
        """N."""
        return self.target.shape[0]

    @property
    def num_sequences(self) -> int:
        """S."""
        return self.last.shape[0]

    @property
    def lengths(self) -> Tensor:
        """(S,) tokens of each completion."""
        return torch.tensor([b.length for _, branches in self.forest.trees for b in branches], device=self.last.device)

    def _map(self, function: Any) -> PackedBatch:
        changed: dict[str, Any] = {
            f.name: function(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        changed |= {"pairs": Pairs(*map(function, self.pairs)), "labels": Labels(*map(function, self.labels))}
        if self.mismatched is not None:
            changed["mismatched"] = self.mismatched._map(function)
        return replace(self, forest=Forest(self.forest.trees), **changed)

    def to(self, device: torch.device | str, copy: bool = False) -> PackedBatch:
        """The same batch with its tensors on ``device``, without a wait for a GPU. Lightning calls this method.

        Args:
            device: Where the tensors go.
            copy: Copy also tensors that are there already.
        """
        return self._map(lambda t: t.to(device, copy=True) if copy else send(t, device))

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory."""
        return self._map(lambda t: t.pin_memory())


def pack(trees: Sequence[Tree], totals: StepTotals | None = None, rows: Sequence[int] = ()) -> PackedBatch:
    """Lays trees out in one row.

    Args:
        trees: At least one tree.
        totals: Totals of the optimizer step. Default: those of ``trees``.
        rows: The trees' row numbers in their data.

    Returns:
        The packed batch.

    Raises:
        ValueError: There is no tree, a prompt or completion is empty, ``scored`` and its tokens differ in length, or a
            tree has labels for some of its completions.
    """
    if not trees:
        raise ValueError("A packed batch needs at least one tree.")
    ids: list[int] = []
    positions: list[Tensor] = []
    spans: list[tuple[Span, tuple[Span, ...]]] = []
    predictor: list[Tensor] = []
    target: list[Tensor] = []
    sequence: list[Tensor] = []
    weight: list[Tensor] = []
    last: list[int] = []
    pairs: list[tuple[int, int, float, float, int]] = []
    labels: list[tuple[int, bool, int]] = []
    for i, tree in enumerate(trees):
        start, length = len(ids), len(tree.prompt)
        if not length or not tree.branches:
            raise ValueError(f"Tree {i} needs a prompt of at least one token and at least one completion.")
        pairs.extend((len(last) + p.better, len(last) + p.worse, p.margin, p.weight, tree.origin) for p in tree.pairs)
        if tree.labels and len(tree.labels) != len(tree.branches):
            raise ValueError(f"Tree {i} has {len(tree.labels)} labels for {len(tree.branches)} completions.")
        labels.extend((len(last) + j, good, tree.origin) for j, good in enumerate(tree.labels))
        ids.extend(tree.prompt)
        positions.append(torch.arange(length))
        branches = []
        for j, branch in enumerate(tree.branches):
            first, size = len(ids), len(branch.input_ids)
            if not size or (branch.scored is not None and len(branch.scored) != size):
                raise ValueError(f"Completion {j} of tree {i} is empty, or its 'scored' is not as long as its tokens.")
            ids.extend(branch.input_ids)
            positions.append(torch.arange(length, length + size))
            before = torch.arange(first - 1, first + size - 1)
            before[0] = start + length - 1
            tokens = torch.as_tensor(branch.input_ids, dtype=torch.long)
            if branch.scored is not None:
                keep = torch.as_tensor(branch.scored, dtype=torch.bool)
                before, tokens = before[keep], tokens[keep]
            predictor.append(before)
            target.append(tokens)
            sequence.append(torch.full_like(tokens, len(last)))
            weight.append(torch.full((len(tokens),), float(tree.weight)))
            branches.append(Span(first, size))
            last.append(first + size - 1)
        spans.append((Span(start, length), tuple(branches)))
    if totals is None:
        totals = StepTotals.of(trees)
    better, worse, margin, pair_weight, origin = zip(*pairs, strict=True) if pairs else ((),) * 5
    labeled, good, origin_of = zip(*labels, strict=True) if labels else ((),) * 3
    return PackedBatch(
        input_ids=torch.tensor(ids, dtype=torch.long),
        position_ids=torch.cat(positions),
        forest=Forest(tuple(spans)),
        predictor=torch.cat(predictor),
        target=torch.cat(target),
        sequence=torch.cat(sequence),
        last=torch.tensor(last),
        weight=torch.cat(weight),
        pairs=Pairs(
            torch.tensor(better, dtype=torch.long),
            torch.tensor(worse, dtype=torch.long),
            torch.tensor(margin, dtype=torch.float32),
            torch.tensor(pair_weight, dtype=torch.float32),
            torch.tensor(origin, dtype=torch.long),
        ),
        labels=Labels(
            torch.tensor(labeled, dtype=torch.long),
            torch.tensor(good, dtype=torch.bool),
            torch.tensor(origin_of, dtype=torch.long),
        ),
        totals=totals,
        rows=tuple(rows),
    )


def unpack(batch: PackedBatch) -> list[Tree]:
    """The trees of a batch, the inverse of :func:`pack`. Trees without pairs and labels lose their origin."""
    scored = [torch.zeros(branch.length, dtype=torch.bool) for _, branches in batch.forest.trees for branch in branches]
    starts = [branch.start for _, branches in batch.forest.trees for branch in branches]
    weights = [1.0] * len(starts)
    prompt_ends = {p.start + p.length - 1 for p, _ in batch.forest.trees}
    for predictor, s, w in zip(batch.predictor.tolist(), batch.sequence.tolist(), batch.weight.tolist(), strict=True):
        scored[s][0 if predictor in prompt_ends else predictor + 1 - starts[s]] = True
        weights[s] = w
    tree_of = [(t, j) for t, (_, branches) in enumerate(batch.forest.trees) for j in range(len(branches))]
    pairs: list[list[Pair]] = [[] for _ in batch.forest.trees]
    origins = [0] * len(pairs)
    for better, worse, margin, w, origin in zip(*(column.tolist() for column in batch.pairs), strict=True):
        tree, number = tree_of[better]
        pairs[tree].append(Pair(number, tree_of[worse][1], margin, w))
        origins[tree] = origin
    labels: list[list[bool]] = [[] for _ in batch.forest.trees]
    for sequence, good, origin in zip(*(column.tolist() for column in batch.labels), strict=True):
        labels[tree_of[sequence][0]].append(good)
        origins[tree_of[sequence][0]] = origin
    ids = batch.input_ids.tolist()

    def cut(span: Span) -> list[int]:
        return ids[span.start : span.start + span.length]

    trees, i = [], 0
    for t, (prompt, spans) in enumerate(batch.forest.trees):
        branches = [
            Branch(cut(b), None if scored[i + j].all() else scored[i + j].tolist()) for j, b in enumerate(spans)
        ]
        trees.append(Tree(cut(prompt), branches, weights[i], tuple(pairs[t]), origins[t], tuple(labels[t])))
        i += len(spans)
    return trees


def split(batch: PackedBatch, max_tokens: int) -> list[PackedBatch]:
    """Micro-batches of whole trees in order, each within ``max_tokens``. They keep the batch's totals.

    Raises:
        ValueError: One tree alone exceeds ``max_tokens``.
    """
    parts: list[list[int]] = [[]]
    used = 0
    trees = unpack(batch)
    for i, tree in enumerate(trees):
        if tree.num_tokens > max_tokens:
            raise ValueError(
                f"A tree of {tree.num_tokens} tokens does not fit into max_tokens={max_tokens}; raise it to at least "
                f"{tree.num_tokens}, or shorten the prompt or completions."
            )
        if parts[-1] and used + tree.num_tokens > max_tokens:
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += tree.num_tokens
    return [
        pack([trees[i] for i in part], batch.totals, [batch.rows[i] for i in part] if batch.rows else ()).to(
            batch.input_ids.device
        )
        for part in parts
    ]


def deal(batch: PackedBatch, parts: int) -> list[PackedBatch]:
    """Deals whole trees, in order, to at most ``parts`` batches of about equal numbers of tokens.

    Parts are views of the batch's tensors. They have its totals, and no pairs, labels or rows.

    Args:
        batch: The batch.
        parts: Maximum number of parts. There are fewer if trees are few, or differ much in size.
    """
    sizes = [prompt.length + sum(b.length for b in branches) for prompt, branches in batch.forest.trees]
    if parts == 1 or len(sizes) == 1:
        return [batch]
    ends = list(accumulate(sizes))
    scored = [0, *accumulate(batch.sequence.bincount(minlength=batch.num_sequences).tolist())]
    found: list[PackedBatch] = []
    token = sequence = 0
    for _, group in groupby(range(len(sizes)), lambda i: (2 * ends[i] - sizes[i]) * parts // (2 * ends[-1])):
        numbers = list(group)
        spans = [batch.forest.trees[i] for i in numbers]
        end, last = ends[numbers[-1]], sequence + sum(len(branches) for _, branches in spans)
        tokens, of_scored, of_sequences = (
            slice(token, end),
            slice(scored[sequence], scored[last]),
            slice(sequence, last),
        )
        moved = [
            (Span(p.start - token, p.length), tuple(Span(b.start - token, b.length) for b in branches))
            for p, branches in spans
        ]
        found.append(
            replace(
                batch,
                input_ids=batch.input_ids[tokens],
                position_ids=batch.position_ids[tokens],
                forest=Forest(tuple(moved)),
                predictor=batch.predictor[of_scored] - token,
                target=batch.target[of_scored],
                sequence=batch.sequence[of_scored] - sequence,
                last=batch.last[of_sequences] - token,
                weight=batch.weight[of_scored],
                pairs=Pairs(*(column[:0] for column in batch.pairs)),
                labels=Labels(*(column[:0] for column in batch.labels)),
                rows=(),
                mismatched=None,
            )
        )
        token, sequence = end, last
    return found


def within_budget(trees: Sequence[Tree], max_tokens: int | None, setting: str = "max_tokens") -> list[list[Tree]]:
    """Deals trees, in order, into packed rows of at most ``max_tokens`` tokens.

    A tree that exceeds it alone is cut between its completions, and its prompt is repeated. Its pieces have no pairs.
    It must have no labels.

    Args:
        trees: The trees.
        max_tokens: Maximum number of tokens per row; None for no limit.
        setting: Name of that limit in the error.

    Returns:
        The trees of each row, or pieces of them; no row if there are no trees.

    Raises:
        ValueError: A prompt and one completion alone exceed the limit.
    """
    if max_tokens is None:
        return [list(trees)] if trees else []
    rows: list[list[Tree]] = []
    room = 0
    for tree in trees:
        for piece in _cut_to(tree, max_tokens, setting):
            if piece.num_tokens > room:
                rows.append([])
                room = max_tokens
            rows[-1].append(piece)
            room -= piece.num_tokens
    return rows


def _cut_to(tree: Tree, max_tokens: int, setting: str) -> list[Tree]:
    """The tree, or as many pieces of it as needed."""
    if tree.num_tokens <= max_tokens:
        return [tree]
    pieces: list[Tree] = []
    room = 0
    for branch in tree.branches:
        size = len(branch.input_ids)
        if size > room:
            room = max_tokens - len(tree.prompt)
            pieces.append(tree._replace(branches=[], pairs=()))
        if size > room:
            needed = len(tree.prompt) + size
            raise ValueError(
                f"A prompt and its completion have {needed} tokens, over {setting}={max_tokens}: raise it to at least "
                f"{needed}, or shorten them."
            )
        pieces[-1] = tree._replace(branches=[*pieces[-1].branches, branch])
        room -= size
    return pieces


class PaddedBatch(NamedTuple):
    """The same batch as an (S, L) rectangle, padded on the right, for models that can't read trees.

    Attributes:
        input_ids: (S, L) tokens; padding is 0.
        attention_mask: (S, L) 1 on real tokens.
        row: (N,) row of the hidden state that predicts each scored token, in the order of the packed batch.
        column: (N,) column of that hidden state.
        last: (S,) column of each sequence's last token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    row: Tensor
    column: Tensor
    last: Tensor


def pad(batch: PackedBatch) -> PaddedBatch:
    """Unpacks a batch into a padded rectangle. Each prompt is repeated for each of its branches."""
    device = batch.input_ids.device
    pieces = [(p, b) for p, branches in batch.forest.trees for b in branches]
    width = max(p.length + b.length for p, b in pieces)
    index = torch.zeros(len(pieces), width, dtype=torch.long)
    mask = torch.zeros_like(index)
    for i, (prompt, branch) in enumerate(pieces):
        end = prompt.length + branch.length
        index[i, : prompt.length] = torch.arange(prompt.start, prompt.start + prompt.length)
        index[i, prompt.length : end] = torch.arange(branch.start, branch.start + branch.length)
        mask[i, :end] = 1
    index, mask = index.to(device), mask.to(device)
    return PaddedBatch(
        input_ids=batch.input_ids[index] * mask,
        attention_mask=mask,
        row=batch.sequence,
        column=batch.position_ids[batch.predictor],
        last=batch.position_ids[batch.last],
    )
