"""The filters, by name. They load when they are used."""

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.cleaning.filters.base import Filter
    from lightning_rlhf.cleaning.filters.contamination import Contamination
    from lightning_rlhf.cleaning.filters.length import Length
    from lightning_rlhf.cleaning.filters.make import make_filters
    from lightning_rlhf.cleaning.filters.missing_input import MissingInput
    from lightning_rlhf.cleaning.filters.near_duplicate import NearDuplicate
    from lightning_rlhf.cleaning.filters.novelty import Novelty
    from lightning_rlhf.cleaning.filters.personal_data import PersonalData
    from lightning_rlhf.cleaning.filters.refusal import Refusal
    from lightning_rlhf.cleaning.filters.repetition import Repetition
    from lightning_rlhf.cleaning.filters.reward_above import RewardAbove
    from lightning_rlhf.cleaning.filters.script import Script

_HOMES = {
    "Contamination": "contamination",
    "Filter": "base",
    "Length": "length",
    "MissingInput": "missing_input",
    "NearDuplicate": "near_duplicate",
    "Novelty": "novelty",
    "PersonalData": "personal_data",
    "Refusal": "refusal",
    "Repetition": "repetition",
    "RewardAbove": "reward_above",
    "Script": "script",
    "make_filters": "make",
}
__all__ = [
    "Contamination",
    "Filter",
    "Length",
    "MissingInput",
    "NearDuplicate",
    "Novelty",
    "PersonalData",
    "Refusal",
    "Repetition",
    "RewardAbove",
    "Script",
    "make_filters",
]


__getattr__ = loader(__name__, _HOMES)
