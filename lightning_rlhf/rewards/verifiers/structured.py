"""Verifiers of structure: JSON that follows a schema."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_rlhf.rewards import workers
from lightning_rlhf.rewards.jobs.texts import check_schema
from lightning_rlhf.rewards.verifiers.judging import Score, bad_value, each, is_column, judge, verifier
from lightning_rlhf.utils.imports import require
from lightning_rlhf.utils.text import one_line

_JOB = "lightning_rlhf.rewards.jobs.texts:follows"
_SCORES = {"follows": 1.0, "differs": 0.5, "none": 0.0}
_SAID = {"follows": "follows the schema", "differs": "JSON, but", "none": "no JSON:"}


def _explain(completion: str, schema: Mapping[str, Any] | str) -> str:
    outcome = workers.run(_JOB, [(completion, _read(schema))], 5.0)[0]
    return outcome.why or f"{_SAID.get(outcome.value[0], 'no schema:')} {outcome.value[1]}".strip()


@verifier(_explain)
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
        RewardError: A schema can't be read, or an option is wrong.
    """
    require("jsonschema", "The verifier json_schema", "verify")
    schemas = each("json_schema", "schema", schema, completions, _read)
    tasks = [None if wanted is None else (text, wanted) for text, wanted in zip(completions, schemas, strict=True)]

    def score(found: list[str]) -> float:
        kind, why = found
        if kind.startswith("{"):  # the schema itself
            raise bad_value("json_schema", "schema", is_column(schema), kind, f"{one_line(why, 80)}.")
        return _SCORES[kind]

    return judge("json_schema", _JOB, tasks, score, timeout, failed_score)


def _read(given: object) -> Mapping[str, Any]:
    try:
        wanted = json.loads(given) if isinstance(given, str) else given
        if not isinstance(wanted, Mapping):
            raise ValueError("a schema is an object, or JSON of one")
        _check(json.dumps(wanted, default=str))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{one_line(str(error), 80)}.") from None
    return wanted


@functools.lru_cache
def _check(schema: str) -> None:
    """Checks a schema once, as all completions of a prompt have the same."""
    check_schema(json.loads(schema))
