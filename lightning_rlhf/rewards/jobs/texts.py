"""Regular expressions and JSON schemas, whose search may take for ever."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_FENCED = re.compile(r"```(?:json)?[^\S\n]*\n(.*?)```", re.DOTALL)


def search(text: str, pattern: str, whole: bool) -> str | None:
    """Returns what an expression matches: somewhere, or with ``whole`` all of a text but for blanks around it."""
    found = re.fullmatch(pattern, text.strip(), re.DOTALL) if whole else re.search(pattern, text, re.DOTALL)
    return None if found is None else found[0]


def check_schema(schema: Mapping[str, Any]) -> None:
    """Checks a JSON Schema, but not where its references lead.

    Raises:
        ValueError: It is none.
    """
    import jsonschema

    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except (RecursionError, re.error, jsonschema.SchemaError) as error:
        raise ValueError(str(error)) from None


def follows(text: str, schema: Mapping[str, Any]) -> list[str]:
    """Reads JSON and compares it with a schema that :func:`check_schema` has checked.

    Returns:
        ``none`` with why it is no JSON, ``follows``, ``differs`` with the first difference; or the start of the
        schema, with what is wrong about it.
    """
    import jsonschema
    from referencing.exceptions import Unresolvable

    fenced = _FENCED.search(text)
    try:
        value = json.loads(fenced[1] if fenced else text)
    except RecursionError:
        return ["none", "it is nested too deeply"]
    except ValueError as error:
        return ["none", str(error)]
    try:
        validator = jsonschema.validators.validator_for(schema)(schema)
        differs = next(iter(validator.iter_errors(value)), None)
    except (RecursionError, re.error, Unresolvable) as error:
        return [json.dumps(schema)[:60], str(error)]
    return ["follows", ""] if differs is None else ["differs", f"{differs.json_path}: {differs.message}"]
