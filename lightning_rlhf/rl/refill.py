"""Dynamic sampling: further prompts in the place of those whose groups are flat."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_rlhf.rewards import Samples, Scores
from lightning_rlhf.rl.experience import Experience
from lightning_rlhf.rl.records import Sampled
from lightning_rlhf.rl.settings import Groups
from lightning_rlhf.rollout import Completion
from lightning_rlhf.utils.collectives import data_rank, gather_objects


class Round(NamedTuple):
    """Prompts that were sampled together.

    Attributes:
        completions: Completions of each.
        experience: They and their scores.
        samples: What rewards read of them; None where this rank has none.
        flat: (B,) bool: which groups teach nothing.
    """

    completions: list[list[Completion]]
    experience: Experience
    samples: Samples | None
    flat: Tensor


class Refill:
    """Rounds of prompts until enough groups are kept: dynamic sampling (DAPO, Yu et al. 2025, sec. 3.2).

    The prompts of all ranks stand in one order, so that what is sampled and kept does not depend on who holds them. The
    first round takes ``wanted`` of them, each further one ``spare``.

    Args:
        order: Rank, and index on that rank, of each prompt of the batch that may be sampled.
        resting: Further prompts of the batch, which may not.
        settings: How many prompts are held back.

    Attributes:
        wanted: Number of groups to learn from.
        found: Number of groups that all ranks kept.
        rounds: Further rounds that were needed.
        left_over: Prompts that were not sampled, and groups that were sampled and not needed.
        seen: The rounds.
    """

    def __init__(self, order: Sequence[tuple[int, int]], resting: int, settings: Groups) -> None:
        self.order, self.settings, self.rank = order, settings, data_rank()
        # the last batch of an epoch may be small
        self.wanted = max(1, len(order) + resting - settings.spare * settings.rounds)
        self.found = self.rounds = self.left_over = 0
        self.seen: list[Round] = []
        self._kept: dict[int, tuple[int, int]] = {}  # by place in the order: round, and number in it
        self._learned: set[tuple[int, int]] = set()

    def run(self, sample: Callable[[list[int]], Round]) -> None:
        """Samples rounds until enough groups are kept; all ranks must call.

        Args:
            sample: Samples and scores those of this rank's prompts that it is given, possibly none, on all ranks.
        """
        for number, places in enumerate(self._rounds()):
            found = sample([self.order[p][1] for p in places])
            self.seen.append(found)
            self._kept |= {places[i]: (number, i) for i in (~found.flat).nonzero()[:, 0].tolist()}

    def _rounds(self) -> Iterator[list[int]]:
        """This rank's places in the order, of each round; all ranks make the same rounds."""
        start, end = 0, min(self.wanted, len(self.order))
        while True:
            yield [p for p in range(start, end) if self.order[p][0] == self.rank]
            self.found = sum(gather_objects(len(self._kept)))
            if self.found >= self.wanted or self.rounds == self.settings.rounds or end == len(self.order):
                self.left_over = max(0, self.found - self.wanted) + len(self.order) - end
                return
            start, end, self.rounds = end, min(end + self.settings.spare, len(self.order)), self.rounds + 1

    def kept(self) -> tuple[list[int], list[list[Completion]], Scores]:
        """This rank's groups among the first ``wanted`` that all ranks kept; all ranks must call.

        Returns:
            Their prompts, in the order of the batch, their completions, and the scores of these.
        """
        first = sorted(place for places in gather_objects(list(self._kept)) for place in places)[: self.wanted]
        mine = sorted((self.order[p][1], *self._kept[p]) for p in first if p in self._kept)
        self._learned = {(r, i) for _, r, i in mine}
        completions = [self.seen[r].completions[i] for _, r, i in mine]
        return [prompt for prompt, _, _ in mine], completions, _join([_scores_of(self.seen[r], i) for _, r, i in mine])

    def left_out(self) -> list[Sampled]:
        """This rank's groups that are not learned from, after :meth:`kept`."""
        rounds = self.seen if self.found else self.seen[:-1]  # where all are flat, the last round stands for them
        return [
            Sampled(e, each.samples, [i for i in range(len(e.trees)) if (r, i) not in self._learned])
            for r, each in enumerate(rounds)
            for e in [each.experience]
        ]


def _scores_of(found: Round, number: int) -> Scores:
    """The scores of a group's completions."""
    scored, own = found.experience.scored, found.experience.group == number
    assert scored is not None
    parts, extras = ({name: c.cpu()[own] for name, c in each.items()} for each in (scored.parts, scored.extras))
    return Scores(scored.total.cpu()[own], parts, extras=extras)


def _join(groups: Sequence[Scores]) -> Scores:
    """The scores of several groups, one after the other."""
    nothing = torch.zeros(0)
    parts = {
        name: torch.cat([nothing, *(g.parts[name] for g in groups)]) for name in (groups[0].parts if groups else ())
    }
    names = dict.fromkeys(name for g in groups for name in g.extras)
    extras = {
        name: torch.cat([g.extras.get(name, torch.full_like(g.total, torch.nan)) for g in groups]) for name in names
    }
    return Scores(torch.cat([nothing, *(g.total for g in groups)]), parts, extras=extras)
