"""What stages that compare the completions of a prompt share: which groups are sampled, and which count."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_rlhf.data import PromptBatch
from lightning_rlhf.functional import flat_groups
from lightning_rlhf.metrics import TokenMean
from lightning_rlhf.rewards import Samples
from lightning_rlhf.rl import Experience, Groups
from lightning_rlhf.rl.curriculum import Curriculum, warn_of_short_rest
from lightning_rlhf.rl.groups import check_spare, group_metrics, solved_groups, stop_at_flat
from lightning_rlhf.rl.refill import Refill, Round
from lightning_rlhf.stages.rl import VALIDATION, RLStage

#: Key of the order in which prompts are sampled with ``refill``; epochs have the keys from 0.
_REFILL = -1


class GroupStage(RLStage):
    """Base of the stages whose completions of a prompt make a group.

    Attributes:
        groups: What happens to groups that teach nothing, and to prompts that are solved.
        flat_iterations: Iterations in a row in which all groups were flat.
        curriculum: How often prompts were solved, and which of them rest.
    """

    entries: ClassVar[Mapping[str, Any]] = {
        **RLStage.entries,
        "rl": (*RLStage.entries["rl"], "flat_iterations", "curriculum"),
    }
    groups: Groups
    curriculum: Curriculum
    flat_iterations: int = 0

    def use_groups(self, groups: Groups) -> None:
        """Takes the settings of groups; a subclass calls it at the end of its constructor."""
        self.groups, self.curriculum = groups, Curriculum(groups)
        for stage in ("val", "test"):
            self.metrics.declare(stage, **{self.pass_at: TokenMean()})

    @property
    def pass_at(self) -> str:
        """Name of the metric: ``pass@8`` for 8 completions per prompt."""
        return f"pass@{self.samples_per_prompt}"

    # ------------------------------------------------------------------------------------------------- groups

    def run_rollout(self, prompts: PromptBatch, iteration: int) -> tuple[Experience, Samples | None]:
        """Samples completions of prompts that do not rest; with ``refill``, until enough groups are not flat."""
        if iteration == VALIDATION:
            return super().run_rollout(prompts, iteration)
        awake, resting = self.curriculum.awake(prompts.rows, iteration)
        prompts = prompts.select(awake)
        if self.groups.flat_groups == "refill":
            experience, samples = self._refill(prompts, resting, iteration)
        else:
            experience, samples = super().run_rollout(prompts, iteration)
        if self.groups.rest_after is not None:
            experience.metrics["resting"] = resting
        return experience, samples

    def _refill(self, prompts: PromptBatch, resting: int, iteration: int) -> tuple[Experience, Samples | None]:
        """Samples completions of further prompts of the batch until enough groups are not flat."""
        copies = self.count_copies(prompts.rows, iteration)

        def sample(chosen: list[int]) -> Round:
            part = prompts.select(chosen)
            completions = self.sample_completions(part, iteration, [copies[i] for i in chosen])
            experience, samples = self.to_experience(part, completions)
            experience.scored = self.score(samples)
            experience.scores = experience.scored.total.cpu()
            return Round(completions, experience, samples, self._flat(experience))

        order = self.shuffle_prompts(prompts.rows, _REFILL)
        refill = Refill(order, resting, self.groups)
        refill.run(sample)
        chosen, completions, scores = refill.kept()
        self.sampled = refill.left_out()
        # where all groups are flat, the last round stands for them: it is scored, and nothing of it counts
        experience, samples = refill.seen[-1].experience, refill.seen[-1].samples
        if refill.found:
            experience, samples = self.to_experience(prompts.select(chosen), completions)
            experience.scored = scores
        self._count_groups(experience, [(each.experience, each.flat) for each in refill.seen])
        experience.metrics |= {"rounds": refill.rounds, "left_over": refill.left_over}
        return experience, samples

    def _count_groups(self, experience: Experience, seen: list[tuple[Experience, Tensor]]) -> None:
        experience.metrics |= group_metrics(seen, self.groups.pass_score, self.device)
        rows = [row for each, _ in seen for row in each.rows]
        solved = [s for each, _ in seen for s in solved_groups(each, self.groups.pass_score)[0].tolist()]
        self.curriculum.note(rows, solved, self.iteration)

    def score_experience(self, experience: Experience, samples: Samples | None) -> None:
        """Scores an experience, and counts its groups; all ranks must call.

        Raises:
            RewardError: All groups were flat for ``groups.max_flat`` iterations.
        """
        super().score_experience(experience, samples)
        assert experience.scored is not None
        if "flat_groups" not in experience.metrics:  # otherwise the refill has counted all that it sampled
            self._count_groups(experience, [(experience, self._flat(experience))])
        self.flat_iterations = self.flat_iterations + 1 if experience.metrics["flat_groups"] == 1 else 0
        stop_at_flat(self.flat_iterations, self.groups.max_flat, self.reward.names, experience)

    def counted_completions(self, experience: Experience) -> Tensor:
        """(S,) bool: completions with a score, without those of flat groups unless these are kept."""
        counted, flat = super().counted_completions(experience), self._flat(experience)
        return counted if self.groups.flat_groups == "keep" else counted & ~flat[experience.group]

    def _flat(self, experience: Experience) -> Tensor:
        """(B,) bool: which groups have one score, penalties included."""
        return flat_groups(self.penalized_scores(experience), experience.group)

    def _used(self, experience: Experience, values: Tensor) -> Tensor:
        """(S,) 1 for completions that count in statistics of the batch: not those of groups that were dropped."""
        dropped = self._flat(experience)[experience.group] & (self.groups.flat_groups != "keep")
        return (values.isfinite() & ~dropped).double()

    # ------------------------------------------------------------------------------------------------- hooks

    def forget(self) -> None:
        """As the base, and what is counted of groups."""
        super().forget()
        self.flat_iterations, self.curriculum = 0, Curriculum(self.groups)

    def check_fit(self) -> None:
        """As the base; refuses a refill that holds back whole batches."""
        super().check_fit()
        check_spare(self.groups, getattr(self.trainer, "datamodule", None))

    def on_train_start(self) -> None:
        """Warns of a rest that ends before a prompt would come again."""
        super().on_train_start()
        warn_of_short_rest(self.groups, self.trainer.num_training_batches)

    def on_empty_minibatch(self) -> None:
        """No completion of a minibatch counts: its groups are flat, which is no fault."""

    def update_metrics(self, stage: str, experience: Experience, scores: Tensor) -> None:
        """Updates pass@k: the share of prompts of which at least one completion passes."""
        passed = (scores.cpu() >= self.groups.pass_score).float()
        solved = passed.new_zeros(len(experience.trees)).scatter_reduce(0, experience.group, passed, "amax")
        self.metrics.update(stage, torch.ones_like(solved).to(self.device), **{self.pass_at: solved.to(self.device)})
