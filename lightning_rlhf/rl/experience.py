"""What an iteration of reinforcement learning learns from: completions, and numbers per token and completion."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data import Branch, Message, PackedBatch, PromptBatch, Tree, pack
from lightning_rlhf.data.packed import Pair, within_budget
from lightning_rlhf.data.templates import turn_end
from lightning_rlhf.rewards import Samples, Scores
from lightning_rlhf.rollout import Completion
from lightning_rlhf.rollout.detokenizer import tail, tokens_of
from lightning_rlhf.utils.collectives import all_reduce

#: Takes the place of a micro-batch where a rank has none left and others go on: one token that no loss counts.
FILLER = Tree([0], [Branch([0])], weight=0.0)


_TOKEN, _SEQUENCE = {"per": "token"}, {"per": "sequence"}


def _unknown() -> Tensor:
    return torch.zeros(0)


@dataclass(eq=False)
class Experience:
    """Completions of this rank, or a micro-batch of them, with what is known of their tokens.

    The tensors are filled in during an iteration; one that is not known yet, or that an algorithm does not use, is
    empty. A subclass may add further ones.

    Attributes:
        trees: One tree per prompt, with its completions as branches; none where a rank got no prompt.
        rows: Number of each tree's prompt in the data, the same on whatever rank it is.
        rollout_logprobs: (N,) log-probs that the engine kept while it sampled.
        old_logprobs: (N,) log-probs of the policy before the updates of this iteration.
        reference_logprobs: (N,) log-probs of the reference.
        entropies: (N,) entropies of the policy before the updates, in nats.
        values: (N,) values of the critic before the updates.
        last_values: (S,) those after each completion's last token.
        returns: (N,) what the values are trained towards.
        advantages: (N,) how much better each token was than expected.
        weight: (N,) how much each token counts in the losses; 0 where its completion was dropped.
        share: (N,) how much each token counts in the denominator of their mean.
        factor: (N,) what the policy's loss of each token is multiplied by.
        scores: (S,) scores of the reward; NaN where a completion was dropped.
        truncated: (S,) whether the length limit ended the completion.
        scored: What the reward found, once it was asked.
        cached_outputs: Outputs of the scoring passes by role, with their graphs, for the first update; None where they
            are not kept.
        metrics: What is logged of it, by name.
    """

    trees: list[Tree]
    rows: tuple[int, ...]
    rollout_logprobs: Tensor = field(default_factory=_unknown, metadata=_TOKEN)
    old_logprobs: Tensor = field(default_factory=_unknown, metadata=_TOKEN)
    reference_logprobs: Tensor = field(default_factory=_unknown, metadata=_TOKEN)
    entropies: Tensor = field(default_factory=_unknown, metadata=_TOKEN)
    values: Tensor = field(default_factory=_unknown, metadata=_TOKEN)
    last_values: Tensor = field(default_factory=_unknown, metadata=_SEQUENCE)
    returns: Tensor = field(default_factory=_unknown, metadata=_TOKEN)
    advantages: Tensor = field(default_factory=_unknown, metadata=_TOKEN)
    weight: Tensor = field(default_factory=_unknown, metadata=_TOKEN)
    share: Tensor = field(default_factory=_unknown, metadata=_TOKEN)
    factor: Tensor = field(default_factory=_unknown, metadata=_TOKEN)
    scores: Tensor = field(default_factory=_unknown, metadata=_SEQUENCE)
    truncated: Tensor = field(default_factory=_unknown, metadata=_SEQUENCE)
    scored: Scores | None = None
    cached_outputs: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    _whole: PackedBatch | None = field(default=None, repr=False)
    _packs: dict[int | None, list[tuple[list[Tree], PackedBatch]]] = field(default_factory=dict, repr=False)

    @property
    def lengths(self) -> list[int]:
        """Number of scored tokens of each sequence."""
        return [branch.num_scored for tree in self.trees for branch in tree.branches]

    @property
    def sequence(self) -> Tensor:
        """(N,) the sequence of each token."""
        lengths = torch.tensor(self.lengths, dtype=torch.long)
        return torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    @property
    def group(self) -> Tensor:
        """(S,) the tree of each sequence."""
        sizes = torch.tensor([len(tree.branches) for tree in self.trees], dtype=torch.long)
        return torch.repeat_interleave(torch.arange(len(sizes)), sizes)

    @property
    def batch(self) -> PackedBatch:
        """All trees in one packed batch on the CPU; that of a micro-batch is on the device."""
        if self._whole is None:
            self._whole = pack(self.trees, rows=self.rows)
        return self._whole

    @property
    def counts(self) -> Tensor:
        """(N,) 1 for a token that counts in the losses, 0 where its completion was dropped."""
        return (self.weight > 0).to(self.weight)

    def sum_by_sequence(self, values: Tensor) -> Tensor:
        """(S,) sums of (N,) values over the tokens of each sequence."""
        sequence = self.sequence.to(values.device)
        return values.new_zeros(len(self.lengths)).index_add(0, sequence, values)

    def split_by_tokens(self, chosen: Sequence[int], max_tokens: int | None) -> list[list[Tree]]:
        """Splits the chosen trees, in order, into micro-batches.

        Args:
            chosen: Indices of trees.
            max_tokens: Most tokens of a micro-batch; None puts all into one. A tree that is larger alone is cut between
                its completions.

        Returns:
            The trees of each.

        Raises:
            ValueError: A prompt with one completion is over ``max_tokens``.
        """
        return within_budget([self.trees[i] for i in chosen], max_tokens, "updates.micro_batch_tokens")

    def _packed(self, chosen: Sequence[int], max_tokens: int | None) -> list[tuple[list[Tree], PackedBatch]]:
        """The trees of each micro-batch, packed on the CPU; those of all trees are packed once and kept.

        They are kept without what a forward pass adds to them: its attention masks are far larger than they are.
        """
        every = list(chosen) == list(range(len(self.trees)))
        if every and max_tokens in self._packs:
            return self._packs[max_tokens]
        splits = self.split_by_tokens(chosen, max_tokens)
        owners = [self.rows[i] for i in chosen for _ in self.trees[i].branches]
        found, branch = [], 0
        for trees in splits:
            rows = []
            for tree in trees:
                rows.append(owners[branch])
                branch += len(tree.branches)
            found.append((trees, self.batch if every and len(splits) == 1 else pack(trees, rows=rows)))
        if every:
            self._packs[max_tokens] = found
        return found

    def take(self, places: Sequence[tuple[int, Sequence[int], Sequence[Pair]]]) -> Experience:
        """An experience of some completions, each of which may be taken several times.

        Args:
            places: For each tree of the result: the number of a tree here, its branches to take, and pairs of them by
                their place among those.

        Returns:
            The experience, whose tokens and sequences keep what is known of them. It keeps no outputs and no metrics.
        """
        first = torch.tensor([0, *(len(tree.branches) for tree in self.trees)]).cumsum(0).tolist()
        ends = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        sequences = [first[i] + j for i, branches, _ in places for j in branches]
        tokens = [token for s in sequences for token in range(ends[s], ends[s + 1])]
        index = {"token": torch.tensor(tokens, dtype=torch.long), "sequence": torch.tensor(sequences, dtype=torch.long)}
        columns = {name: c[index[per]] for name, per in _columns(self) if len(c := getattr(self, name))}
        trees = [
            self.trees[i]._replace(branches=[self.trees[i].branches[j] for j in branches], pairs=tuple(pairs))
            for i, branches, pairs in places
        ]
        return dataclasses.replace(
            self,
            trees=trees,
            rows=tuple(self.rows[i] for i, _, _ in places),
            cached_outputs=None,
            metrics={},
            _whole=None,
            _packs={},
            **columns,
        )

    def micro_batches(
        self, chosen: Sequence[int], max_tokens: int | None, device: torch.device, at_least: int = 0
    ) -> Iterator[Experience]:
        """Experiences of the chosen trees, in order, each packed within ``max_tokens``.

        Args:
            chosen: Indices of trees.
            max_tokens: Most tokens of a micro-batch; None puts all into one.
            device: Where their tensors go, with one micro-batch at a time.
            at_least: Number of micro-batches that other ranks make; fillers with zeros make up for those missing here.

        Yields:
            Micro-batches that share ``cached_outputs``.

        Raises:
            ValueError: A prompt with one completion is over ``max_tokens``.
        """
        sizes = {"token": [t.num_scored for t in self.trees], "sequence": [len(t.branches) for t in self.trees]}
        spans = {per: torch.tensor([0, *size]).cumsum(0).tolist() for per, size in sizes.items()}
        columns, splits = {}, self._packed(chosen, max_tokens)
        for name, per in _columns(self):
            if len(column := getattr(self, name)) and splits:
                columns[name] = torch.cat([column[spans[per][i] : spans[per][i + 1]] for i in chosen]).to(device)
        begin = {"token": 0, "sequence": 0}
        for trees, batch in splits:
            end = {"token": begin["token"] + batch.num_scored, "sequence": begin["sequence"] + batch.num_sequences}
            own = {k: columns[k][begin[p] : end[p]] for k, p in _columns(self) if k in columns}
            yield self._part(trees, batch.to(device), own)  # which makes a batch without masks
            begin = end
        for _ in range(at_least - len(splits)):
            zeros = {name: getattr(self, name).new_zeros(1, device=device) for name, _ in _columns(self)}
            yield self._part([FILLER], pack([FILLER]).to(device), zeros)

    def _part(self, trees: list[Tree], batch: PackedBatch, columns: Mapping[str, Tensor]) -> Experience:
        unknown: dict[str, Any] = {name: _unknown() for name, _ in _columns(self)}
        return dataclasses.replace(
            self, trees=trees, rows=batch.rows, metrics={}, _whole=batch, _packs={}, **{**unknown, **columns}
        )


def _columns(experience: Experience) -> list[tuple[str, str]]:
    """Names of the tensors of an experience, each with what it has an entry per."""
    return [(f.name, f.metadata["per"]) for f in dataclasses.fields(experience) if "per" in f.metadata]


def to_experience(
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
    prompts: PromptBatch,
    completions: Sequence[Sequence[Completion]],
    device: torch.device,
) -> tuple[Experience, Samples]:
    """Prompts with their completions, as the losses and as rewards read them.

    Args:
        tokenizer: The policy's.
        stop_token_ids: Tokens that end a completion.
        prompts: B prompts, at least one.
        completions: Completions of each, at least one.
        device: Where what rewards read goes.

    Returns:
        The experience, which knows no scores yet, and the samples.
    """
    trees, read, shown = [], [], []
    for ids, prompt, group in zip(prompts.prompts, prompts.messages, completions, strict=True):
        if (first := group[0].episode) is not None:
            ids, prompt = first.prompt, first.opening
        trees.append(Tree(ids, [Branch(c.input_ids, _sampled(c)) for c in group]))
        read.append(Tree(ids, [_as_read(tokenizer, stop_token_ids, ids, prompt, c) for c in group]))
        shown.append(prompt)
    every = [completion for group in completions for completion in group]
    episodes = [completion.episode for completion in every if completion.episode is not None]

    def per_completion(values: Iterable[Any]) -> list[Any]:
        return [v for v, group in zip(values, completions, strict=True) for _ in group]

    batch = pack(read, rows=prompts.rows)
    samples = Samples(
        batch=batch.to(device),
        prompts=per_completion(shown),
        completions=[completion.text for completion in every],
        truncated=[completion.truncated for completion in every],
        columns={name: per_completion(column) for name, column in prompts.columns.items()},
        turns=[episode.turns for episode in episodes] or None,
        environment=[episode.reward for episode in episodes] or None,
    )
    logprobs = torch.tensor([logprob for completion in every for logprob in completion.logprobs])
    truncated = torch.tensor(samples.truncated, dtype=torch.bool)
    whole = batch if read == trees else None  # then it need not be packed again
    return Experience(trees, prompts.rows, rollout_logprobs=logprobs, truncated=truncated, _whole=whole), samples


def _sampled(completion: Completion) -> list[bool] | None:
    """For each token, whether the policy sampled it; None for all of them, as :class:`Branch` says it."""
    found = None if completion.episode is None else completion.episode.sampled
    return None if found is None or all(found) else found


def _as_read(
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
    ids: list[int],
    prompt: list[Message] | str,
    completion: Completion,
) -> Branch:
    """A completion as a reward reads it: a stop string at its end is replaced by the stop token."""
    own, text, sampled = completion.input_ids, completion.text, _sampled(completion)
    if completion.truncated or own[-1] in stop_token_ids:
        return Branch(own, sampled)
    before = 0
    if completion.episode is not None and sampled is not None:  # its last turn is what the stop string ended
        text, before = completion.episode.turns[-1]["content"], len(own) - sampled[::-1].index(False)
    end = None if isinstance(prompt, str) else turn_end(tokenizer)
    last = tokens_of(tokenizer, own[before:], text, tail(tokenizer, [*ids, *own[:before]]))
    last += [stop_token_ids[0] if end is None else end]
    return Branch([*own[:before], *last], None if sampled is None else [*sampled[:before], *[True] * len(last)])


class UpdateStats:
    """Statistics of one update, summed over its micro-batches and all ranks.

    All ranks add the same names in the same order, because all make the same number of micro-batches.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.peaks: dict[str, Tensor] = {}
        self.lows: dict[str, Tensor] = {}

    def add(self, weight: Tensor, **columns: Tensor) -> None:
        """Adds weighted sums.

        Args:
            weight: (N,) share of each token in the minibatch's mean.
            columns: (N,) values by name.
        """
        for name, column in columns.items():
            self.add_sums(**{name: (weight * column.detach()).sum()})

    def add_sums(self, **sums: Tensor) -> None:
        """Adds scalars that are sums already."""
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, torch.zeros(())) + value.detach().cpu()

    def peak(self, **values: Tensor) -> None:
        """Keeps the largest of some values, and 0."""
        for name, value in values.items():
            self.peaks[name] = torch.cat([value.detach().cpu(), self.peaks.get(name, torch.zeros(()))[None]]).max()

    def low(self, **values: Tensor) -> None:
        """Keeps the smallest of some values, and inf."""
        for name, value in values.items():
            before = self.lows.get(name, torch.tensor(torch.inf))
            self.lows[name] = torch.cat([value.detach().cpu().to(before), before[None]]).min()

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Sums, maxima and minima over all ranks, by name; all ranks must call."""
        found: dict[str, float] = {}
        kinds = dist.ReduceOp
        for part, operation in ((self.sums, kinds.SUM), (self.peaks, kinds.MAX), (self.lows, kinds.MIN)):
            if part:
                whole = all_reduce(torch.stack(list(part.values())), device, operation)
                found |= dict(zip(part, whole.tolist(), strict=True))
        return found
