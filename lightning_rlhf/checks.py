"""Checks arguments of public classes in Python as the command line checks them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import numpy as np


class Range(NamedTuple):
    """The range of numbers that an argument may have.

    Attributes:
        low: Smallest number.
        high: Largest number.
        above: Exclude ``low`` itself.
        below: Exclude ``high`` itself.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: object) -> bool:
        number: Any = value
        low = self.low < number if self.above else self.low <= number
        return bool(low and (number < self.high if self.below else number <= self.high))

    def __str__(self) -> str:
        low = [f"{'above' if self.above else 'at least'} {self.low:g}"] if self.low > -math.inf else []
        high = [f"{'below' if self.below else 'at most'} {self.high:g}"] if self.high < math.inf else []
        return " and ".join(low + high)


def check_arguments(owner: Any, given: Mapping[str, Any], prefix: str = "", **ranges: Range) -> None:
    """Checks arguments against annotations: the choices of a ``Literal``, numbers and bools.

    Args:
        owner: The function or the class that has the annotations.
        given: Arguments by name. Arguments of other types are not checked.
        prefix: Text before names in messages.
        ranges: Allowed range of each number. NaN is never allowed.

    Raises:
        ValueError: An argument has a wrong type, or is out of its range.
    """
    for name, hint in inspect.get_annotations(owner, eval_str=True).items():
        origin: Any = get_origin(hint)
        kinds = get_args(hint) if origin in (Union, UnionType) else (hint,)
        if name not in given or (given[name] is None and NoneType in kinds):
            continue
        value, kinds = given[name], tuple(kind for kind in kinds if kind is not NoneType)
        if all(get_origin(kind) is Literal for kind in kinds):
            choices = [choice for kind in kinds for choice in get_args(kind)]
            if value not in choices:
                raise ValueError(f"{prefix}{name} is {value!r}. Choose one of: {', '.join(map(str, choices))}.")
        elif len(kinds) == 1 and kinds[0] in _KINDS:
            kind, what = _KINDS[kinds[0]]
            if not isinstance(value, kind) or isinstance(value, _BOOL) != (kind is _BOOL):
                raise ValueError(f"{prefix}{name} must be {what}, got {value!r}.")
            allowed = ranges.get(name, Range())
            if kind is not _BOOL and value not in allowed:
                raise ValueError(f"{prefix}{name} must be {str(allowed) or 'a number'}, got {value!r}.")


_BOOL = (bool, np.bool_)
_KINDS: dict[Any, tuple[Any, str]] = {
    bool: (_BOOL, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
}
