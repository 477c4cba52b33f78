"""torch.compile, typed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Keeps ``torch.compile`` out of a function: the compiled code would be made anew for each shape of its input."""
    return cast(Function, torch.compiler.disable(function))
