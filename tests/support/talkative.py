"""Environments that small random models can talk to."""

import random

from lightning_rlhf.rollout import Environment, Turn


class Talkative(Environment):
    """Draws a word by its seed, says it after each turn together with what it heard, and rewards letters.

    An episode ends after ``most`` turns, or earlier where a turn is short.
    """

    def __init__(self, most=3, least=0):
        self.most, self.least = most, least

    def reset(self, row, seed):
        self.draw = random.Random(seed)
        self.turns, self.wanted = 0, row.get("wanted", "a")
        return [{"role": "system", "content": f"Say {self.wanted}"}, *row["messages"]]

    def step(self, messages, text):
        assert messages[-1]["role"] != "assistant" and len(messages) == 2 + 2 * self.turns
        self.turns += 1
        reward = text.count(self.wanted) + 0.01 * len(set(text))
        if self.turns == self.most or len(text) < self.least:
            return Turn(reward=reward, done=True)
        word = self.draw.choice(["fox", "dog", "你好", "lazy"])
        return Turn([{"role": "user", "content": f"{word} {len(text)}"}], reward)
