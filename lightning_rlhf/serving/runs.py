"""Finds the models and the reward model in the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning_rlhf.models.runs import check_name, exports_of, source_at


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
    """Returns directories of models, or a hub id, by name."""
    folder = Path(run)
    if not folder.is_dir():
        check_name(run)
        return {run.rpartition("/")[2]: run}  # a hub id
    runs = [exports_of(folder)]
    runs = runs if any(runs) else [exports_of(path) for path in sorted(folder.iterdir())]
    if not any(runs):
        raise FileNotFoundError(
            f"{run} has no model (config.json or adapter_config.json), neither itself nor in hf/best, hf/last or a "
            "folder of a run."
        )
    return {exports[0].name: str(exports[0].path) for exports in runs if exports}


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
    found = source_at(Path(source))
    return found.base if found is not None and found.kind == "adapters" else None


def _is_classifier(source: str) -> bool:
    found = source_at(Path(source))
    return found is not None and found.is_reward_model
