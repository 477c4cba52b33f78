"""The interface of judges, which compare two answers to a prompt, and the reward that a judge gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, Literal, NamedTuple

import torch

from lightning_rlhf.data import Message
from lightning_rlhf.rewards.base import Reward, Samples, Scores, check_scores

_FOR_A = {"first": 1.0, "tie": 0.5, "second": 0.0, None: float("nan")}


class JudgeError(RuntimeError):
    """A judge cannot judge, because its settings are wrong or its server cannot be reached."""


class Answer(NamedTuple):
    """A model's answer.

    Attributes:
        text: The text, without special tokens.
        truncated: Whether the length limit cut it.
    """

    text: str
    truncated: bool = False


class Question(NamedTuple):
    """The question which of two answers is better.

    Attributes:
        prompt: Messages that end in a user turn, or a plain text.
        first: The answer that is shown first.
        second: The other answer.
        columns: Other columns of the prompt's row.
    """

    prompt: list[Message] | str
    first: Answer
    second: Answer
    columns: Mapping[str, Any] = {}


class Verdict(NamedTuple):
    """A judge's decision.

    Attributes:
        winner: The better answer. None if the judge gave no readable verdict.
        reason: The judge's reason, for people.
    """

    winner: Literal["first", "second", "tie"] | None
    reason: str = ""


class Judge(ABC):
    """Base of all judges."""

    @abstractmethod
    def compare(self, questions: Sequence[Question]) -> list[Verdict]:
        """Judges questions.

        Args:
            questions: Any number of questions.

        Returns:
            One verdict per question, in order.

        Raises:
            JudgeError: The judge cannot judge.
        """


class AnswerPair(NamedTuple):
    """Two answers to a prompt.

    Attributes:
        prompt: Messages or a plain text.
        a: The answer of A.
        b: The answer of B.
        columns: Other columns of the prompt's row, for rewards that read them.
    """

    prompt: list[Message] | str
    a: Answer
    b: Answer
    columns: Mapping[str, Any] = {}


class JudgedPair(NamedTuple):
    """A pair with its two verdicts.

    Attributes:
        pair: The answers.
        a_first: The verdict with A's answer shown first.
        b_first: The verdict with B's answer shown first.
    """

    pair: AnswerPair
    a_first: Verdict
    b_first: Verdict

    @property
    def scores(self) -> tuple[float, float]:
        """Both verdicts as scores of A: 1 A won, 0.5 tie, 0 B won, NaN no verdict."""
        return _FOR_A[self.a_first.winner], 1 - _FOR_A[self.b_first.winner]

    @property
    def outcome(self) -> str | None:
        """``a`` or ``b`` if both orders prefer it, otherwise ``tie``; None if a verdict is missing."""
        a, b = self.scores
        return None if a != a or b != b else {1.0: "a", 0.0: "b"}.get(a, "tie") if a == b else "tie"

    def record(self) -> dict[str, Any]:
        """Returns the row that is written to a file."""
        winners = {1.0: "a", 0.5: "tie", 0.0: "b"}
        a, b = self.scores
        return {
            "prompt": self.pair.prompt,
            "a": self.pair.a.text,
            "b": self.pair.b.text,
            "outcome": self.outcome,
            "a_first": winners.get(a),
            "b_first": winners.get(b),
            "reasons": [self.a_first.reason, self.b_first.reason],
        }


def judge_pairs(judge: Judge, pairs: Sequence[AnswerPair]) -> list[JudgedPair]:
    """Judges each pair twice: with A's answer first, and with B's answer first.

    Args:
        judge: The judge.
        pairs: Any number of pairs.

    Returns:
        The pairs with their verdicts, in order.

    Raises:
        JudgeError: The judge cannot judge.
    """
    questions = [
        Question(pair.prompt, *order, pair.columns) for pair in pairs for order in ((pair.a, pair.b), (pair.b, pair.a))
    ]
    verdicts = judge.compare(questions)
    return [JudgedPair(*found) for found in zip(pairs, verdicts[::2], verdicts[1::2], strict=True)]


class JudgedReward(Reward):
    """Scores completions by how often a judge prefers them to the others of their prompt.

    The judge compares all pairs of a prompt's completions in both orders. A completion's score is the share of them
    that it wins; a tie, and two orders that disagree, count half. A pair without a readable verdict counts for neither.

    Args:
        judge: The judge.

    Raises:
        ValueError: It is none.
    """

    relative = True

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        if not isinstance(judge, Judge):
            raise ValueError(
                f"judge is a {type(judge).__name__}: give a Judge, such as ChatJudge(base_url, "
                "model). A reward model or a function is a reward: give it as reward."
            )
        self.judge = judge

    def forward(self, samples: Samples) -> Scores:
        """Has all pairs of each prompt judged.

        Args:
            samples: S completions.

        Raises:
            BadScores: A completion has no readable verdict.
            JudgeError: The judge cannot judge.
        """
        places: list[tuple[int, int]] = []
        first = 0
        for _, branches in samples.batch.forest.trees:
            places.extend(combinations(range(first, first + len(branches)), 2))
            first += len(branches)
        answers = list(map(Answer, samples.completions, samples.truncated))
        pairs = [
            AnswerPair(samples.prompts[i], answers[i], answers[j], {k: v[i] for k, v in samples.columns.items()})
            for i, j in places
        ]
        won, judged = torch.zeros(2, len(answers))
        for (i, j), found in zip(places, judge_pairs(self.judge, pairs), strict=True):
            if found.outcome is not None:
                won[i] += {"a": 1.0, "b": 0.0, "tie": 0.5}[found.outcome]
                won[j] += {"a": 0.0, "b": 1.0, "tie": 0.5}[found.outcome]
                judged[[i, j]] += 1
        shares = check_scores(won / judged, samples, f"The judge {type(self.judge).__name__}")
        return Scores(shares.to(samples.batch.last.device))
