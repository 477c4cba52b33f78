"""The tasks that growth begins with."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_rlhf.cleaning.example import read_examples
from lightning_rlhf.data.sources import BadRows, Source

BUNDLED = "bundled"


@dataclass(frozen=True)
class Task:
    """A task that a prompt can show: a seed, or a row that was grown.

    Attributes:
        id: Its name in provenance.
        text: The user's turn.
        lang: Its language.
        kind: Its kind, such as ``summary``; empty if the seeds have none.
    """

    id: str
    text: str
    lang: str
    kind: str


def bundled_seeds() -> list[str]:
    """The files of the seeds that come with the package."""
    folder = importlib.resources.files("lightning_rlhf.data") / "bundled"
    return sorted(
        str(file) for file in folder.iterdir() if file.name.startswith(("instructions.", "seeds.")) and file.is_file()
    )


def read_seeds(source: Source, languages: Iterable[str], bad: BadRows) -> list[tuple[Task, dict[str, Any]]]:
    """Reads seeds: the first user turn of each row, in any format that the data modules read.

    The language of a row is its column ``lang`` or ``language``, otherwise that of the text; its kind is its column
    ``category``. Rows of other languages are left out.

    Args:
        source: Files in any format, or ``bundled``.
        languages: Languages to keep.
        bad: Gets the rows that can't be used.

    Returns:
        The tasks, each with the row that shows where it comes from.

    Raises:
        ValueError: A language has no seeds.
    """
    wanted = list(languages)
    counts = dict.fromkeys(wanted, 0)
    found = []
    for example in read_examples(bundled_seeds() if source == BUNDLED else source, bad):
        if example.lang not in counts or not example.instruction.strip():
            continue
        counts[example.lang] += 1
        category = example.row.get("category")
        task = Task(
            f"seed-{example.lang}-{counts[example.lang]}",
            example.instruction.strip(),
            example.lang,
            category if isinstance(category, str) else "",
        )
        row = {"id": task.id, "prompt": task.text, "lang": task.lang, "category": task.kind}
        found.append((task, {**row, "provenance": {"seed": _place(example.where)}}))
    if missing := [lang for lang in wanted if not counts[lang]]:
        raise ValueError(f"seeds: there is no row in the language {missing[0]!r}. Add some, or ask for others.")
    return found


def _place(where: str) -> str:
    """A place without the folder: the same on every machine."""
    return where.replace("\\", "/").rpartition("/")[2]


def kinds_of(tasks: Sequence[Task], lang: str) -> list[str]:
    """The kinds of a language's tasks, in order of appearance; one empty kind if there are none."""
    return list(dict.fromkeys(task.kind for task in tasks if task.lang == lang)) or [""]
