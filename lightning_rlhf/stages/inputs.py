"""Which data a stage works on; other data is refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_rlhf.data import (
    InstructionDataModule,
    PackedBatch,
    PreferenceDataModule,
    PromptBatch,
    PromptDataModule,
    UnpairedDataModule,
)

Kind = Literal["instructions", "preferences", "unpaired", "prompts"]
#: Who makes each kind of batch, and what they are.
MAKERS: dict[Kind, tuple[type, str]] = {
    "instructions": (InstructionDataModule, "PackedBatch without pairs"),
    "preferences": (PreferenceDataModule, "PackedBatch with pairs"),
    "unpaired": (UnpairedDataModule, "PackedBatch with labels"),
    "prompts": (PromptDataModule, "PromptBatch"),
}
_HOW = {
    "packed": "make a lightning_rlhf.data.Tree(prompt_ids, [Branch(answer_ids)]) of each row, and batches of them by "
    "DataLoader(trees, collate_fn=lightning_rlhf.data.pack)",
    "prompts": "give your rows to PromptDataModule",
}


def check_data(name: str, wanted: Kind, trainer: Trainer) -> None:
    """Refuses another stage's data module; one that is no kind of ours is told by its batches.

    Args:
        name: The stage's.
        wanted: What it works on.
        trainer: At the beginning of a run.

    Raises:
        MisconfigurationException: It is another's.
    """
    # the public trainer.datamodule may be that of an earlier run, where this one was given loaders
    selector = getattr(getattr(trainer, "_data_connector", None), "_datahook_selector", None)
    datamodule = getattr(selector, "datamodule", None)
    found = next((kind for kind, (maker, _) in MAKERS.items() if isinstance(datamodule, maker)), None)
    if found is not None and found not in _taken(wanted, trainer.state.fn == TrainerFn.PREDICTING):
        raise MisconfigurationException(
            f"{name} trains on {MAKERS[wanted][0].__name__}'s batches; it was given {type(datamodule).__name__}'s "
            f"({MAKERS[found][1]})."
        )


def check_batch(name: str, wanted: Kind, batch: Any, predicts: bool) -> None:
    """Refuses a batch of another kind; all ranks come to the same.

    Args:
        name: The stage's.
        wanted: What it works on.
        batch: A data loader's.
        predicts: Log-probs and scores are predicted of packed batches of any kind.

    Raises:
        MisconfigurationException: It is of another kind, or nothing in it can be learnt from.
    """
    found: Kind | None = None
    if isinstance(batch, PromptBatch) or (isinstance(batch, Mapping) and isinstance(batch.get("prompts"), PromptBatch)):
        found = "prompts"
    elif isinstance(batch, PackedBatch):
        totals = batch.totals
        found = "preferences" if totals.pairs else "unpaired" if totals.good + totals.bad else "instructions"
    if found in _taken(wanted, predicts):
        if found == "instructions" and not predicts and not batch.totals.tokens:
            raise MisconfigurationException(f"{name} was given a PackedBatch in which no token is scored.")
        return
    maker, right = MAKERS[wanted]
    if found is not None:
        what = f"{MAKERS[found][0].__name__}'s ({MAKERS[found][1]})."
        if (wanted, found) == ("preferences", "instructions"):
            what += " Trees say by pairs=[lightning_rlhf.data.packed.Pair(better, worse)] which branch is better."
        if (wanted, found) == ("unpaired", "instructions"):
            what += " Trees say by labels=[True, False] which branches are good."
    else:
        keys = f" of {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""
        how = _HOW["prompts" if wanted == "prompts" else "packed"]
        what = f"a {type(batch).__name__}{keys}: {how}."
    raise MisconfigurationException(f"{name} trains on {maker.__name__}'s batches ({right}); it was given {what}")


def _taken(wanted: Kind, predicts: bool) -> tuple[Kind, ...]:
    return ("instructions", "preferences", "unpaired") if predicts and wanted != "prompts" else (wanted,)
