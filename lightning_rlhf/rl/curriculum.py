"""Which prompts rest, because the policy solved them several times in a row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_warn

from lightning_rlhf.rl.settings import Groups
from lightning_rlhf.utils.collectives import gather_objects


class Curriculum:
    """Counts how often prompts are solved, and lets them rest; all ranks hold the same counts.

    Args:
        settings: After how many times a prompt rests, and for how long.

    Attributes:
        solved: By row, how often in a row its prompt was solved.
        resting: By row, the last iteration of its rest.
    """

    def __init__(self, settings: Groups) -> None:
        self.settings = settings
        self.solved: dict[int, int] = {}
        self.resting: dict[int, int] = {}

    def awake(self, rows: Sequence[int], iteration: int) -> tuple[list[int], int]:
        """Which of this rank's prompts do not rest; all ranks must call.

        Args:
            rows: Row of each.
            iteration: Number of the iteration.

        Returns:
            Their indices, and how many prompts of all ranks rest. If all would rest, none does.
        """
        if self.settings.rest_after is None:
            return list(range(len(rows))), 0
        self.resting = {row: last for row, last in self.resting.items() if last >= iteration}
        mine = [i for i, row in enumerate(rows) if row not in self.resting]
        awake, every = (sum(counts) for counts in zip(*gather_objects((len(mine), len(rows))), strict=True))
        return (mine, every - awake) if awake else (list(range(len(rows))), 0)

    def note(self, rows: Sequence[int], solved: Sequence[bool], iteration: int) -> None:
        """Counts the prompts that were sampled; all ranks must call.

        Args:
            rows: Row of each of this rank's.
            solved: Whether all completions of it pass.
            iteration: Number of the iteration.
        """
        if self.settings.rest_after is None:
            return
        every = gather_objects(list(zip(rows, solved, strict=True)))
        for row, passes in sorted(pair for pairs in every for pair in pairs):
            count = self.solved.pop(row, 0) + 1
            if passes and count >= self.settings.rest_after:
                self.resting[row] = iteration + self.settings.rest_for
            elif passes:
                self.solved[row] = count

    def state_dict(self) -> dict[str, dict[int, int]]:
        """The counts, for checkpoints."""
        return {"solved": dict(self.solved), "resting": dict(self.resting)}

    def load_state_dict(self, state: dict[str, dict[int, int]]) -> None:
        """Restores them, unless prompts rest no longer."""
        if self.settings.rest_after is None:
            return
        self.solved, self.resting = dict(state["solved"]), dict(state["resting"])


def warn_of_short_rest(settings: Groups, iterations: float) -> None:
    """Warns of a rest that ends before a prompt would come again.

    Args:
        settings: How long prompts rest.
        iterations: Iterations of an epoch.
    """
    if settings.rest_after is not None and settings.rest_for < iterations < math.inf:
        rank_zero_warn(
            f"groups.rest_for={settings.rest_for} is less than an epoch, which has {iterations:.0f} iterations: a "
            "prompt comes once an epoch, so most rests end before it comes again. Set it to several epochs."
        )
