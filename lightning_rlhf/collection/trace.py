"""The folder of a collection: what it has done so far, so that it goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_rlhf.utils.filesystem import atomic_file

_VERSION = 1


class TraceError(ValueError):
    """A folder that holds another collection, or something else."""


class Trace:
    """Numbered steps of a collection, each written once, whole.

    Args:
        folder: The folder; it is made.
        settings: Settings that decide what the steps hold, as JSON values. A folder with other settings is refused.

    Raises:
        TraceError: The folder is of other settings, or holds other files.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._settings = json.loads(json.dumps(settings))
        self._file = folder / "settings.json"
        if not self._file.exists():
            if any(folder.glob("step-*.json")):
                raise TraceError(f"{folder} has steps but no {self._file.name}. Choose another --out.")
            write_atomically(self._file, [_json({"version": _VERSION, "settings": self._settings})])
            return
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
            version, before = found["version"], found["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise TraceError(f"{self._file} can't be read ({error}). Choose another --out.") from error
        if version != _VERSION:
            raise TraceError(f"{self._file} has version {version}, and this program reads {_VERSION}.")
        if changed := sorted(
            name for name in {*before, *self._settings} if before.get(name) != self._settings.get(name)
        ):
            raise TraceError(
                f"{folder.parent} was begun with other settings: {', '.join(changed)}. Restore them, choose another "
                f"--out, or delete {folder} to begin anew with the replies that are in the ledger."
            )

    def read(self, number: int) -> Any:
        """Returns the result of a step; None if the step was not finished.

        Raises:
            TraceError: The file is damaged.
        """
        path = self._path(number)
        if not self.has(number):
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["sha256"] == _digest(found["step"]):
                return found["step"]
            problem = "its content was changed"
        except (ValueError, KeyError, TypeError) as error:
            problem = str(error)
        raise TraceError(f"{path} is damaged ({problem}). Delete it and all later steps; the ledger has their replies.")

    def has(self, number: int) -> bool:
        """Returns whether a step was finished."""
        return self._path(number).exists()

    def write(self, number: int, step: Any) -> Any:
        """Writes a step, whole or not at all.

        Returns:
            What :meth:`read` returns for it from now on.
        """
        write_atomically(self._path(number), [_json({"sha256": _digest(step), "step": step})])
        return self.read(number)

    def _path(self, number: int) -> Path:
        return self.folder / f"step-{number:05d}.json"


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON Lines, whole or not at all."""
    write_atomically(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_atomically(path: Path, parts: Iterable[str]) -> None:
    """Writes a text, whole or not at all."""
    with atomic_file(path) as file:
        file.writelines(parts)


def _json(value: Any) -> str:
    return json.dumps(value) + "\n"


def _digest(value: Any) -> str:
    return hashlib.sha256(_json(value).encode()).hexdigest()
