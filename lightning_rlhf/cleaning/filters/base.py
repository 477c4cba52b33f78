"""What every filter is: an example in, the reason to drop it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from lightning_rlhf.cleaning.example import Example


class Filter(ABC):
    """Base of the filters.

    A filter looks at one example at a time. If it depends on the examples that were kept before (as duplicates do), it
    sets ``remembers`` and learns of them by :meth:`add`.
    """

    #: Whether its answer depends on the examples that were kept before.
    remembers = False

    @property
    def name(self) -> str:
        """The filter's name in counts and configurations."""
        return type(self).__name__

    def prepare(self, examples: Sequence[Example]) -> None:
        """Measures several examples at once, where that is faster; each is then asked for by a call.

        Args:
            examples: Those that come next; some of them may be dropped by filters before this one.
        """
        return

    @abstractmethod
    def __call__(self, example: Example) -> str | None:
        """Returns the reason to drop an example, in a few words that many examples share; None to keep it.

        It may note what it measured in ``example.notes``, and change the texts by ``example.rewrite``.
        """

    def add(self, example: Example) -> None:
        """Learns that all filters kept an example. It was the last that this filter was called with."""
        return
