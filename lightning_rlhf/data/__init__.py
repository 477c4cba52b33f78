"""From rows to messages, to tokens, to planned and packed batches.

Names are imported when they are used: packed batches need nothing that reads files.
"""

from typing import TYPE_CHECKING

from lightning_rlhf.utils.lazy import loader

if TYPE_CHECKING:
    from lightning_rlhf.data.formats import Conversation, Message
    from lightning_rlhf.data.instruction import InstructionDataModule
    from lightning_rlhf.data.packed import Branch, PackedBatch, Tree, pack, pad, split, unpack
    from lightning_rlhf.data.planner import PlannedLoader, Planner
    from lightning_rlhf.data.preference import PreferenceDataModule
    from lightning_rlhf.data.prompts import PromptBatch, PromptDataModule, Ptx
    from lightning_rlhf.data.sources import WeightedSource
    from lightning_rlhf.data.unpaired import UnpairedDataModule

_HOMES = {
    **dict.fromkeys(("Conversation", "Message"), "formats"),
    "InstructionDataModule": "instruction",
    "PreferenceDataModule": "preference",
    **dict.fromkeys(("Branch", "PackedBatch", "Tree", "pack", "pad", "split", "unpack"), "packed"),
    **dict.fromkeys(("PlannedLoader", "Planner"), "planner"),
    **dict.fromkeys(("PromptBatch", "PromptDataModule", "Ptx"), "prompts"),
    "UnpairedDataModule": "unpaired",
    "WeightedSource": "sources",
}
__all__ = [
    "Branch",
    "Conversation",
    "InstructionDataModule",
    "Message",
    "PackedBatch",
    "PlannedLoader",
    "Planner",
    "PreferenceDataModule",
    "PromptBatch",
    "PromptDataModule",
    "Ptx",
    "Tree",
    "UnpairedDataModule",
    "WeightedSource",
    "pack",
    "pad",
    "split",
    "unpack",
]


__getattr__ = loader(__name__, _HOMES)
