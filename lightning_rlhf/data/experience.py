"""What an iteration of reinforcement learning learns from: sampled completions, and numbers beside their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.data.packed import Branch, PackedBatch, Tree, pack

#: Stands in where a rank has no tree left and others go on: one token that no loss counts.
FILLER = Tree([0], [Branch([0])], weight=0.0)


@dataclass(eq=False)
class Experience:
    """This rank's completions of an iteration, in trees, with a column of numbers for each thing known of a token.

    Attributes:
        trees: A prompt with its completions each; none where a rank got no prompt.
        rows: Number of each tree's prompt in the data, the same on whatever rank it is.
        tokens: Columns (N,) over the scored tokens of all trees in order, such as ``old_logprobs``.
        kept: What models said of it while it was scored, by role and with graphs, for the first update; None: it is not
            to be kept.
    """

    trees: list[Tree]
    rows: tuple[int, ...]
    tokens: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Any] | None = None

    @property
    def sequence(self) -> Tensor:
        """(N,) the sequence of each token."""
        lengths = [branch_length for tree in self.trees for branch_length in _scored(tree)]
        return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))

    def micro_batches(
        self, chosen: Sequence[int], max_tokens: int | None, device: torch.device, at_least: int = 0
    ) -> Iterator[tuple[PackedBatch, dict[str, Tensor]]]:
        """The chosen trees in order, packed within ``max_tokens``, with the columns of their tokens.

        Args:
            chosen: Indices of trees.
            max_tokens: Most tokens of a micro-batch; None puts all into one.
            device: Where to.
            at_least: Micro-batches that other ranks make; fillers, whose columns are zero, make up for those missing.

        Yields:
            A packed batch, and its (N,) columns.
        """
        ends = torch.tensor([0, *(sum(_scored(tree)) for tree in self.trees)]).cumsum(0).tolist()
        parts = cut([self.trees[i].num_tokens for i in chosen], max_tokens)
        for part in parts:
            mine = [chosen[i] for i in part]
            batch = pack([self.trees[i] for i in mine], rows=[self.rows[i] for i in mine]).to(device)
            spans = [slice(ends[i], ends[i + 1]) for i in mine]
            yield batch, {k: torch.cat([v[s] for s in spans]).to(device) for k, v in self.tokens.items()}
        for _ in range(at_least - len(parts)):
            yield pack([FILLER]).to(device), {k: v.new_zeros(1, device=device) for k, v in self.tokens.items()}


def cut(tokens: Sequence[int], max_tokens: int | None, setting: str = "micro_batch_tokens") -> list[list[int]]:
    """Items in order, cut wherever the next one would be over ``max_tokens``.

    Args:
        tokens: Of each item.
        max_tokens: Most tokens of a part; None for no bound.
        setting: What the limit is called, for the message.

    Returns:
        Indices of the items of each part.

    Raises:
        ValueError: One item alone is.
    """
    if not tokens:
        return []
    parts: list[list[int]] = [[]]
    used = 0
    for i, size in enumerate(tokens):
        if max_tokens is not None and size > max_tokens:
            raise ValueError(
                f"A prompt with its completions has {size} tokens, over {setting}={max_tokens}. Raise it to "
                f"{size}, or lower samples_per_prompt or sampling.max_new_tokens."
            )
        if parts[-1] and max_tokens is not None and used + size > max_tokens:
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += size
    return parts


def _scored(tree: Tree) -> list[int]:
    """Scored tokens of each completion."""
    return [len(b.input_ids) if b.scored is None else sum(b.scored) for b in tree.branches]
