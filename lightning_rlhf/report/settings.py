"""Describes settings as pairs of name and text, for live objects and for the files in which Lightning saves them."""

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

#: A setting: its name, its value as text, and whether it is known to differ from the default.
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
    """Describes the arguments of a module or data module, as far as the object stores them.

    Args:
        thing: The object, or None.

    Returns:
        Names of arguments, their values as text, and whether they differ from the defaults.
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
    """Describes the Trainer's settings that affect learning, its optimizers, and the machine."""
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
    """Reads the settings in a logger's directory: ``config.yaml`` of the command line, otherwise ``hparams.yaml``.

    Args:
        folder: The directory of ``metrics.csv``.

    Returns:
        Sections as in :class:`~lightning_rlhf.report.StageReport`, with those of the Trainer's settings that
        :func:`describe_trainer` shows. Empty without such files.

    Raises:
        ValueError: A file is not valid YAML.
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
    """Reads a YAML file of settings. Python objects in it become their fields or names; a missing file is empty.

    Raises:
        ValueError: The file is not valid YAML, or not a mapping.
    """
    if not path.exists():
        return {}
    try:
        found = yaml.load(path.read_text(encoding="utf-8", errors="replace"), _PlainLoader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}. Correct it, or move it away.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a mapping, but is a {type(found).__name__}. Correct it, or move it away.")
    return {str(name): value for name, value in found.items()}


class _PlainLoader(yaml.SafeLoader):
    """Loads YAML without making Python objects."""


def _fields_or_name(loader: yaml.SafeLoader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    return loader.construct_scalar(node) or suffix.partition(":")[2]  # type: ignore[arg-type]


_PlainLoader.add_multi_constructor("tag:yaml.org,2002:python/", _fields_or_name)


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """Describes a setting and the settings inside it: ``sampling.top_p``, ``optimizer`` and ``optimizer.lr``.

    Args:
        value: A plain value, a mapping such as Lightning's ``{class_path, init_args}``, a dataclass or a partial.
        name: Name of the setting. Empty for a whole section, whose class is then named ``class``.

    Returns:
        Texts by dotted name.
    """
    if isinstance(value, functools.partial):
        value = {"class_path": to_text(value.func), "init_args": value.keywords}
    elif is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    elif isinstance(value, list) and value and all(isinstance(v, Mapping) and v.keys() & _OBJECT for v in value):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        return {name: to_text(value)}
    out = {}
    if "class_path" in value:
        out[name or "class"] = _class_name(value["class_path"])
        value = value.get("init_args") or {}
    for key, inner in value.items():
        out |= flatten(inner, f"{name}.{key}" if name else str(key))
    return out


#: Keys of mappings that describe an object or a part of a reward; other mappings are rows of data.
_OBJECT = {"class_path", "source"}


def to_text(value: Any) -> str:
    """Formats a setting as text, without memory addresses and without lists of data."""
    torch = sys.modules.get("torch")  # it is loaded if the value is one of its objects
    if torch and isinstance(value, (torch.nn.Module, torch.Tensor)):
        return type(value).__name__
    if isinstance(value, functools.partial):
        return f"{to_text(value.func)}({', '.join(f'{k}={to_text(v)}' for k, v in value.keywords.items())})"
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


def _class_name(path: object) -> str:
    return str(path).rpartition(".")[2]


def _rows(values: Mapping[str, Any]) -> list[Setting]:
    flat: dict[str, str] = {}
    for name, value in values.items():
        if value is not None:
            flat |= flatten(value, name)
    return [(name, text, False) for name, text in flat.items()]
