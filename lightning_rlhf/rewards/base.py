"""What every reward is: sampled completions in, one score each out."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_rlhf.data import Message, PackedBatch
from lightning_rlhf.utils.processes import one_process
from lightning_rlhf.utils.text import show


@dataclass(eq=False)
class Samples:
    """Completions to score: S of them, in the order of the batch's branches.

    Attributes:
        batch: The prompts' tokens with the completions' as branches: exactly those that were sampled; of a completion
            that a stop string ended, those before it and then the stop token, as its text would have been ended.
        prompts: (S,) what each completion answers: messages, or a plain text.
        completions: (S,) their texts.
        truncated: (S,) whether the length limit ended them.
        columns: Further columns of the prompts' rows, each (S,).
        iteration: Number of the iteration in which they were sampled, from 0; None where nothing is learned from them:
            in validation, in predictions, in ``lightning-rlhf verify``.
        turns: (S,) what policy and environment said by turns, where an environment took part.
        environment: (S,) the sums of the environment's rewards, where one took part.
    """

    batch: PackedBatch
    prompts: list[list[Message] | str]
    completions: list[str]
    truncated: list[bool]
    columns: dict[str, list[Any]]
    iteration: int | None = None
    turns: list[list[Message]] | None = None
    environment: list[float] | None = None

    def __post_init__(self) -> None:
        sizes: dict[str, list[Any] | None] = {
            "prompts": self.prompts,
            "completions": self.completions,
            "truncated": self.truncated,
            **self.columns,
            "turns": self.turns,
            "environment": self.environment,
        }
        for name, values in sizes.items():
            if values is not None and len(values) != self.batch.num_sequences:
                raise ValueError(f"{name} has {len(values)} entries for {self.batch.num_sequences} completions.")

    @property
    def spoken(self) -> list[list[Message]]:
        """(S,) the messages of each completion: its turns, or the one answer that it is."""
        answers = [[Message(role="assistant", content=text)] for text in self.completions]
        return answers if self.turns is None else self.turns

    def copy(self) -> Samples:
        """The same samples, in tensors and lists of their own."""
        return Samples(
            batch=self.batch.to(self.batch.last.device, copy=True),
            prompts=[copy.deepcopy(prompt) for prompt in self.prompts],  # one each, where completions share a prompt
            completions=list(self.completions),
            truncated=list(self.truncated),
            columns={name: [copy.deepcopy(value) for value in values] for name, values in self.columns.items()},
            iteration=self.iteration,
            turns=copy.deepcopy(self.turns),
            environment=copy.copy(self.environment),
        )


#: Entries of a score that say why a verifier could not judge a completion.
FAULTS = ("timeout", "error")


class Scores(NamedTuple):
    """The result of a reward.

    Attributes:
        total: (S,) scores in fp32.
        parts: (S,) scores by name of what they were summed from, for logging; empty for a reward without parts.
        absent: (S,) bool: where no reward applies, so that the score is NaN and no fault. Default: nowhere.
        extras: (S,) further numbers by name, NaN where there is none: for the table of completions, and as means for
            logging. In a sum a name is ``part/name``. Those called :data:`FAULTS` are 1 where a verifier could not
            judge a completion; they are summed.
    """

    total: Tensor
    parts: Mapping[str, Tensor] = MappingProxyType({})
    absent: Tensor | None = None
    extras: Mapping[str, Tensor] = MappingProxyType({})

    def faults(self, kind: str) -> int:
        """Returns how many completions a verifier could not judge, by one of :data:`FAULTS`."""
        columns = (column for name, column in self.extras.items() if name.rpartition("/")[2] == kind)
        return int(sum(column.nan_to_num().sum() for column in columns))


class RewardError(ValueError):
    """A reward can't score, or its scores teach nothing; the message is for people."""


class BadScores(RewardError):
    """Some scores are not finite numbers; the message names the sample of the first one.

    Attributes:
        scores: All scores, with NaN in the place of those.
    """

    def __init__(self, message: str, scores: Scores) -> None:
        super().__init__(message)
        self.scores = scores


def check_scores(
    scores: Tensor,
    samples: Samples,
    who: str,
    given: Sequence[object] | None = None,
    absent: Tensor | None = None,
) -> Tensor:
    """Returns scores if all are finite.

    Args:
        scores: (S,) in fp32.
        samples: What was scored.
        who: What made them, for the message.
        given: (S,) what they were before they became numbers in fp32; default the scores.
        absent: (S,) bool: where no reward applies, so that NaN is no fault. Default: nowhere.

    Raises:
        BadScores: Some scores are not finite.
    """
    bad = ~scores.isfinite() if absent is None else ~scores.isfinite() & ~absent.to(scores.device)
    if not bad.any():
        return scores
    i = int(bad.nonzero()[0])
    rows = [row for row, (_, b) in zip(samples.batch.rows, samples.batch.forest.trees, strict=False) for _ in b]
    more = f" (and {count} more)" if (count := int(bad.sum()) - 1) else ""
    raise BadScores(
        f"{who} returned {show(scores[i].item() if given is None else given[i])} for completion {i}"
        f"{f' (row {rows[i]} of the prompts)' if rows else ''}{more}, which is not a finite number in fp32. Prompt: "
        f"{show(samples.prompts[i])}. Completion: {show(samples.completions[i])}.",
        Scores(scores.masked_fill(bad, torch.nan), absent=absent),
    )


class Reward(nn.Module, ABC):
    """Base of the rewards. A reward is never trained, so it is always in eval mode.

    Attributes:
        name: What its further numbers are logged under; empty for a sum, where each part has a name.
        names: Names of the parts of a sum; empty for other rewards.
        needs: Columns of the prompts' rows without which it cannot score.
        limits: Most tokens of a prompt with its completion, by what sets the limit; empty where it reads text. They
            are known after :meth:`load`.
        relative: Whether a score compares a completion with the others of its prompt, so that means over prompts say
            nothing.
    """

    name: str = ""
    names: Sequence[str] = ()
    needs: Set[str] = frozenset()
    limits: Mapping[str, int] = MappingProxyType({})
    relative: bool = False

    def load(self) -> None:
        """Loads what is heavy, once. Modules call it in ``configure_model``."""
        return

    def __call__(self, samples: Samples) -> Scores:
        """Scores samples by :meth:`forward`, which gets a copy of them: it may write into it.

        Args:
            samples: S completions.

        Raises:
            BadScores: Some scores are not finite numbers.
            TypeError: ``forward`` returns something else than scores.
            ValueError: It returns another number of scores.
        """
        with one_process():
            scores = super().__call__(samples.copy())
        size = len(samples.completions)
        returned = f"The reward {type(self).__name__} returned"
        wanted = (
            f"Return lightning_rlhf.rewards.Scores(total), total being a tensor of shape ({size},): one score each."
        )
        if not isinstance(scores, Scores):
            raise TypeError(f"{returned} a {type(scores).__name__} for {size} completions. {wanted}")
        if scores.total.shape != (size,):
            raise ValueError(f"{returned} scores of shape {tuple(scores.total.shape)} for {size} completions. {wanted}")
        return scores

    def train(self, mode: bool = True) -> Any:
        """Stays in eval mode, so that a score depends on its sample alone."""
        return super().train(False)

    @abstractmethod
    def forward(self, samples: Samples) -> Scores:
        """Scores the samples.

        Args:
            samples: S completions.

        Returns:
            Scores on the device of ``samples.batch``.

        Raises:
            BadScores: Some scores are not finite numbers; ``shaping.bad_scores`` decides what happens then.
        """
