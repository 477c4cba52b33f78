"""Judges that compare scores."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.models import load_tokenizer
from lightning_rlhf.models.loading import Dtype
from lightning_rlhf.rewards import Reward, WeightedReward, make_reward, names_model, score_texts
from lightning_rlhf.rewards.judges import Answer, Judge, Question, Verdict


class RewardJudge(Judge):
    """Prefers the answer with the higher score. Equal scores are a tie.

    Each distinct answer is scored once, in whichever place it stands. A reward that reads tokens gets the tokens of the
    answer's text.

    Args:
        reward: The reward that scores answers.
        tokenizer: Tokenizes answers for rewards that read tokens. Python functions do not need it.
        device: Device on which the reward works; between calls it is on the CPU. None: the reward is never moved.
    """

    def __init__(
        self,
        reward: Reward,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.reward, self.tokenizer, self.device = reward, tokenizer, device

    def compare(self, questions: Sequence[Question]) -> list[Verdict]:
        """Judges questions; see :meth:`Judge.compare`.

        Raises:
            ValueError: The reward cannot score an answer, or needs a column that the prompts do not have.
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
        return score_texts(
            self.reward,
            [question.prompt for question, _ in items],
            [answer.text for _, answer in items],
            self.tokenizer,
            [answer.truncated for _, answer in items],
            [question.columns for question, _ in items],
            self.device,
        )


def _by_score(first: float, second: float) -> Verdict:
    reason = f"{first:.6g} against {second:.6g}"
    if not (math.isfinite(first) and math.isfinite(second)):
        return Verdict(None, f"scores are not finite: {reason}")
    return Verdict("tie" if first == second else "first" if first > second else "second", reason)


def make_judge(
    spec: str | os.PathLike[str] | Callable[..., Any] | Sequence[WeightedReward] | Reward | Judge,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: Dtype = "float32",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> Judge:
    """Makes a judge from the value of an argument ``judge``.

    Args:
        spec: Directory or hub id of a reward model; a function ``f(prompts, completions, **columns) -> scores`` or its
            import path; a list of weighted rewards; a reward; or a judge.
        tokenizer: Tokenizes answers for a list or a reward. A single reward model uses its own tokenizer.
        dtype: Data type of a reward model's weights.
        device: Device of a reward model that is loaded here.
        trust_remote_code: Run code that comes with a reward model.

    Raises:
        ValueError: ``spec`` is none of these; the message says what was tried.
        ImportError: An import path does not exist.
        OSError: A reward model does not exist.
    """
    if isinstance(spec, Judge):
        return spec
    name = os.fspath(spec) if isinstance(spec, (str, os.PathLike)) else ""
    if name.startswith(("http://", "https://")):
        raise ValueError(f"judge: {name} is an endpoint, which needs a model's name. Use ChatJudge(base_url, model).")
    if names_model(name):
        tokenizer = load_tokenizer(name, trust_remote_code)
    # a function does not use the tokenizer
    reward = make_reward(spec, tokenizer, dtype, trust_remote_code)  # type: ignore[arg-type]
    if isinstance(spec, Reward):
        return RewardJudge(reward, tokenizer)
    reward.load()
    return RewardJudge(reward, tokenizer, device)
