"""Pairs of the completions of a prompt, and micro-batches in which pairs are whole."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Literal, NamedTuple

from lightning_rlhf.data import Tree, unpack
from lightning_rlhf.data.packed import PackedBatch, Pair
from lightning_rlhf.rl.experience import Experience

Choice = Literal["best_worst", "all"]


class Chosen(NamedTuple):
    """The pairs of an experience.

    Attributes:
        experience: Its prompts that have pairs, each with the completions that are in one.
        ties: Comparisons whose scores differ by no more than the margin, and pairs of equal completions.
        flat: Prompts without a pair.
    """

    experience: Experience
    ties: int
    flat: int


def choose_pairs(experience: Experience, scores: Sequence[float], choice: Choice, margin: float) -> Chosen:
    """Makes pairs of the completions of each prompt.

    Args:
        experience: B prompts with their completions.
        scores: (S,) what they are ranked by; one that is not finite is in no pair.
        choice: ``best_worst`` compares the best completion with the worst, ``all`` compares each two.
        margin: A pair's scores must differ by more.

    Returns:
        The pairs, and what made none.
    """
    places: list[tuple[int, list[int], list[Pair]]] = []
    ties = first = 0
    for i, tree in enumerate(experience.trees):
        own = scores[first : first + len(tree.branches)]
        first += len(own)
        ranked = sorted((j for j, score in enumerate(own) if math.isfinite(score)), key=lambda j: (-own[j], j))
        compared = list(combinations(ranked, 2)) if choice == "all" else [(ranked[0], ranked[-1])] if ranked[1:] else []
        tokens = [list(branch.input_ids) for branch in tree.branches]
        found = [(b, w) for b, w in compared if own[b] - own[w] > margin and tokens[b] != tokens[w]]
        ties += len(compared) - len(found)
        if found:
            places.append((i, *_renumber(found)))
    return Chosen(experience.take(places), ties, len(experience.trees) - len(places))


def cut_pairs(experience: Experience, chosen: Sequence[int], max_tokens: int | None) -> Experience:
    """Cuts the chosen trees so that each fits into a micro-batch with its pairs.

    Args:
        experience: Trees with pairs.
        chosen: Indices of trees.
        max_tokens: Most tokens of a micro-batch; None for no bound. A tree beyond it is taken in several pieces, each
            with some of its pairs and the completions of these.

    Returns:
        The pieces.

    Raises:
        ValueError: A prompt with the completions of one pair is over ``max_tokens``.
    """
    places: list[tuple[int, list[int], list[Pair]]] = []
    for i in chosen:
        tree = experience.trees[i]
        pieces: list[list[Pair]] = []
        for pair in tree.pairs:
            if pieces and (max_tokens is None or _size(tree, [*pieces[-1], pair]) <= max_tokens):
                pieces[-1].append(pair)
            else:
                pieces.append([pair])
            if max_tokens is not None and (needed := _size(tree, pieces[-1])) > max_tokens:
                raise ValueError(
                    f"A prompt and the two completions of a pair have {needed} tokens, over "
                    f"updates.micro_batch_tokens={max_tokens}: raise it to at least {needed}, or shorten them."
                )
        for piece in pieces:
            branches, numbered = _renumber([(pair.better, pair.worse) for pair in piece])
            kept = [new._replace(margin=p.margin, weight=p.weight) for new, p in zip(numbered, piece, strict=True)]
            places.append((i, branches, kept))
    return experience.take(places)


def pairs_of_data(batch: PackedBatch) -> Experience:
    """The trees of a batch that have pairs."""
    trees = [(i, tree) for i, tree in enumerate(unpack(batch)) if tree.pairs]  # an empty bin's filler has none
    return Experience([tree for _, tree in trees], tuple(batch.rows[i] if batch.rows else i for i, _ in trees))


def pair_weight(experience: Experience) -> float:
    """The weights of all pairs of this rank, added."""
    return float(sum(pair.weight for tree in experience.trees for pair in tree.pairs))


def _size(tree: Tree, pairs: Sequence[Pair]) -> int:
    branches = {number for pair in pairs for number in (pair.better, pair.worse)}
    return len(tree.prompt) + sum(len(tree.branches[j].input_ids) for j in branches)


def _renumber(pairs: Sequence[tuple[int, int]]) -> tuple[list[int], list[Pair]]:
    """The branches that are in pairs, in order, and the pairs by their places among those."""
    branches = sorted({number for pair in pairs for number in pair})
    place = {number: i for i, number in enumerate(branches)}
    return branches, [Pair(place[better], place[worse]) for better, worse in pairs]
