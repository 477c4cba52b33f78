"""Filters from a list of names and settings, as configurations write them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import lightning_rlhf.cleaning.filters as known
from lightning_rlhf.arguments import did_you_mean
from lightning_rlhf.cleaning.filters.base import Filter
from lightning_rlhf.utils.imports import import_object

#: The names of all filters.
NAMES = [name for name in known.__all__ if name not in ("Filter", "make_filters")]
#: Those that ``data clean`` uses unless others are named: the others need settings, or drop what cleaning should keep.
DEFAULT = ("Length", "Script", "Repetition", "Refusal", "MissingInput", "PersonalData", "NearDuplicate")


def make_filters(specs: Sequence[str | Mapping[str, Any] | Filter] = DEFAULT) -> list[Filter]:
    """Makes filters.

    Args:
        specs: For each a name (``Length``), a name with settings (``{Length: {max_answer: 500}}``), the same as
            ``{class_path: Length, init_args: {...}}``, or a filter. A filter of your own is named by its import path.

    Raises:
        ImportError: An import path at which there is nothing.
        ValueError: No filter has this name, or a setting is unknown, missing or wrong.

    Example:
        >>> script, length = make_filters(["Script", {"Length": {"min_answer": 2}}])
        >>> script.name, length.min_answer
        ('Script', 2)
    """
    return [spec if isinstance(spec, Filter) else _make(*_read(spec)) for spec in specs]


def _read(spec: object) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    if isinstance(spec, Mapping) and "class_path" in spec:
        return str(spec["class_path"]), dict(spec.get("init_args") or {})
    if isinstance(spec, Mapping) and len(spec) == 1:
        ((name, settings),) = spec.items()
        if settings is None or isinstance(settings, Mapping):
            return str(name), dict(settings or {})
    raise ValueError(f"A filter is {spec!r}. Write a name, or {{Name: {{setting: value}}}}.")


def _make(name: str, settings: dict[str, Any]) -> Filter:
    if name in NAMES:
        found = getattr(known, name)
    elif "." in name:
        found = import_object(name, "filter")
    else:
        raise ValueError(f"There is no filter {name}{did_you_mean(name, NAMES)} All: {', '.join(NAMES)}.")
    if not (inspect.isclass(found) and issubclass(found, Filter)):
        raise ValueError(f"{name} is no filter. Derive it from lightning_rlhf.cleaning.Filter.")
    signature = inspect.signature(found)
    for setting in settings:
        if setting not in signature.parameters:
            all_settings = ", ".join(signature.parameters) or "none"
            near = did_you_mean(setting, signature.parameters)
            raise ValueError(f"{name} has no setting {setting}{near} All: {all_settings}.")
    try:
        signature.bind(**settings)
    except TypeError as error:
        raise ValueError(f"{name}: {error}. Write {{{name}: {{setting: value}}}}.") from error
    try:
        made: Filter = found(**settings)
    except TypeError as error:
        given = ", ".join(f"{setting}={value!r}" for setting, value in settings.items())
        raise ValueError(f"{name}: a setting has a value of the wrong type ({given}): {error}.") from error
    return made
