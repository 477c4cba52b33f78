"""What penalties and biases change in the scores of single tokens."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from lightning_rlhf.rollout.types import Sampling


class TokenEdits:
    """The tokens whose scores a row's penalties and biases change. A new token of the row changes one entry.

    Args:
        sampling: The row's settings.
        prompt: The row's prompt.

    Attributes:
        ids: N distinct tokens.
        penalties: For each, the factor on a negative score, by which a positive one is divided.
        shifts: For each, what is added to its logit.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int]) -> None:
        self.ids, self.penalties, self.shifts = array("q"), array("d"), array("d")
        self._counts = array("q")  # in the completion
        self._places: dict[int, int] = {}
        self._sampling = sampling
        self._followed = 0  # tokens of the completion
        for token in sampling.logit_bias:
            self._place(token)
        for token in prompt if sampling.repetition_penalty != 1 else ():
            self.penalties[self._place(token)] = sampling.repetition_penalty

    @staticmethod
    def needed(sampling: Sampling) -> bool:
        """Returns whether settings have a penalty or a bias."""
        s = sampling
        return bool(s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty or s.logit_bias)

    def follow(self, ids: Sequence[int]) -> None:
        """Counts the tokens that were appended to a completion since the last call."""
        s = self._sampling
        for token in ids[self._followed :]:
            place = self._place(token)
            self._counts[place] += 1
            self.penalties[place] = s.repetition_penalty
            self.shifts[place] = (
                s.logit_bias.get(token, 0.0) - s.presence_penalty - s.frequency_penalty * self._counts[place]
            )
        self._followed = len(ids)

    def _place(self, token: int) -> int:
        """Returns the number of a token's entry, which is made if it has none."""
        place = self._places.setdefault(token, len(self.ids))
        if place == len(self.ids):
            self.ids.append(token)
            self.penalties.append(1.0)
            self.shifts.append(self._sampling.logit_bias.get(token, 0.0))
            self._counts.append(0)
        return place
