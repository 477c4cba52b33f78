"""Which groups of completions a report shows, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: What an answer of a group shows beside its text and its scores.
_NUMBERS = ("advantage", "length")


def choose_groups(records: Sequence[Mapping[str, Any]], count: int = 4) -> list[dict[str, Any]]:
    """Chooses the prompts whose completions differ most in score, each with its best and its worst completion.

    Args:
        records: Completions of an iteration, as ``CompletionsTable`` writes them.
        count: Most prompts to take.

    Returns:
        For each: ``iteration``, ``prompt``, ``size``, ``mean`` of its scores, and ``answers``, the best and the worst:
        their text, whether they ended, and their numbers. Without two different scores there is one answer.
    """
    by_row: dict[int, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["score"] is not None:
            by_row.setdefault(record["row"], []).append(record)
    found = []
    for own in by_row.values():
        ranked = sorted(own, key=lambda record: -record["score"])
        spread = ranked[0]["score"] - ranked[-1]["score"]
        ends = [ranked[0], ranked[-1]] if spread else ranked[:1]
        mean = sum(record["score"] for record in own) / len(own)
        head = {"iteration": own[0]["iteration"], "prompt": own[0]["prompt"], "size": len(own), "mean": mean}
        found.append((spread, {**head, "answers": [_answer(record) for record in ends]}))
    return [group for _, group in sorted(found, key=lambda pair: -pair[0])[:count]]


def _answer(record: Mapping[str, Any]) -> dict[str, Any]:
    names = [name for name in record if name == "score" or name.startswith(("score/", "reward/")) or name in _NUMBERS]
    numbers = {name: record[name] for name in names if record[name] is not None}
    return {"completion": record["completion"], "ended": not record["truncated"], **numbers}
