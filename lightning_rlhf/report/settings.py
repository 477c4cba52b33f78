"""Settings as rows of name and text: of live objects, and of the files that Lightning keeps them in."""

from __future__ import annotations

import functools
import inspect
import os
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

#: A setting: its name, its value in words, and whether it is known to differ from the default.
Setting = tuple[str, str, bool]
_TRAINER = (
    "max_steps",
    "max_epochs",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "precision",
    "limit_train_batches",
    "limit_val_batches",
    "val_check_interval",
)
_OPTIMIZER = ("lr", "momentum", "betas", "eps", "weight_decay")


def describe(thing: Any) -> list[Setting]:
    """What a module or data module was made with, as far as it keeps it.

    Args:
        thing: The object, or None.

    Returns:
        Names of arguments, values in words, and whether they differ from the defaults.
    """
    if thing is None:
        return []
    out = [("class", type(thing).__name__, False)]
    saved: Mapping[str, Any] = getattr(thing, "hparams", {})
    kept = [saved] if saved else [getattr(thing, "sources", {}), vars(thing)]
    for name, argument in inspect.signature(type(thing).__init__).parameters.items():
        home = next((values for values in kept if name in values), None)
        if home is not None and name != "self":
            default = flatten(home[name] if argument.default is argument.empty else argument.default, name)
            out += [(key, text, default.get(key) != text) for key, text in flatten(home[name], name).items()]
    return out


def describe_trainer(trainer: Any) -> list[Setting]:
    """Those of the Trainer's settings that decide what is learnt, its optimizers, and what it ran on."""
    values: dict[str, Any] = {name: getattr(trainer, name) for name in _TRAINER}
    for i, optimizer in enumerate(trainer.optimizers):
        known = {name: optimizer.defaults[name] for name in _OPTIMIZER if name in optimizer.defaults}
        made = {"class_path": type(optimizer).__name__, "init_args": known}
        values[f"optimizer {i}" if i else "optimizer"] = made
    for i, config in enumerate(trainer.lr_scheduler_configs):
        values[f"lr_scheduler {i}" if i else "lr_scheduler"] = type(config.scheduler).__name__
    values["strategy"] = type(trainer.strategy).__name__
    values["devices"] = f"{trainer.world_size} x {trainer.strategy.root_device.type}"
    values["seed"] = os.environ.get("PL_GLOBAL_SEED")
    packages = ", ".join(f"{name} {version(name)}" for name in ("lightning", "torch", "transformers"))
    values["versions"] = f"Python {platform.python_version()}, {packages}"
    return _rows(values)


def read_settings(folder: Path) -> dict[str, list[Setting]]:
    """Settings of a logger's folder: of the command line's ``config.yaml``, else of ``hparams.yaml``.

    Args:
        folder: Where ``metrics.csv`` is.

    Returns:
        Sections as :class:`~lightning_rlhf.report.StageReport` has them; of the Trainer's settings those that
        :func:`describe_trainer` names, as far as they were given. Empty without such files.

    Raises:
        ValueError: A file is no YAML.
    """
    if config := read_yaml(folder / "config.yaml"):
        given = config.get("trainer") or {}
        trainer = {name: given.get(name) for name in (*_TRAINER, "strategy", "devices")}
        trainer["seed"] = config.get("seed_everything")
        model, data = config.get("model"), config.get("data")
        sections = {"Model": flatten(model) if model else {}, "Data": flatten(data) if data else {}}
        return {**{k: [(*row, False) for row in v.items()] for k, v in sections.items()}, "Trainer": _rows(trainer)}
    hparams = read_yaml(folder / "hparams.yaml")
    kind = {"class": hparams["_stage"]} if "_stage" in hparams else {}
    own = {name: value for name, value in hparams.items() if not name.startswith("_")}
    rows = [*kind.items(), *flatten(own).items()] if own else []
    return {"Model": [(name, text, False) for name, text in rows]} if rows else {}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings; empty where there is none. Python objects in it become their fields or names.

    Raises:
        ValueError: It is no YAML, or no mapping.
    """
    if not path.exists():
        return {}
    try:
        found = yaml.load(path.read_text(encoding="utf-8", errors="replace"), _Plain) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}. Mend it, or move it away to do without.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no settings, but {type(found).__name__}. Mend it, or move it away.")
    return {str(name): value for name, value in found.items()}


class _Plain(yaml.SafeLoader):
    """Makes no Python objects."""


def _plain(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node) or suffix.partition(":")[2]  # type: ignore[arg-type]


_Plain.add_multi_constructor("tag:yaml.org,2002:python/", _plain)


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """A setting in words, and those inside it: ``sampling.top_p``, ``optimizer`` and ``optimizer.lr``.

    Args:
        value: Plain values; mappings, among them Lightning's ``{class_path, init_args}``; dataclasses; partials.
        name: Of the setting; none for a whole section, whose class then is ``class``.

    Returns:
        Texts by dotted name.
    """
    if isinstance(value, functools.partial):
        value = {"class_path": say(value.func), "init_args": value.keywords}
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif isinstance(value, list) and value and all(isinstance(v, Mapping) and v.keys() & _OBJECT for v in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        return {name: say(value)}
    out = {}
    if "class_path" in value:
        out[name or "class"] = _short(value["class_path"])
        value = value.get("init_args") or {}
    for key, inner in value.items():
        out |= flatten(inner, f"{name}.{key}" if name else str(key))
    return out


#: What tells the mappings that describe an object (or a part of a reward) from rows of data.
_OBJECT = {"class_path", "source"}


def say(value: Any) -> str:
    """A setting in words that don't name addresses in memory, and don't list data."""
    torch = sys.modules.get("torch")  # it is there wherever one of its objects is
    if torch and isinstance(value, (torch.nn.Module, torch.Tensor)):
        return type(value).__name__
    if isinstance(value, functools.partial):
        return f"{say(value.func)}({', '.join(f'{k}={say(v)}' for k, v in value.keywords.items())})"
    if isinstance(value, type) or inspect.isroutine(value):
        return str(value.__qualname__).rpartition("<locals>.")[2]
    if isinstance(value, (list, tuple)):
        if any(isinstance(item, Mapping) for item in value):
            return f"{len(value)} rows"
        value = list(value)  # YAML has no tuples
    if isinstance(value, (str, os.PathLike)):
        text = str(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}… ({len(text)} characters)"
    text = repr(value)
    return type(value).__name__ if " at 0x" in text or len(text) > _LONGEST else text


_LONGEST = 400


def _short(path: object) -> str:
    return str(path).rpartition(".")[2]


def _rows(values: Mapping[str, Any]) -> list[Setting]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if value is not None:
            flat |= flatten(value, name)
    return [(name, text, False) for name, text in flat.items()]
