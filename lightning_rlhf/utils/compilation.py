"""torch.compile, typed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """Excludes a function from ``torch.compile``, which would compile it again for each shape of its input."""
    return cast(Function, torch.compiler.disable(function))
