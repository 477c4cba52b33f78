"""Drops rows whose answer a reward scores too low."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.cleaning.filters.base import Measuring
from lightning_rlhf.data.formats import Conversation, Message


class RewardAbove(Measuring[float]):
    """Drops rows whose last answer (of a preference: whose best) a reward scores below a limit.

    Rows without an answer pass; a score that is not finite drops its row.

    Args:
        reward: A reward model's directory, a hub id, a function or its import path, or a list of weighted ones, as a
            stage's argument ``reward``.
        least: Least score that is kept.
        device: Device on which a reward model works.
    """

    def __init__(self, reward: Any, least: float, device: str | None = None) -> None:
        super().__init__()
        if math.isnan(least):
            raise ValueError(f"RewardAbove: least is {least}. Give a number.")
        self.reward, self.least, self.device = reward, least, device
        self._made: tuple[Any, Any] | None = None

    def measure(self, examples: Sequence[Example]) -> list[float]:
        """Scores the answers of several rows at once; those without an answer get no number."""
        answered = [example for example in examples if example.answers]
        scores = iter(self._score(answered) if answered else [])
        return [next(scores) if example.answers else math.nan for example in examples]

    def __call__(self, example: Example) -> str | None:
        """Compares the score with the limit, and notes it."""
        if not example.answers:
            return None
        score = self.measured(example)
        if not math.isfinite(score):
            return "score not finite"
        example.notes["reward"] = score
        return "score too low" if score < self.least else None

    def _score(self, examples: Sequence[Example]) -> list[float]:
        from lightning_rlhf.rewards import BadScores, score_texts

        if self._made is None:
            self._made = _load(self.reward)
        reward, tokenizer = self._made
        prompts = [_prompt(example) for example in examples]
        answers = [example.answer for example in examples]
        columns = [{name: example.row.get(name) for name in reward.needs} for example in examples]
        try:
            return score_texts(reward, prompts, answers, tokenizer, columns=columns, device=self.device)
        except BadScores as error:
            found: list[float] = error.scores.total.tolist()
            return found


def _load(spec: Any) -> tuple[Any, Any]:
    """The reward, and the tokenizer that its samples are rendered with."""
    from lightning_rlhf.models import load_tokenizer
    from lightning_rlhf.rewards import make_reward, names_model

    sources = [spec] if isinstance(spec, (str, os.PathLike)) else _sources(spec)
    names = [os.fspath(source) for source in sources if isinstance(source, (str, os.PathLike))]
    named = next(filter(names_model, names), None)
    tokenizer = None if named is None else load_tokenizer(named)
    return make_reward(spec, tokenizer), tokenizer  # type: ignore[arg-type]  # functions don't use it


def _sources(spec: Any) -> list[Any]:
    """Returns the sources of a reward or of a list of weighted rewards."""
    parts = spec if isinstance(spec, Sequence) else [spec]
    return [part["source"] if isinstance(part, Mapping) else getattr(part, "source", None) for part in parts]


def _prompt(example: Example) -> list[Message] | str:
    """Returns the prompt before the answer."""
    parsed = example.parsed
    if isinstance(parsed, Conversation):
        return [*(parsed.messages or ())[:-1]]
    return parsed.prompt if isinstance(parsed.prompt, str) else [*parsed.prompt]
