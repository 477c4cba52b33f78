"""Verifiers of structure: JSON that follows a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.rewards import workers
from lightning_rlhf.rewards.verifiers.judging import Score, each, explained_by, judge
from lightning_rlhf.utils.imports import require
from lightning_rlhf.utils.text import one_line

_JOB = "lightning_rlhf.rewards.jobs.texts:follows"
_SCORES = {"follows": 1.0, "differs": 0.5, "none": 0.0}
_SAID = {"follows": "follows the schema", "differs": "JSON, but", "none": "no JSON:"}


def _explain(completion: str, schema: Mapping[str, Any] | str) -> str:
    outcome = workers.run(_JOB, [(completion, _read(schema))], 5.0)[0]
    return outcome.why or f"{_SAID.get(outcome.value[0], 'no schema:')} {outcome.value[1]}".strip()


@explained_by(_explain)
def json_schema(
    prompts: Sequence[object],
    completions: Sequence[str],
    schema: Mapping[str, Any] | str | Sequence[Mapping[str, Any] | str | None],
    timeout: float = 5.0,
    failed_score: float | None = 0.0,
) -> list[Score]:
    """1 where a completion is JSON that follows the JSON Schema in the column ``schema``, 0.5 if it is JSON, else 0.

    Args:
        prompts: (S,) not read.
        completions: (S,) JSON, alone or in the first fenced block.
        schema: Column of (S,) schemas, as objects or as JSON, or one as an option.
        timeout: CPU seconds for a completion: a schema may have expressions whose search takes for ever.
        failed_score: Score of a completion for which it took longer; None leaves it out.

    Returns:
        (S,) scores; None where there is no schema.

    Raises:
        ImportError: The package jsonschema is missing.
        ValueError: A schema is none.
    """
    require("jsonschema", "The verifier json_schema", "verify")
    pairs = zip(completions, each("json_schema", "schema", schema, completions), strict=True)
    tasks = [None if given is None else (text, _read(given)) for text, given in pairs]

    def score(found: list[str]) -> float:
        kind, why = found
        if kind.startswith("{"):  # the schema itself
            raise _no_schema(kind, why)
        return _SCORES[kind]

    return judge("json_schema", _JOB, tasks, score, timeout, failed_score)


def _read(given: Mapping[str, Any] | str) -> Mapping[str, Any]:
    try:
        wanted = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise _no_schema(given, str(error)) from None
    if not isinstance(wanted, Mapping):
        raise _no_schema(given, "a schema is an object, or JSON of one")
    return wanted


def _no_schema(given: object, why: str) -> ValueError:
    return ValueError(f"json_schema: the column schema has {str(given)[:60]!r}: {one_line(why, 80)}.")
