"""Verifiers of structure: JSON that follows a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.utils.imports import require
from lightning_rlhf.utils.text import one_line

#: jsonschema and what it resolves references by.
_NEEDS = ("jsonschema", "referencing")
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def json_schema(
    prompts: Sequence[object], completions: Sequence[str], schema: Sequence[Mapping[str, Any] | str | None]
) -> list[float | None]:
    """1 where a completion is JSON that follows the JSON Schema in the column ``schema``, 0.5 if it is JSON, else 0.

    Args:
        prompts: (S,) not read.
        completions: (S,) JSON, alone or in the first fenced block.
        schema: (S,) schemas, as objects or as JSON.

    Returns:
        (S,) scores; None where there is no schema.

    Raises:
        ImportError: The package jsonschema is missing.
        ValueError: A schema is none.
    """
    jsonschema, referencing = (require(name, "The verifier json_schema", "verify") for name in _NEEDS)
    scores: list[float | None] = []
    for text, given in zip(completions, schema, strict=True):
        if given is None:
            scores.append(None)
            continue
        try:
            wanted = json.loads(given) if isinstance(given, str) else given
            if not isinstance(wanted, Mapping):
                raise ValueError("a schema is an object, or JSON of one")
            jsonschema.validators.validator_for(wanted).check_schema(wanted)
        except (ValueError, jsonschema.SchemaError) as error:
            raise _no_schema(given, error) from None
        fenced = _FENCED.search(text)
        try:
            value = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError):
            scores.append(0.0)
            continue
        try:
            follows = jsonschema.validators.validator_for(wanted)(wanted).is_valid(value)
        except (RecursionError, referencing.exceptions.Unresolvable) as error:
            raise _no_schema(given, error) from None
        scores.append(1.0 if follows else 0.5)
    return scores


def _no_schema(given: object, error: Exception) -> ValueError:
    return ValueError(f"json_schema: the column schema has {str(given)[:60]!r}: {one_line(str(error), 80)}.")
