"""Votes on answers, in files that training reads: ``votes.jsonl``, ``preferences.jsonl``, ``unpaired.jsonl``."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock

from lightning_rlhf.data.formats import FormatError
from lightning_rlhf.data.preference_formats import to_preference
from lightning_rlhf.utils.filesystem import sync

log = logging.getLogger(__name__)
Row = dict[str, Any]
WINNERS = {"left": 0, "right": 1}
THUMBS = {"good": True, "bad": False}
_SECONDS_TO_LOCK = 30


class Votes:
    """The votes in a folder, which several processes may write to.

    ``votes.jsonl`` has all that happened, in order: a line per vote, and a line per vote that was taken back. It only
    grows, and each line is on the disk before it counts. The other files follow from it: ``preferences.jsonl`` has the
    decided comparisons and the edited answers as rows of the format ``pair``, ``unpaired.jsonl`` the thumbs. Both are
    made anew when a vote is taken back and when a server starts, so a crash between two files is mended.

    Args:
        folder: The folder. It is made by the first vote.
    """

    def __init__(self, folder: str | os.PathLike[str] = "runs/chat") -> None:
        self.folder = Path(folder)
        self._votes = self.folder / "votes.jsonl"
        self._derived = {self.folder / "preferences.jsonl": preferences, self.folder / "unpaired.jsonl": unpaired}

    def mend(self) -> None:
        """Makes what follows from the votes, if there are any.

        Raises:
            ValueError: A line is not a vote.
            OSError: The files cannot be read or written.
        """
        if self._votes.exists():
            with self._locked():
                self._derive()

    def add(self, vote: Mapping[str, Any]) -> Row:
        """Writes a vote.

        Args:
            vote: The fields of a :class:`~lightning_rlhf.serving.vote_schema.VoteBody`, without those that are None.

        Returns:
            The vote with its ``id`` and ``time``. It is on the disk.

        Raises:
            OSError: It cannot be written; then nothing is.
        """
        row = {"id": uuid4().hex, "time": _now(), "kind": "vote", **vote}
        with self._locked():
            _append(self._votes, [row])
            try:
                for path, rows in self._derived.items():
                    _append(path, rows(row))
            except OSError as error:  # the vote counts, and these files are made anew from it
                log.warning("%s. It is made anew when the server starts.", error)
        return row

    def undo(self, vote_id: str) -> None:
        """Takes a vote back.

        Raises:
            KeyError: There is no such vote, or it was taken back before.
            ValueError: A line is not a vote.
            OSError: It cannot be written.
        """
        with self._locked():
            if vote_id not in {row["id"] for row in self._valid()}:
                raise KeyError(vote_id)
            _append(self._votes, [{"id": uuid4().hex, "time": _now(), "kind": "undo", "vote": vote_id}])
            self._derive()

    def read(self) -> list[Row]:
        """Returns the votes that were not taken back, oldest first.

        Raises:
            ValueError: A line is not a vote.
            OSError: The file cannot be read.
        """
        if not self._votes.exists():
            return []
        with self._locked():
            return self._valid()

    def _valid(self) -> list[Row]:
        lines = list(_read(self._votes))
        undone = {row["vote"] for row in lines if row["kind"] == "undo"}
        return [row for row in lines if row["kind"] == "vote" and row["id"] not in undone]

    def _derive(self) -> None:
        votes = self._valid()
        for path, rows in self._derived.items():
            data = b"".join(_line(row) for vote in votes for row in rows(vote))
            if (path.read_bytes() if path.exists() else b"") == data:
                continue
            partial = path.with_name(f".{path.name}.partial")
            partial.write_bytes(data)
            sync(partial)
            partial.replace(path)
            sync(self.folder)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keeps other threads and processes out. The system frees the lock of a process that ends."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # not shared between threads: each opens the file for itself
        with FileLock(self.folder / ".lock", timeout=_SECONDS_TO_LOCK):
            yield


def preferences(vote: Row) -> list[Row]:
    """Returns what a vote says of pairs: the answer that won, and an edited answer, which beats what it was made of.

    Ties are no preferences, and rows that :class:`~lightning_rlhf.data.PreferenceDataModule` would refuse (equal or
    empty answers) are left out.
    """
    texts = [answer["content"] for answer in vote["answers"]]
    pairs = []
    if (winner := WINNERS.get(vote.get("vote", ""))) is not None:
        pairs.append((texts[winner], texts[1 - winner]))
    if edited := vote.get("edited"):
        pairs.append((edited["content"], texts[edited["answer"]]))
    rows = [{"prompt": vote["messages"], "chosen": _turn(a), "rejected": _turn(b)} for a, b in pairs]
    return [row for row in rows if _is_preference(row)]


def unpaired(vote: Row) -> list[Row]:
    """Returns what a vote says of a single answer: a prompt, a completion and whether it is good."""
    label = THUMBS.get(vote.get("vote", ""))
    text = vote["answers"][0]["content"]
    if label is None or not text.strip():
        return []
    return [{"prompt": vote["messages"], "completion": _turn(text), "label": label}]


def _turn(text: str) -> list[dict[str, str]]:
    # a list, because a text that begins with "Human:" would be read as a transcript
    return [{"role": "assistant", "content": text}]


def _is_preference(row: Row) -> bool:
    try:
        to_preference(row, "pair")
    except FormatError:
        return False
    return True


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def _append(path: Path, rows: Iterable[Row]) -> None:
    """Adds lines, which are on the disk afterwards; if that fails, the file is as before."""
    data = b"".join(map(_line, rows))
    if not data:
        return
    is_new = not path.exists()
    with open(path, "ab", buffering=0) as file:
        end = _whole_lines(path)
        if end != file.tell():
            file.truncate(end)
        try:
            written = 0
            while written < len(data):
                written += file.write(data[written:])
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise
    if is_new:
        sync(path.parent)


def _whole_lines(path: Path) -> int:
    """Returns where the last whole line of a file ends. What a killed process left after it was never confirmed."""
    with open(path, "rb") as file:
        place = file.seek(0, os.SEEK_END)
        while place:
            start = max(0, place - 2**16)
            file.seek(start)
            found = file.read(place - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            place = start
    return 0


def _read(path: Path) -> Iterator[Row]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):  # a killed process left it; it was never confirmed
                return
            try:
                row = json.loads(line)
                row["kind"], row["id"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"{path}, line {number} is not a vote. Mend or remove the line.") from None
            yield row
