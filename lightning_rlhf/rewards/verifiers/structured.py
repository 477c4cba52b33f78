"""Verifiers of structure: JSON that follows a schema."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.utils.imports import require
from lightning_rlhf.utils.text import one_line

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
    jsonschema: Any = require("jsonschema", "The verifier json_schema", "verify")
    scores: list[float | None] = []
    for text, given in zip(completions, schema, strict=True):
        if given is None:
            scores.append(None)
            continue
        try:
            wanted = json.loads(given) if isinstance(given, str) else dict(given)
            jsonschema.validators.validator_for(wanted).check_schema(wanted)
        except (ValueError, jsonschema.SchemaError) as error:
            raise ValueError(
                f"json_schema: the column schema has {str(given)[:60]!r}: {one_line(str(error), 80)}."
            ) from None
        fenced = _FENCED.search(text)
        try:
            value = json.loads(fenced[1] if fenced else text)
        except (ValueError, RecursionError):
            scores.append(0.0)
            continue
        follows = jsonschema.validators.validator_for(wanted)(wanted).is_valid(value)
        scores.append(1.0 if follows else 0.5)
    return scores
