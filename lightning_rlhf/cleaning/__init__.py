"""Cleaning of instruction and preference data, in Chinese and English."""

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.cleaning.example import Example, make_example, read_examples
    from lightning_rlhf.cleaning.filters.base import Filter
    from lightning_rlhf.cleaning.filters.make import make_filters
    from lightning_rlhf.cleaning.pipeline import Tally, clean

_HOMES = {
    **dict.fromkeys(("Example", "make_example", "read_examples"), "example"),
    "Filter": "filters.base",
    "make_filters": "filters.make",
    **dict.fromkeys(("Tally", "clean"), "pipeline"),
}
__all__ = ["Example", "Filter", "Tally", "clean", "make_example", "make_filters", "read_examples"]


__getattr__ = loader(__name__, _HOMES)
