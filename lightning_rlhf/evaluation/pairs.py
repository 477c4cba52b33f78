"""Pairs of answers by two models to the same prompts, judged in both orders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from lightning_rlhf.data import Message
from lightning_rlhf.evaluation.judges import Answer, Judge, Question, Verdict
from lightning_rlhf.metrics import WinRates, win_rate

_FOR_A = {"first": 1.0, "tie": 0.5, "second": 0.0, None: float("nan")}


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


def rates(judged: Sequence[JudgedPair], confidence: float = 0.95) -> WinRates:
    """Computes the win rate of A over B and related rates.

    Args:
        judged: Any number of judged pairs. Pairs with equal prompts count as one prompt in the interval.
        confidence: Confidence level of the interval. A larger value gives a wider interval.

    Returns:
        The rates; see :func:`~lightning_rlhf.metrics.win_rate`.
    """
    numbers: dict[str, int] = {}
    prompts = [numbers.setdefault(json.dumps(j.pair.prompt), len(numbers)) for j in judged]
    scores = torch.tensor([j.scores for j in judged], dtype=torch.float64).reshape(-1, 2)
    return win_rate(scores[:, 0], scores[:, 1], torch.tensor(prompts), confidence)
