"""Writes whole weights and adapters as Hugging Face directories."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_rlhf.models.loading import (
    load_causal_lm,
    load_config,
    load_reward_model,
    load_stop_token_ids,
    load_tokenizer,
)
from lightning_rlhf.models.runs import Source
from lightning_rlhf.models.saving import save_pretrained
from lightning_rlhf.utils.checkpoint_io import CheckpointError, check_is_checkpoint, explain_bad_checkpoint
from lightning_rlhf.utils.filesystem import COMPLETE


def require_space(folder: Path, needed: float) -> None:
    """Checks, before a long write, that the disk has room: some libraries report a full disk as something else.

    Args:
        folder: An existing directory on the disk.
        needed: Bytes.

    Raises:
        OSError: It has not.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        what = f"{os.strerror(errno.ENOSPC)}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise OSError(errno.ENOSPC, what, os.fspath(folder.parent))


def copy_directory(source: Path, folder: Path, report: Callable[[str], None] = print) -> None:
    """Copies a model or adapters as they are.

    Args:
        source: The directory.
        folder: An existing directory to copy to.
        report: Called with a line for each large file.
    """
    files = sorted(path for path in source.rglob("*") if path.is_file() and path.name != COMPLETE)
    require_space(folder, sum(file.stat().st_size for file in files))
    for number, file in enumerate(files, 1):
        target = folder / file.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.stat().st_size > 1e8:
            report(f"copying {file.name}, file {number} of {len(files)} ({file.stat().st_size / 1e9:.1f} GB)")
        shutil.copyfile(file, target)  # what a hub's link points to


def save_merged(source: Source, folder: Path, trust: bool = False) -> None:
    """Merges adapters into their base in fp32, and saves the result in the base's data type.

    Args:
        source: Adapters.
        folder: The directory to write.
        trust: Run code that comes with the model.

    Raises:
        OSError: The base model does not exist.
    """
    tokenizer = load_tokenizer(source.path if (source.path / "tokenizer_config.json").is_file() else source.base, trust)
    config = load_config(source.path, trust)
    load = load_reward_model if source.is_reward_model else load_causal_lm
    model: Any = load(source.path, trust_remote_code=trust)
    dtype = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)  # transformers 5, and 4.51
    model.to(dtype or torch.float32)
    if source.is_reward_model and hasattr(model, "score"):
        model.score.float()
    _save(model, tokenizer, folder, load_stop_token_ids(source.path, trust), False)


def save_checkpoint(path: Path, folder: Path, adapter: bool) -> None:
    """Saves the model of a Trainer's checkpoint; with the average if the run kept one (EMA).

    Args:
        path: The file.
        folder: The directory to write.
        adapter: Save adapters alone.

    Raises:
        CheckpointError: It is not a checkpoint of a stage, or was made with objects that no checkpoint holds.
        ValueError: The run has no adapters that can stand alone.
    """
    import lightning_rlhf.stages as stages
    from lightning_rlhf.callbacks import EMA

    with explain_bad_checkpoint(path):
        held = check_is_checkpoint(torch.load(path, "cpu", mmap=True, weights_only=True), path)
    classes = held.get("stage", {}).get("classes") or []
    name = next((name for name in classes if name in stages.__all__), None)
    if name is None:
        raise CheckpointError(f"{path} is no checkpoint of a stage of lightning_rlhf. Give the run's hf/best.")
    try:
        module = getattr(stages, name).load_from_checkpoint(path, map_location="cpu", weights_only=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} Then save it: lightning_rlhf.models.saving.save_pretrained(module.model_to_export.model, "
            "module.tokenizer, directory, stop_token_ids=module.stop_token_ids)."
        ) from error
    average = EMA()
    for key, state in held.get("callbacks", {}).items():
        if key.partition("{")[0] == EMA.__name__:
            average.load_state_dict(state)
    with average.applied(module):
        _save(module.model_to_export.model, module.tokenizer, folder, module.stop_token_ids, adapter)


def _save(model: Any, tokenizer: Any, folder: Path, stops: Any, adapter: bool) -> None:
    """Saves into a directory that is written atomically as a whole."""
    require_space(
        folder, sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not adapter)
    )
    inner = folder / "saved"
    save_pretrained(model, tokenizer, inner, stop_token_ids=stops, adapter_only=adapter)
    for file in inner.iterdir():
        if file.name != COMPLETE:
            file.rename(folder / file.name)
    shutil.rmtree(inner)
