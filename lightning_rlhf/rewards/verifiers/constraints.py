"""Verifiable instructions, as in IFEval (Zhou et al. 2023): words, length, case, keywords, language."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_rlhf.arguments import did_you_mean
from lightning_rlhf.rewards.verifiers.judging import each, verifier


def count_words(text: str) -> int:
    """Counts words, where a Chinese character is one."""
    return len(re.findall(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff]+(?:['’-]\w+)*", text))


def _sentences(text: str) -> int:
    return len([part for part in re.split(r"[.!?。！？]+", text) if part.strip()])


def _language(text: str, wanted: Any) -> bool:
    chinese, latin = (len(re.findall(letters, text)) for letters in (r"[\u4e00-\u9fff]", r"[A-Za-z]"))
    return chinese > latin if wanted == "zh" else latin > chinese


def _case(text: str, wanted: Any) -> bool:
    letters = [c for c in text if c.isalpha()]
    return bool(letters) and text == (text.lower() if wanted == "lower" else text.upper())


#: What can be asked, by its key: whether a text does what the value says.
CONSTRAINTS: dict[str, Callable[[str, Any], bool]] = {
    "min_words": lambda text, wanted: count_words(text) >= wanted,
    "max_words": lambda text, wanted: count_words(text) <= wanted,
    "min_characters": lambda text, wanted: len(text) >= wanted,
    "max_characters": lambda text, wanted: len(text) <= wanted,
    "sentences": lambda text, wanted: _sentences(text) == wanted,
    "paragraphs": lambda text, wanted: len(re.split(r"\n\s*\n", text)) == wanted,
    "contains": lambda text, wanted: all(word.lower() in text.lower() for word in wanted),
    "excludes": lambda text, wanted: not any(word.lower() in text.lower() for word in wanted),
    "starts_with": lambda text, wanted: text.startswith(wanted),
    "ends_with": lambda text, wanted: text.endswith(wanted),
    "case": _case,
    "language": _language,
}


#: What the value of each must be.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(
        ("min_words", "max_words", "min_characters", "max_characters", "sentences", "paragraphs"),
        ("a whole number, 0 or more", lambda value: type(value) is int and value >= 0),
    ),
    **dict.fromkeys(
        ("contains", "excludes"),
        ("a list of texts", lambda value: isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)),
    ),
    **dict.fromkeys(("starts_with", "ends_with"), ("a text", lambda value: isinstance(value, str))),
    "case": ("lower or upper", lambda value: value in ("lower", "upper")),
    "language": ("zh or en", lambda value: value in ("zh", "en")),
}


def _read(given: Mapping[str, Any] | str) -> Mapping[str, Any]:
    """The constraints of a row, checked."""
    try:
        wanted = json.loads(given) if isinstance(given, str) else given
    except ValueError:
        wanted = None
    if not isinstance(wanted, Mapping):
        raise ValueError("give an object, or JSON of one.")
    wanted = {name: value for name, value in wanted.items() if value is not None}  # Parquet gives all rows all keys
    for name, value in wanted.items():
        if name not in CONSTRAINTS:
            near = did_you_mean(name, CONSTRAINTS)
            raise ValueError(f"{name!r} is unknown{near} All: {', '.join(CONSTRAINTS)}.")
        wanted_kind, right = _KINDS[name]
        if not right(value):
            raise ValueError(f"{name} is {value!r}: give {wanted_kind}.")
    return wanted


def _explain(completion: str, constraints: Mapping[str, Any] | str) -> str:
    broken = [name for name, value in _read(constraints).items() if not CONSTRAINTS[name](completion.strip(), value)]
    return f"breaks {', '.join(broken)}" if broken else "keeps all"


@verifier(_explain)
def constraints(
    prompts: Sequence[object],
    completions: Sequence[str],
    constraints: Mapping[str, Any] | str | Sequence[Mapping[str, Any] | str | None],
) -> list[float | None]:
    """The share of the constraints in the column ``constraints`` that a completion keeps.

    Args:
        prompts: (S,) not read.
        completions: (S,) texts; blanks around them do not count.
        constraints: Column of (S,) objects, or JSON, such as ``{"max_words": 12, "contains": ["moon"]}``, or one as an
            option. A null in them asks for nothing.

    Returns:
        (S,) scores; None where there are no constraints.

    Raises:
        RewardError: A constraint is unknown, or its value is of a wrong kind.

    Example:
        >>> constraints([""] * 2, ["Hello moon!", "hi"], [{"contains": ["moon"], "ends_with": "!"}, None])
        [1.0, None]
    """
    scores: list[float | None] = []
    for text, wanted in zip(
        completions, each("constraints", "constraints", constraints, completions, _read), strict=True
    ):
        if not wanted:
            scores.append(None)
            continue
        kept = sum(CONSTRAINTS[name](text.strip(), value) for name, value in wanted.items())
        scores.append(kept / len(wanted))
    return scores
