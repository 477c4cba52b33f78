"""The tree of a row: the rows that it was grown from, back to the seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lightning_rlhf.cleaning.example import Example
from lightning_rlhf.utils.text import one_line

_CHARACTERS = 100


class Origin(NamedTuple):
    """Where a row comes from, by its own columns.

    Attributes:
        text: The beginning of its instruction.
        parents: Ids of the rows that it was grown from.
        facts: Further facts of its provenance.
    """

    text: str
    parents: tuple[str, ...]
    facts: str


def origins(examples: Iterable[Example]) -> dict[str, Origin]:
    """The origins of all rows that have the column ``id``.

    Raises:
        ValueError: Two rows have one id.
    """
    found: dict[str, Origin] = {}
    for example in examples:
        id = example.row.get("id")
        if id is None:
            continue
        if str(id) in found:
            raise ValueError(f"{example.where}: the id {id} comes twice. Give each row an id of its own.")
        said = example.row.get("provenance")
        provenance: Mapping[str, Any] = said if isinstance(said, Mapping) else {}
        parents = provenance.get("parents")
        known = tuple(map(str, parents)) if isinstance(parents, Sequence) and not isinstance(parents, str) else ()
        facts = ", ".join(f"{k} {v}" for k, v in provenance.items() if isinstance(v, (str, int, float)))
        found[str(id)] = Origin(one_line(example.instruction, _CHARACTERS), known, facts)
    return found


def tree(found: Mapping[str, Origin], id: str) -> Iterator[str]:
    """The tree of a row, a line for each.

    A row that comes a second time is not spread out again.

    Args:
        found: The rows.
        id: The row's id.

    Raises:
        KeyError: No row has the id.
    """
    if id not in found:
        raise KeyError(id)
    yield from _lines(found, id, "", "", set())


def _lines(found: Mapping[str, Origin], id: str, first: str, rest: str, shown: set[str]) -> Iterator[str]:
    row = found.get(id)
    if row is None:
        yield f"{first}{id}: not in these files"
        return
    again = id in shown and row.parents
    yield f"{first}{id}: {row.text}{' (shown above)' if again else ''}"
    if again:
        return
    shown.add(id)
    if row.facts:
        yield f"{rest}{'│' if row.parents else ' '}    {one_line(row.facts, 2 * _CHARACTERS)}"
    for i, parent in enumerate(row.parents):
        last = i == len(row.parents) - 1
        yield from _lines(
            found, parent, f"{rest}{'└─ ' if last else '├─ '}", f"{rest}{'   ' if last else '│  '}", shown
        )
