"""What every judge is: questions with two answers in, one verdict each out; and judges that compare scores."""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.formats import Message
from lightning_rlhf.data.packed import Branch, Tree, pack
from lightning_rlhf.models import load_tokenizer
from lightning_rlhf.models.loading import Dtype
from lightning_rlhf.rewards import Reward, Samples, WeightedReward, make_reward, names_model, render


class JudgeError(RuntimeError):
    """A judge that can't judge: wrongly set up, or not to be reached."""


class Answer(NamedTuple):
    """What a model answered.

    Attributes:
        text: Without special tokens.
        truncated: Whether the length limit ended it.
    """

    text: str
    truncated: bool = False


class Question(NamedTuple):
    """Which of two answers is better?

    Attributes:
        prompt: Messages, of which the last is the user's, or a plain text.
        first: The answer that is shown first.
        second: The other.
        columns: The prompt's further columns.
    """

    prompt: list[Message] | str
    first: Answer
    second: Answer
    columns: Mapping[str, Any] = {}


class Verdict(NamedTuple):
    """What a judge says.

    Attributes:
        winner: None where it said nothing that can be understood.
        reason: Why, for people.
    """

    winner: Literal["first", "second", "tie"] | None
    reason: str = ""


class Judge(ABC):
    """Base of the judges."""

    @abstractmethod
    def compare(self, questions: Sequence[Question]) -> list[Verdict]:
        """Judges.

        Args:
            questions: Any number.

        Returns:
            A verdict each, in order.

        Raises:
            JudgeError: It can't judge at all.
        """


class RewardJudge(Judge):
    """Prefers the answer of the higher score; equal scores are a tie.

    An answer is scored once, wherever it stands, by its text: where a reward reads tokens, these are the text's.

    Args:
        reward: What scores.
        tokenizer: Makes tokens of answers, for rewards that read tokens; Python functions need none.
        device: Where the reward works, and rests on the CPU otherwise; None leaves it where it is.
    """

    def __init__(
        self,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.reward, self.tokenizer, self.device = reward, tokenizer, device

    def compare(self, questions: Sequence[Question]) -> list[Verdict]:
        """See :meth:`Judge.compare`.

        Raises:
            ValueError: The reward can't score an answer, or needs a column that the prompts lack.
        """
        numbers: dict[str, int] = {}
        distinct: list[tuple[Question, Answer]] = []
        places = []
        for question in questions:
            for answer in (question.first, question.second):
                key = json.dumps([question.prompt, dict(question.columns), answer], default=repr)
                if key not in numbers:
                    numbers[key] = len(distinct)
                    distinct.append((question, answer))
                places.append(numbers[key])
        scores = self._scores(distinct) if distinct else []
        return [
            _by_score(scores[first], scores[second]) for first, second in zip(places[::2], places[1::2], strict=True)
        ]

    def _scores(self, items: Sequence[tuple[Question, Answer]]) -> list[float]:
        prompts = [question.prompt for question, _ in items]
        completions = [answer.text for _, answer in items]
        truncated = [answer.truncated for _, answer in items]
        names = {name for question, _ in items for name in question.columns}
        columns = {name: [question.columns.get(name) for question, _ in items] for name in sorted(names)}
        # not in inference mode, in which validation may run: weights that move there could not move back elsewhere
        with torch.inference_mode(False), torch.no_grad():
            self.reward.load()
            if self.device is not None:
                self.reward.to(self.device)
            try:
                if self.tokenizer is None:  # of functions, which read texts
                    trees = [Tree([0], [Branch([0])]) for _ in items]
                else:
                    trees = render(self.tokenizer, prompts, completions, truncated)
                weight = next(self.reward.parameters(), torch.empty(0))
                batch = pack(trees).to(weight.device)
                scores: list[float] = self.reward(Samples(batch, prompts, completions, truncated, columns)).tolist()
                return scores
            finally:
                if self.device is not None:
                    self.reward.to("cpu")


def _by_score(first: float, second: float) -> Verdict:
    reason = f"{first:.6g} against {second:.6g}"
    if not (math.isfinite(first) and math.isfinite(second)):
        return Verdict(None, f"no finite scores: {reason}")
    return Verdict("tie" if first == second else "first" if first > second else "second", reason)


def make_judge(
    spec: str | os.PathLike[str] | Callable[..., Any] | Sequence[WeightedReward] | Reward | Judge,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: Dtype = "float32",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> Judge:
    """What an argument ``judge`` means.

    Args:
        spec: Directory or hub id of a reward model, a function ``f(prompts, completions, **columns) -> scores`` or its
            import path, a list of weighted ones, a reward, or a judge.
        tokenizer: Makes tokens of answers, for a list or a reward; a reward model alone reads by its own.
        dtype: Of a reward model's weights.
        device: Where a reward model works, if it is made here.
        trust_remote_code: Run code that comes with a reward model.

    Raises:
        ValueError: It is none of these; the message says what was tried.
        ImportError: An import path at which there is nothing.
        OSError: No reward model is there.
    """
    if isinstance(spec, Judge):
        return spec
    name = os.fspath(spec) if isinstance(spec, (str, os.PathLike)) else ""
    if name.startswith(("http://", "https://")):
        raise ValueError(f"judge: {name} is an endpoint, of which a judge needs more: give ChatJudge(base_url, model).")
    if names_model(name):
        tokenizer = load_tokenizer(name, trust_remote_code)
    # a function asks for no tokenizer
    reward = make_reward(spec, tokenizer, dtype, trust_remote_code)  # type: ignore[arg-type]
    if isinstance(spec, Reward):
        return RewardJudge(reward, tokenizer)
    reward.load()
    return RewardJudge(reward, tokenizer, device)
