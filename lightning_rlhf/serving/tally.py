"""What votes say: win rates with intervals, and how often the reward model agrees with the people."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import torch

from lightning_rlhf.metrics import win_rate
from lightning_rlhf.serving.votes import THUMBS, Row

_FOR_LEFT = {"left": 1.0, "right": 0.0, "tie": 0.5, "both_bad": 0.5}


class _Scores:
    """Scores between 0 and 1, each of a prompt."""

    def __init__(self) -> None:
        self._scores: list[float] = []
        self._prompts: list[Hashable] = []

    def add(self, score: float, vote: Row) -> None:
        """Adds a score."""
        self._scores.append(score)
        self._prompts.append(json.dumps(vote["messages"]))

    def rate(self) -> dict[str, float | int | None]:
        """Returns the mean with its 95 % interval, in which votes on one prompt count as one sample."""
        numbers = {prompt: i for i, prompt in enumerate(dict.fromkeys(self._prompts))}
        scores = torch.tensor(self._scores, dtype=torch.float64)
        found = win_rate(scores, scores, torch.tensor([numbers[prompt] for prompt in self._prompts]))
        rate, low, high = (round(float(value), 4) if self._scores else None for value in found[:3])
        wins, ties, losses = (int(value) for value in (found.wins, found.ties, found.losses))
        return {
            "rate": rate, "low": low, "high": high,
            "wins": wins, "ties": ties, "losses": losses, "votes": len(self._scores),
        }  # fmt: skip


def tally(votes: Iterable[Row]) -> dict[str, Any]:
    """Computes rates over votes.

    Args:
        votes: Votes that were not taken back.

    Returns:
        ``pairs``: for each two models, how often people prefer ``a`` to ``b``; a tie counts half, and so does "both
        bad". ``thumbs``: per model, the share of thumbs up. ``reward``: how often the reward model prefers the
        answer that the person prefers; equal scores count half. ``left``: how often the left one of two answers
        wins; 0.5 is no bias. Each rate has a 95 % interval. ``votes`` and ``both_bad`` are counts.
    """
    votes = list(votes)
    name = _names(votes)
    pairs: dict[tuple[str, str], _Scores] = defaultdict(_Scores)
    thumbs: dict[str, _Scores] = defaultdict(_Scores)
    reward, left = _Scores(), _Scores()
    for vote in votes:
        choice, answers = vote.get("vote"), vote["answers"]
        if choice in THUMBS:
            thumbs[name[_key(answers[0])]].add(float(THUMBS[choice]), vote)
        if choice not in _FOR_LEFT:
            continue
        score = _FOR_LEFT[choice]
        a, b = (name[_key(answer)] for answer in answers)
        if a != b:
            pairs[min(a, b), max(a, b)].add(score if a < b else 1 - score, vote)
        if choice in ("left", "right"):
            left.add(score, vote)
            rewards = [answer.get("reward") for answer in answers]
            if None not in rewards:
                reward.add(_agreement(score, *rewards), vote)
    return {
        "object": "votes.summary",
        "votes": len(votes),
        "both_bad": sum(vote.get("vote") == "both_bad" for vote in votes),
        "pairs": [{"a": a, "b": b, **scores.rate()} for (a, b), scores in sorted(pairs.items())],
        "thumbs": [{"model": model, **scores.rate()} for model, scores in sorted(thumbs.items())],
        "reward": reward.rate(),
        "left": left.rate(),
    }


def _agreement(left: float, reward_left: float, reward_right: float) -> float:
    return 0.5 if reward_left == reward_right else float((reward_left > reward_right) == (left == 1))


def _key(answer: Mapping[str, Any]) -> tuple[str, str]:
    return answer["model"], json.dumps(answer.get("weights"), sort_keys=True)


def _names(votes: Iterable[Row]) -> dict[tuple[str, str], str]:
    """Names models; those of one name with different weights, such as two runs, get the start of their hash."""
    keys = dict.fromkeys(_key(answer) for vote in votes for answer in vote["answers"])
    several = [model for model, _ in keys]
    return {key: key[0] if several.count(key[0]) == 1 else f"{key[0]} {_short(key[1])}" for key in keys}


def _short(weights: str) -> str:
    return "+".join(found[:8] for found in (json.loads(weights) or {"": "unknown"}).values())
