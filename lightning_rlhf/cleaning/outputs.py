"""The files that cleaning and converting write: rows, what was left out and why, and a report."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from lightning_rlhf.data.sources import BadRows, OnBadRow, source_state
from lightning_rlhf.utils.filesystem import atomic_file

if TYPE_CHECKING:
    from lightning_rlhf.cleaning.example import Example


class NotedBadRows(BadRows):
    """Bad rows, each of which is also noted with its place.

    Args:
        policy: As of :class:`~lightning_rlhf.data.sources.BadRows`.
        note: Gets an entry for the file of what was left out.
    """

    def __init__(self, policy: OnBadRow, note: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__(policy, skip="set --on-bad-row skip")
        self._note = note

    def add(self, where: str, kind: str, reason: str) -> None:
        """Notes a bad row."""
        super().add(where, kind, reason)
        self._note({"where": where, "filter": "bad row", "reason": f"{kind}: {reason}"})


def dropped_entry(example: Example, name: str, reason: str) -> dict[str, Any]:
    """The entry of a row that a filter dropped."""
    measured = {"measured": example.notes} if example.notes else {}
    return {"where": example.where, "filter": name, "reason": reason, **measured, "row": example.row}


def json_line(value: Mapping[str, Any]) -> str:
    """A line of JSON; dates and decimals, as Parquet has them, become texts.

    Raises:
        ValueError: A number is NaN or infinite, which JSON can't hold.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def writable(examples: Iterable[Example], bad: BadRows) -> Iterator[Example]:
    """Passes on the examples whose rows JSON can hold; no stage reads some columns, so nothing has looked at them.

    Args:
        examples: The examples.
        bad: Gets the others.
    """
    for example in examples:
        try:
            json_line(example.row)
        except ValueError:
            name, value = next((name, value) for name, value in example.row.items() if not _holds(value))
            found = f"is {value}" if isinstance(value, float) else "holds NaN or an infinite number"
            bad.add(example.where, "no JSON", f"the column {name!r} {found}, which JSON can't hold. Write null instead")
        else:
            yield example


def _holds(value: Any) -> bool:
    """Returns whether JSON can hold a value."""
    try:
        json_line({"": value})
    except ValueError:
        return False
    return True


def check_outputs(sources: Sequence[str], outputs: Sequence[Path]) -> None:
    """Refuses to write over what is read.

    Raises:
        FileNotFoundError: An input isn't found.
        ValueError: An output is one of the inputs.
    """
    read = {os.path.realpath(file) for _, file, *_ in source_state(list(sources)) or []}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise ValueError(f"{path} is an input, and would be overwritten. Choose another --out.")


class Outputs:
    """The files that a command writes, as a context: all of them get their names at its end, or none does.

    Args:
        out: File for the rows. NAME.dropped.jsonl and NAME.report.json are written beside it.
        sources: What is read.

    Attributes:
        kept: Number of rows written.
        dropped: Number of entries of what was left out.

    Raises:
        FileNotFoundError: An input isn't found.
        ValueError: The file has another suffix than .jsonl or .jsonl.gz, or is one of the inputs.
    """

    def __init__(self, out: Path, sources: Sequence[str]) -> None:
        name = out.name.removesuffix(".gz")
        if not name.endswith(".jsonl"):
            raise ValueError(f"--out {out} has another suffix. Rows are written as .jsonl or .jsonl.gz.")
        stem = name.removesuffix(".jsonl")
        self._paths = [out, out.with_name(f"{stem}.dropped.jsonl"), out.with_name(f"{stem}.report.json")]
        check_outputs(sources, self._paths)
        self.kept = self.dropped = 0

    def __enter__(self) -> Outputs:
        self._stack = ExitStack()
        self._files: list[IO[str]] = [self._stack.enter_context(atomic_file(path)) for path in self._paths]
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def keep(self, line: str) -> None:
        """Writes a row, as a line of JSON."""
        self._files[0].write(line)
        self.kept += 1

    def drop(self, line: str) -> None:
        """Writes an entry of what was left out, as a line of JSON."""
        self._files[1].write(line)
        self.dropped += 1

    def note(self, entry: Mapping[str, Any]) -> None:
        """Writes an entry of what was left out."""
        self.drop(json_line(entry))

    def report(self, found: Mapping[str, Any]) -> None:
        """Writes the report."""
        self._files[2].write(json.dumps(found, ensure_ascii=False, allow_nan=False, indent=1, default=str) + "\n")

    def lines(self) -> list[str]:
        """Returns lines that say which files were written."""
        rows, dropped, report = self._paths
        return [
            f"Rows: {rows} ({self.kept:,})",
            f"Left out, with reasons: {dropped} ({self.dropped:,})",
            f"Report: {report}",
        ]
