"""Finds the models and the reward model in the folder of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_rlhf.arguments import did_you_mean


@dataclass
class Backbone:
    """Weights that one or several models share.

    Attributes:
        source: Directory or hub id of the model without the adapters.
        name: Its own name in requests. None: it is not served.
        adapters: Directories of adapters over it, by name.
    """

    source: str
    name: str | None
    adapters: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """What is in a run's folder.

    Attributes:
        backbones: The language models.
        reward: Directory of a reward model, if there is one.
    """

    backbones: list[Backbone]
    reward: str | None = None

    @property
    def sources(self) -> dict[str, str]:
        """Directory or hub id of each model that is served, by name; of adapters, their own."""
        whole = {backbone.name: backbone.source for backbone in self.backbones if backbone.name is not None}
        return whole | {name: folder for backbone in self.backbones for name, folder in backbone.adapters.items()}


def find_models(run: str, adapters: Mapping[str, str] | None = None) -> Found:
    """Finds what a run has exported.

    Args:
        run: Directory of a model; of a run, with ``hf/best`` or ``hf/last``; or of several runs, such as the demo's
            with ``sft``, ``reward`` and ``ppo``. Or a hub id.
        adapters: Adapters over the model that ``run`` names, by name: directories, also those of runs.

    Returns:
        The models. Each is named after the directory of its run; a model that is only served as the base of adapters
        is named ``base``.

    Raises:
        FileNotFoundError: There is no model.
        ValueError: ``adapters`` are given, and ``run`` is not one whole model.
    """
    exports = _exports(run)
    rewards = [source for source in exports.values() if _is_classifier(source)]
    models = {name: source for name, source in exports.items() if source not in rewards}
    if not models:
        raise FileNotFoundError(f"{run} has only a reward model. Give the directory of a language model.")
    reward = next(iter(rewards), None)
    if not adapters:
        return Found(_by_base(models), reward)
    if len(models) > 1 or any(map(_base_of, models.values())):
        raise ValueError(f"--adapters need RUN to be one whole model, but {run} has {', '.join(models)}.")
    named = {name: next(iter(_exports(source).values())) for name, source in adapters.items()}
    if "base" in named:
        raise ValueError("--adapters: base is the name of the model without adapters. Choose another name.")
    return Found([Backbone(next(iter(models.values())), "base", named)], reward)


def _exports(run: str) -> dict[str, str]:
    """Returns directories of models, by name."""
    folder = Path(run)
    if not folder.is_dir():
        if run.count("/") == 1 and not run.startswith((".", "/")) and not folder.parent.is_dir():
            return {run.split("/")[1]: run}  # a hub id
        near = did_you_mean(folder.name, [p.name for p in folder.parent.glob("*")]) if folder.parent.is_dir() else "."
        raise FileNotFoundError(f"There is no directory {run}{near}")
    runs = [folder] if _export(folder) else sorted(path for path in folder.iterdir() if path.is_dir())
    found = {_name(place): str(export) for place in runs if (export := _export(place)) is not None}
    if not found:
        raise FileNotFoundError(
            f"{run} has no model (config.json or adapter_config.json), neither itself nor in hf/best, hf/last or a "
            "folder of a run."
        )
    return found


def _by_base(models: Mapping[str, str]) -> list[Backbone]:
    """Joins adapters of one base. A base that is one of the models keeps its name."""
    whole = {_place(source): Backbone(source, name) for name, source in models.items() if _base_of(source) is None}
    bases: dict[str, Backbone] = {}
    named = {_place(source) for source in models.values()}
    for name, source in models.items():
        if (base := _base_of(source)) is not None:
            alone = None if _place(base) in named else "base" if not bases else f"base-{Path(base).name}"
            backbone = whole.get(_place(base)) or bases.setdefault(_place(base), Backbone(base, alone))
            backbone.adapters[name] = source
    return [*bases.values(), *whole.values()]


def _place(source: str) -> str:
    return str(Path(source).resolve()) if Path(source).is_dir() else source


def _base_of(source: str) -> str | None:
    """Returns the base of adapters; None for a whole model."""
    folder = Path(source)
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return None
    found = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not found:
        raise ValueError(f"The adapter_config.json of {source} does not name a base. Set base_model_name_or_path.")
    return str(found)


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


def _is_classifier(source: str) -> bool:
    config, adapter = Path(source) / "config.json", Path(source) / "adapter_config.json"
    if config.is_file():
        architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
        return any(name.endswith("ForSequenceClassification") for name in architectures)
    if adapter.is_file():
        return bool(json.loads(adapter.read_text(encoding="utf-8")).get("task_type") == "SEQ_CLS")
    return False
