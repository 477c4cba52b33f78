"""Says in one line what is wrong with a request: the field, what it must be, and what it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from lightning_rlhf.arguments import did_you_mean
from lightning_rlhf.serving.schema import Body

_LONGEST = 60


def explain(errors: Sequence[Mapping[str, Any]], body: type[Body]) -> tuple[str, str | None]:
    """Describes what pydantic found wrong first.

    Args:
        errors: ``ValidationError.errors()``; locations start with ``body``.
        body: What the request should have been.

    Returns:
        The message, and the field's path or None.
    """
    # a field of several types has an error per type: ours, or the deepest, is of the type that was meant
    same = [error for error in errors if error["loc"][:2] == errors[0]["loc"][:2]]
    error = max(same, key=lambda error: (error["type"] == "value_error", len(error["loc"])))
    if error["type"] == "json_invalid":
        return f"The body is not JSON: {error['ctx']['error']} at character {error['loc'][-1]}.", None
    param, rule, known = _find(error, body)
    if error["type"] == "value_error":
        reason = str(error["ctx"]["error"])
        return f"{param}: {reason}" if param else reason, param
    if param is None:
        return "The body must be a JSON object.", None
    if error["type"] == "extra_forbidden":
        return f"There is no field {param}{did_you_mean(str(error['loc'][-1]), known)}", param
    if error["type"] == "missing":
        return f"{param} is missing. Give {rule}.", param
    return f"{param} must be {rule}; got {_shorten(error['input'])}.", param


def _find(error: Mapping[str, Any], body: type[Body]) -> tuple[str | None, str, list[str]]:
    """Returns the path of a field, what it must be, and the fields of the object that it is in.

    pydantic's location also has names of types and keys of mappings, which are left out.
    """
    path, rule = "", ""
    known = inner = {**body.model_fields}
    for part in error["loc"][1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in inner or (error["type"] == "extra_forbidden" and part == error["loc"][-1]):
            path += f".{part}"
            known = inner
            if part in inner:
                rule = inner[part].description or ""
                inner = {k: v for found in _bodies(inner[part].annotation) for k, v in found.model_fields.items()}
    return path.lstrip(".") or None, rule, list(known)


def _bodies(annotation: Any) -> Iterator[type[Body]]:
    """Yields the classes of objects that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Body):
        yield annotation
    for part in get_args(annotation):
        yield from _bodies(part)


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
