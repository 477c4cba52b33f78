"""A game: guess a number that the environment has drawn."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data import Message
from lightning_rlhf.rollout.environment import Environment, Turn

#: The largest number that can be drawn, and the digits of a guess that are read: one more than it has.
_MOST, _DIGITS = 10**18, 20
_HIGH = Range(2, _MOST)


class GuessNumber(Environment):
    """Draws a number from 1 to ``high``, and says after each guess whether it is higher or lower.

    The reward of a right guess is 1 for the first, and less for later ones, in equal steps; without a right guess it is
    0. A turn without a number counts as a guess.

    Args:
        high: Largest number. A row's column ``high`` overrides it, and is a whole number too, or null.
        max_turns: Most guesses.

    Raises:
        ValueError: A value is out of range, that of a row when its episode begins.
    """

    def __init__(self, high: int = 10, max_turns: int = 4) -> None:
        check_arguments(GuessNumber.__init__, locals(), high=_HIGH, max_turns=Range(1))
        self.high, self.max_turns = high, max_turns

    def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Message]:
        """Draws the number by the seed."""
        self.largest = self.high if row.get("high") is None else _read_high(row["high"])
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
        found = re.search(r"\d+", text)
        guess = min(int(found.group()[:_DIGITS]), _MOST) if found else 0  # a longer one is too large anyway
        if guess == self.number:
            return Turn(reward=1 - (self.guesses - 1) / self.max_turns, done=True)
        if self.guesses >= self.max_turns:
            return Turn(done=True)
        if not found:
            return Turn([Message(role="user", content=f"Write a number from 1 to {self.largest}.")])
        side = "higher" if guess < self.number else "lower"
        return Turn([Message(role="user", content=f"My number is {side} than {guess}.")])


def _read_high(given: object) -> int:
    """A row's largest number. A table that has nulls holds whole numbers as floats."""
    try:
        high = given if isinstance(given, int) else int(given) if isinstance(given, str) else Fraction(str(given))
    except ValueError:
        high = Fraction(0)
    if isinstance(given, bool) or int(high) != high or int(high) not in _HIGH:
        raise ValueError(f"the column 'high' is {given!r}. Give a whole number, {_HIGH}")
    return int(high)
