"""Finds the models and the reward model in the folder of a run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from lightning_rlhf.arguments import did_you_mean


@dataclass(frozen=True)
class Found:
    """What is in a run's folder.

    Attributes:
        models: Directories or hub ids of language models, by name.
        reward: Directory of a reward model, if there is one.
    """

    models: dict[str, str]
    reward: str | None = None


def find_models(run: str) -> Found:
    """Finds what a run has exported.

    Args:
        run: Directory of a model; of a run, with ``hf/best`` or ``hf/last``; or of several runs, such as the demo's
            with ``sft``, ``reward`` and ``ppo``. Or a hub id.

    Returns:
        The models. Each is named after the directory of its run.

    Raises:
        FileNotFoundError: There is no model.
    """
    folder = Path(run)
    if not folder.is_dir():
        if run.count("/") == 1 and not run.startswith((".", "/")) and not folder.parent.is_dir():
            return Found({run.split("/")[1]: run})
        near = did_you_mean(folder.name, [p.name for p in folder.parent.glob("*")]) if folder.parent.is_dir() else "."
        raise FileNotFoundError(f"There is no directory {run}{near}")
    runs = [folder] if _export(folder) else sorted(p for p in folder.iterdir() if p.is_dir() and _export(p))
    exports = {_name(place): export for place in runs if (export := _export(place)) is not None}
    models = {name: str(export) for name, export in exports.items() if not _is_classifier(export)}
    rewards = [str(export) for export in exports.values() if _is_classifier(export)]
    if not models:
        what = "only a reward model" if rewards else "no model (config.json or adapter_config.json)"
        raise FileNotFoundError(f"{run} has {what}, neither itself nor in hf/best, hf/last or a folder of a run.")
    return Found(models, rewards[0] if rewards else None)


def _export(folder: Path) -> Path | None:
    """Returns the directory that holds a run's model."""
    for place in (folder, folder / "hf" / "best", folder / "hf" / "last"):
        if any((place / name).is_file() for name in ("config.json", "adapter_config.json")):
            return place
    return None


def _name(place: Path) -> str:
    """Returns the name of a run: an export in ``hf`` is named after its run."""
    place = place.resolve()
    return place.parents[1].name if place.parent.name == "hf" else place.name


def _is_classifier(export: Path) -> bool:
    config = export / "config.json"
    if config.is_file():
        architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
        return any(name.endswith("ForSequenceClassification") for name in architectures)
    adapter = json.loads((export / "adapter_config.json").read_text(encoding="utf-8"))
    return bool(adapter.get("task_type") == "SEQ_CLS")
