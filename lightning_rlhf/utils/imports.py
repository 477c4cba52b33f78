"""Objects by their import paths."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


@contextmanager
def search_current_directory() -> Iterator[None]:
    """Within it, modules are also found in the current directory.

    The search path of a console script starts where the script is installed.
    """
    here = os.getcwd()
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def import_object(path: str, what: str) -> Any:
    """Imports an object; the current directory is searched too.

    Args:
        path: ``package.module.name`` or ``package.module:name``.
        what: What the object is called in messages.

    Returns:
        The object.

    Raises:
        ImportError: There is no such module or name, or the module imports something that is not there.
    """
    module, _, name = path.rpartition(":" if ":" in path else ".")
    if not module:
        raise ImportError(f"{path!r} is no import path: those look like package.module.name.")
    try:
        with search_current_directory():
            found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # it is there, and something that it imports is not
        raise ImportError(
            f"Can't import the {what} {path!r}: there is no module {error.name!r}, neither installed nor in "
            f"{os.getcwd()}{_near(error.name, _beside(error.name))} Put its folder on PYTHONPATH."
        ) from error
    if not hasattr(found, name):
        defined = (n for n, value in vars(found).items() if _is_own(value, module) and not n.startswith("_"))
        own = sorted(getattr(found, "__all__", defined))
        raise ImportError(
            f"Can't import the {what} {path!r}: {module} has no {name}{_near(name, own)} It has: "
            f"{', '.join(own) or 'nothing'}."
        )
    return getattr(found, name)


def require(module: str, what: str, extra: str) -> ModuleType:
    """Imports a module of an optional dependency.

    Args:
        module: Its name.
        what: What needs it, in messages: ``Telling languages apart``.
        extra: The extra of this package that installs it.

    Raises:
        ImportError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name != top:
            raise
        raise ImportError(f"{what} needs {top}. Install it: pip install 'lightning_rlhf[{extra}]'") from error


def _near(name: str, names: Iterable[str]) -> str:
    """The end of a sentence, with the name that may be meant."""
    near = difflib.get_close_matches(name, list(names), 1)
    return f"; did you mean {near[0]}?" if near else "."


def _beside(module: str) -> Iterator[str]:
    """Yields the modules that are where one is not."""
    parent = module.rpartition(".")[0]
    places = getattr(sys.modules.get(parent), "__path__", []) if parent else [os.getcwd()]
    return (f"{parent}{parent and '.'}{found.name}" for found in pkgutil.iter_modules(places))


def _is_own(value: object, module: str) -> bool:
    """Returns whether a module made a value, rather than importing it."""
    if inspect.isroutine(value) or inspect.isclass(value):
        return value.__module__ == module
    return not inspect.ismodule(value)
