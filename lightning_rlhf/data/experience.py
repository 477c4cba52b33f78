"""What an iteration of reinforcement learning learns from: sampled completions, and numbers beside their tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_rlhf.data.packed import Branch, PackedBatch, Tree, pack, within_budget

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
        lengths = [branch.num_scored for tree in self.trees for branch in tree.branches]
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

        Raises:
            ValueError: A prompt and a completion that are over ``max_tokens`` alone.
        """
        ends = torch.tensor([0, *(tree.num_scored for tree in self.trees)]).cumsum(0).tolist()
        spans = [slice(ends[i], ends[i + 1]) for i in chosen]
        owners = [self.rows[i] for i in chosen for _ in self.trees[i].branches]
        begin, branch, parts = 0, 0, self.parts(chosen, max_tokens)
        columns = {k: torch.cat([v[s] for s in spans]).to(device) for k, v in self.tokens.items() if parts}
        for part in parts:
            end, rows = begin + sum(tree.num_scored for tree in part), []
            for tree in part:
                rows.append(owners[branch])
                branch += len(tree.branches)
            yield pack(part, rows=rows).to(device), {k: v[begin:end] for k, v in columns.items()}
            begin = end
        for _ in range(at_least - len(parts)):
            yield pack([FILLER]).to(device), {k: v.new_zeros(1, device=device) for k, v in self.tokens.items()}

    def parts(self, chosen: Sequence[int], max_tokens: int | None) -> list[list[Tree]]:
        """The micro-batches of the chosen trees; one that is over ``max_tokens`` is cut between its completions."""
        return within_budget([self.trees[i] for i in chosen], max_tokens, "micro_batch_tokens")
