"""Mathematical answers, read and compared by math-verify; its own time limits are off, as a worker has one."""

from __future__ import annotations

import logging
from typing import Any

from math_verify import parse, verify

from lightning_rlhf.rewards.functions import answer_match, marked_answer

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs what it can't parse


#: Characters at the end of a completion without a mark in which its answer is looked for.
_TAIL = 2000
#: Longest text that is an answer alone.
_ALONE = 200


def equal(text: str, answer: str) -> bool:
    """Returns whether a completion's answer is the one wanted: as a text or number, or else by math-verify."""
    if answer_match([""], [text], [answer]) == [1.0]:
        return True
    return bool(verify(_boxed(answer), _parse(text), timeout_seconds=None))


def explain(text: str, answer: str) -> str:
    """What was read of a completion and of the answer, for people."""
    return f"{_shown(_parse(text))}; wanted {_shown(_boxed(answer))}"


def _parse(text: str) -> list[Any]:
    """What math-verify reads in a completion: in the marked answer where there is one, or at the text's end."""
    found: list[Any] = parse(text[-_TAIL:], parsing_timeout=None) if marked_answer(text) == text else []
    if found or (marked_answer(text) == text and len(text) > _ALONE):
        return found
    return _boxed(text)  # an answer alone, such as (1, 2), is read in a box only


def _boxed(text: str) -> list[Any]:
    found: list[Any] = parse(f"\\boxed{{{marked_answer(text).strip()[-_TAIL:]}}}", parsing_timeout=None)
    return found


def _shown(parsed: list[Any]) -> str:
    return " or ".join(dict.fromkeys(map(repr, map(str, parsed)))) if parsed else "nothing"
