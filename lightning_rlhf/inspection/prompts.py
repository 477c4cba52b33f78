"""Prompts as the policy reads them, in an environment too, and the names of their rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import lightning.pytorch as L

from lightning_rlhf.data import PlannedLoader, PromptBatch
from lightning_rlhf.data.packed import StepTotals
from lightning_rlhf.data.planner import Bin
from lightning_rlhf.data.token_cache import TokenRows
from lightning_rlhf.protocols import PlaysEpisodes


def batch_of(loader: PlannedLoader, numbers: Sequence[int]) -> Any:
    """Returns the batch of some rows, which are at least one."""
    rows: TokenRows = loader.rows  # type: ignore[assignment]
    sizes = [rows.size(number).totals for number in numbers]
    totals = StepTotals(
        **{total.name: sum(getattr(size, total.name) for size in sizes) for total in fields(StepTotals)}
    )
    return loader.collate([rows(number) for number in numbers], Bin(tuple(numbers), totals))


def read_prompts(module: L.LightningModule, batch: PromptBatch) -> list[list[int]]:
    """Returns the tokens that the policy reads before its first turn, for each prompt.

    Raises:
        TurnError: The module's environment fails; the message names the row.
    """
    if isinstance(module, PlaysEpisodes) and module.environment is not None:
        return module.read_openings(batch)
    return batch.prompts


def place_of(module: L.LightningModule, where: str) -> str:
    """Returns the place of a row: a row that the config lists is named after the environment that makes its task."""
    if isinstance(module, PlaysEpisodes) and module.environment is not None and where.startswith("list["):
        return f"{type(module.environment).__name__}{where.removeprefix('list')}"
    return where
