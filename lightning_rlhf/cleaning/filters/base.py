"""What every filter is: an example in, the reason to drop it out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from lightning_rlhf.cleaning.example import Example

T = TypeVar("T")


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


class Measuring(Filter, Generic[T]):
    """Base of filters that measure many examples at once, by :meth:`measure`."""

    def __init__(self) -> None:
        # by the examples themselves, not their ids: the id of one that is gone may come again
        self._measured: dict[Example, tuple[int, T]] = {}

    @abstractmethod
    def measure(self, examples: Sequence[Example]) -> Sequence[T]:
        """Measures examples; returns one value for each."""

    def prepare(self, examples: Sequence[Example]) -> None:
        """Measures the examples, and forgets those before."""
        values = self.measure(examples)
        self._measured = {one: (one.rewritten, value) for one, value in zip(examples, values, strict=True)}

    def measured(self, example: Example) -> T:
        """The value of an example as it is now: one that was rewritten since :meth:`prepare` is measured again."""
        known = self._measured.get(example)
        if known is None:
            self.prepare([example])
        elif known[0] != example.rewritten:
            (value,) = self.measure([example])
            self._measured[example] = example.rewritten, value
        return self._measured[example][1]

    def last_measured(self, example: Example) -> T:
        """The value that the filter decided by, whatever later filters did to the texts."""
        return self._measured[example][1] if example in self._measured else self.measured(example)
