"""Groups of completions: what is counted of them, when a run of flat groups ends, and what settings contradict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_rlhf.functional import Algorithm
from lightning_rlhf.protocols import GivesPrompts
from lightning_rlhf.rewards import Reward, RewardError, Scores, WeightedSum
from lightning_rlhf.rl.experience import Experience
from lightning_rlhf.rl.settings import KL, Groups, Shaping
from lightning_rlhf.utils.collectives import all_reduce, gather_objects


def solved_groups(experience: Experience, pass_score: float) -> tuple[Tensor, Tensor]:
    """(B,) bool of which groups all completions pass, and of which none does."""
    size = torch.bincount(experience.group, minlength=len(experience.trees))
    passes = (experience.scores >= pass_score).float()
    passed = passes.new_zeros(len(size)).index_add(0, experience.group, passes)
    return passed == size, passed == 0


def group_metrics(
    seen: Sequence[tuple[Experience, Tensor]], pass_score: float, device: torch.device
) -> dict[str, float]:
    """Computes shares of prompts over all ranks; all ranks must call.

    Args:
        seen: Experiences with scores, each with whether its (B,) groups are flat.
        pass_score: A completion with at least this score passes.
        device: Where ranks exchange tensors.

    Returns:
        ``flat_groups``; ``solved``, of which all completions pass; and ``failed``, of which none does.
    """
    counts = torch.zeros(4)
    for experience, flat in seen:
        every = (flat, *solved_groups(experience, pass_score), torch.ones_like(flat))
        counts += torch.stack([column.float().sum() for column in every])
    *found, every_group = all_reduce(counts, device).tolist()
    return {k: n / max(every_group, 1) for k, n in zip(("flat_groups", "solved", "failed"), found, strict=True)}


def reward_parts(experience: Experience, reward: Reward, penalty: Tensor) -> tuple[Tensor, Tensor]:
    """(S, K) parts of a weighted reward, and last the penalty that shaping adds; (K,) their weights."""
    assert isinstance(reward, WeightedSum) and experience.scored is not None
    parts = [part.cpu().double() for part in experience.scored.parts.values()] or [penalty] * len(reward.names)
    return torch.stack([*parts, penalty], 1), torch.tensor([*reward.weights, 1.0])


def stop_at_flat(
    iterations: int, most: int | None, names: Sequence[str], last: Experience, setting: str = "groups.max_flat"
) -> None:
    """Ends a run whose groups have all been flat for too long; all ranks must call.

    Args:
        iterations: Number of iterations in a row in which all groups were flat.
        most: From how many on the run ends; None for no bound.
        names: The names of the reward's parts; none for a reward without parts.
        last: This rank's completions of the last iteration, with their scores.
        setting: Where ``most`` was given.

    Raises:
        RewardError: It ends; the message names the part of the reward that is constant, and says so if the length limit
            cut all completions: an environment then sees none of their turns.
    """
    if most is not None and iterations >= most:
        assert last.scored is not None
        all_cut = all(gather_objects(bool(last.truncated.all())))
        cut = " The length limit cut all completions of the last one." if all_cut else ""
        raise RewardError(
            f"All groups of the last {iterations} iterations are flat, so nothing is learned: "
            f"{constant_scores(names, last.scored)}.{cut} Look at completions (SampleCompletions), choose prompts that "
            f"are neither too easy nor too hard or a finer reward, or set {setting}: null."
        )


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
