"""A game: guess a number that the environment has drawn."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data import Message
from lightning_rlhf.rollout.environment import Environment, Turn


class GuessNumber(Environment):
    """Draws a number from 1 to ``high``, and says after each guess whether it is higher or lower.

    The reward of a right guess is 1 for the first, and less for later ones, in equal steps; without a right guess it is
    0. A turn without a number counts as a guess.

    Args:
        high: Largest number. A row's column ``high`` overrides it.
        max_turns: Most guesses.

    Raises:
        ValueError: A value is out of range.
    """

    def __init__(self, high: int = 10, max_turns: int = 4) -> None:
        check_arguments(GuessNumber.__init__, locals(), high=Range(2), max_turns=Range(1))
        self.high, self.max_turns = high, max_turns

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Message]:
        """Draws the number by the seed."""
        self.largest = self.high if row.get("high") is None else int(row["high"])
        self.number, self.guesses = random.Random(seed).randint(1, self.largest), 0
        task = (
            f"I think of a whole number from 1 to {self.largest}. Guess it: write one number alone. I tell you whether "
            "mine is higher or lower."
        )
        before: list[Message] = row["messages"]
        return [*before[:-1], Message(role="user", content=f"{before[-1]['content']}\n{task}")]

    def step(self, messages: Sequence[Message], text: str) -> Turn:
        """Compares a guess, which is the first number of the text."""
        self.guesses += 1
        found = re.search(r"\d{1,9}", text)
        if found and int(found.group()) == self.number:
            return Turn(reward=1 - (self.guesses - 1) / self.max_turns, done=True)
        if self.guesses >= self.max_turns:
            return Turn(done=True)
        if not found:
            return Turn([Message(role="user", content=f"Write a number from 1 to {self.largest}.")])
        guess = int(found.group())
        side = "higher" if guess < self.number else "lower"
        return Turn([Message(role="user", content=f"My number is {side} than {guess}.")])
