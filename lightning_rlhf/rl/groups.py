"""Groups of completions: which prompts a refill samples, what is counted of groups, and what settings contradict."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lightning_rlhf.functional import Algorithm
from lightning_rlhf.protocols import GivesPrompts
from lightning_rlhf.rewards import Reward, Scores, WeightedSum
from lightning_rlhf.rl.experience import Experience
from lightning_rlhf.rl.settings import KL, Groups, Shaping
from lightning_rlhf.utils.collectives import all_reduce, gather_objects, world_size

_Group = TypeVar("_Group")


class Refill(Generic[_Group]):
    """Rounds of prompts until enough groups are kept: dynamic sampling (DAPO, Yu et al. 2025, sec. 3.2).

    The prompts of all ranks stand in one order, so that what is sampled and kept does not depend on who holds them. The
    first round takes ``wanted`` of them, each further one ``spare``.

    Args:
        order: Rank, and index on that rank, of each prompt of the batch.
        settings: How many prompts are held back.
        rank: This one, where there are several.

    Attributes:
        wanted: Number of groups to learn from.
        found: Number of groups that all ranks kept.
        rounds: Further rounds that were needed.
        left_over: Prompts that were not sampled, and groups that were sampled and not needed.
    """

    def __init__(self, order: Sequence[tuple[int, int]], settings: Groups, rank: int) -> None:
        self.order, self.settings, self.rank = order, settings, rank if world_size() > 1 else 0
        self.wanted = max(1, len(order) - settings.spare * settings.rounds)  # the last batch of an epoch may be small
        self.found = self.rounds = self.left_over = 0
        self._kept: dict[int, tuple[int, _Group]] = {}

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's prompts of each round; all ranks make the same rounds."""
        start, end = 0, self.wanted
        while True:
            self._places = [p for p in range(start, end) if self.order[p][0] == self.rank]
            yield [self.order[p][1] for p in self._places]
            self.found = sum(gather_objects(len(self._kept)))
            if self.found >= self.wanted or self.rounds == self.settings.rounds or end == len(self.order):
                self.left_over = max(0, self.found - self.wanted) + len(self.order) - end
                return
            start, end, self.rounds = end, min(end + self.settings.spare, len(self.order)), self.rounds + 1

    def keep(self, number: int, group: _Group) -> None:
        """Keeps a group of the current round, by its number in it."""
        place = self._places[number]
        self._kept[place] = (self.order[place][1], group)

    def kept(self) -> list[tuple[int, _Group]]:
        """This rank's prompts and groups among the first ``wanted`` that all ranks kept; all ranks must call."""
        first = sorted(place for places in gather_objects(list(self._kept)) for place in places)[: self.wanted]
        return sorted((self._kept[place] for place in first if place in self._kept), key=lambda kept: kept[0])


def group_metrics(
    seen: Sequence[tuple[Experience, Tensor, Tensor]], pass_score: float, device: torch.device
) -> dict[str, float]:
    """Computes shares of prompts over all ranks; all ranks must call.

    Args:
        seen: Experiences, each with the (S,) scores of its completions and whether its (B,) groups are flat.
        pass_score: A completion with at least this score passes.
        device: Where ranks exchange tensors.

    Returns:
        ``flat_groups``; ``solved``, of which all completions pass; and ``failed``, of which none does.
    """
    counts = torch.zeros(4)
    for experience, scores, flat in seen:
        size = torch.bincount(experience.group, minlength=len(experience.trees))
        passed = torch.zeros(len(size)).index_add(0, experience.group, (scores >= pass_score).float())
        counts += torch.stack([c.float().sum() for c in (flat, passed == size, passed == 0, size > 0)])
    *found, every = all_reduce(counts, device).tolist()
    return {k: n / max(every, 1) for k, n in zip(("flat_groups", "solved", "failed"), found, strict=True)}


def constant_scores(names: Sequence[str], scores: Scores) -> str:
    """Says which parts of a reward are the same for all completions of all ranks; all ranks must call.

    Args:
        names: The parts' names; none for a reward without parts.
        scores: This rank's.
    """
    columns = {name: scores.parts.get(name, scores.total) for name in names} or {"the score": scores.total}
    mine = {name: column[column.isfinite()].unique()[:2].tolist() for name, column in columns.items()}
    every = gather_objects(mine)
    values = {name: {v for found in every for v in found[name]} for name in columns}
    if not any(values.values()):
        return "no completion had a score, because the reward applied to none or its scores were dropped"
    constant = [f"{name} is {next(iter(v)):g} for all" for name, v in values.items() if len(v) == 1]
    return ", ".join(constant) or "scores differ between prompts, not within one"


def check_groups(algorithm: Algorithm, groups: Groups, samples: int, reward: Reward, kl: KL, shaping: Shaping) -> None:
    """Refuses settings that contradict each other.

    Raises:
        ValueError: The message says which, and what to set instead.
    """
    none, normalize = algorithm.baseline == "none", algorithm.combine == "normalize"
    for wrong, why in (
        (
            samples == 1 and not none,
            f"the baseline {algorithm.baseline} compares completions of one prompt, and "
            "rollout.samples_per_prompt is 1: set it to 2 or more, or choose algorithm reinforce++",
        ),
        (
            none and groups.flat_groups != "keep",
            f"groups.flat_groups {groups.flat_groups} is for algorithms that compare completions of one prompt: with "
            "the baseline none equal scores teach something too; set it to keep",
        ),
        (shaping.whiten, "shaping.whiten is for a critic: set it to false; algorithm.whiten scales advantages"),
        (
            normalize and not isinstance(reward, WeightedSum),
            "combine normalize (gdpo) standardizes each of several rewards: give reward as a list, or choose grpo",
        ),
        (
            normalize and (shaping.scale or shaping.clip is not None or (kl.coef > 0 and kl.where == "reward")),
            "combine normalize (gdpo) reads raw rewards: leave out shaping.scale and shaping.clip, and set kl.where "
            "to loss",
        ),
    ):
        if wrong:
            raise ValueError(f"GRPO: {why}.")


def check_spare(groups: Groups, data: object) -> None:
    """Refuses a refill that holds back whole batches of a data module.

    Raises:
        ValueError: The message says what to set instead.
    """
    held_back = groups.spare * groups.rounds
    if isinstance(data, GivesPrompts) and held_back >= (batch_size := data.batch_size):
        raise ValueError(
            f"groups.spare={groups.spare} x rounds={groups.rounds} holds back {held_back} prompts of a batch of "
            f"{batch_size}, so none is left to begin with: raise data.batch_size above {held_back}, or lower them."
        )
