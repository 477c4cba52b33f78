"""Rows from files, hub data sets and objects in memory, each with the place where it was found.

Nothing is lost silently. A fault of one row goes through :class:`BadRows`, which raises or counts. A fault that makes
the rest of a file unreadable (a truncated gzip, a malformed JSON document, a bad header) always raises, because nobody
knows how many rows it costs.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import importlib.resources
import io
import json
import math
import os
import re
import shlex
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from numbers import Real
from pathlib import PurePath
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias, cast

from lightning_rlhf.data.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class WeightedSource:
    """One of several sources, and how often its rows are used.

    In configurations it is written ``{source: ..., weight: ..., format: ...}``.

    Attributes:
        source: Rows in memory, paths, globs, a hub id, or ``bundled``.
        weight: Passes over the source per epoch. With 2, each row comes twice; with 0.5, one epoch takes half of the
            rows and the next epoch the other half.
        format: Row format of this source, or the import path of your own. Default: the data module's.
    """

    source: Any
    weight: float = 1.0
    format: str | None = None

    def __post_init__(self) -> None:
        number = isinstance(self.weight, Real) and not isinstance(self.weight, bool)
        if not number or not 0 < self.weight < math.inf:
            raise ValueError(f"The weight of {self.name} is {self.weight!r}. Give a number above 0, or leave it out.")

    @property
    def name(self) -> str:
        """The source's name in messages."""
        source = self.source
        return str(source) if isinstance(source, (str, os.PathLike)) else f"a {type(source).__name__}"


#: Rows in memory, or paths, globs and hub ids; or a list of those with weights. The order matters to command lines:
#: jsonargparse takes the first member that fits, and it can turn anything into a string. It doesn't see weighted
#: sources, since it would read a file as a list of them (it gives them as mappings), and no Dataset, which no command
#: line can write.
if TYPE_CHECKING:
    Source: TypeAlias = (
        Sequence[Mapping[str, Any]]
        | Sequence[WeightedSource]
        | Sequence[str | os.PathLike[str]]
        | str
        | os.PathLike[str]
        | Dataset
    )
else:
    Source = Sequence[Mapping[str, Any]] | Sequence[str | os.PathLike[str]] | str | os.PathLike[str]

_HUB_ID = re.compile(r"(?P<path>\w[\w.-]*/\w[\w.-]*)(:(?P<config>[\w.+-]+))?")
_BETWEEN_ELEMENTS = re.compile(r"[\s,]*")
_BOM = codecs.BOM_UTF8
_HIGH = re.compile(rb"[\x80-\xff]+")
#: First bytes of files that are read as what they are, or refused, whatever their names say.
_GZIP, _PARQUET, _LFS = b"\x1f\x8b", b"PAR1", b"version https://git-lfs.github.com/spec/"
_PACKED = {b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "Zstandard"}


@dataclass(frozen=True)
class Row:
    """One row and where it was found.

    Attributes:
        value: The row's columns.
        where: The place, for messages: ``my.jsonl:17`` (line), ``my.csv:3`` (first line of the record),
            ``my.json[5] (line 40)``, ``x.parquet[12]``, ``list[4]``, ``org/set (train)[9]``. Lines count from 1,
            elements from 0.
        cells: Whether it is from a table of texts (CSV), where an empty cell may mean that there is no value.
    """

    value: dict[str, Any]
    where: str
    cells: bool = False

    @property
    def filled(self) -> dict[str, Any]:
        """The columns, without empty cells."""
        if not self.cells:
            return self.value
        return {name: cell for name, cell in self.value.items() if not (isinstance(cell, str) and not cell.strip())}


class _Cells(dict[str, Any]):
    """A record of a CSV file."""


class BadRowError(DataError):
    """A row that can't be used.

    Args:
        where: The row's place, as in :class:`Row`.
        kind: A short name of the fault, the same for all rows that have it.
        reason: What is wrong and what to do.
    """

    def __init__(self, where: str, kind: str, reason: str) -> None:
        super().__init__(where, kind, reason)  # all three, so that the error survives pickling between processes
        self.where = where
        self.kind = kind
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


OnBadRow = Literal["raise", "skip"]


class BadRows:
    """Decides what happens to rows that can't be used: they raise an error, or they are counted and reported.

    Args:
        policy: ``"raise"`` raises at the first bad row. ``"skip"`` leaves bad rows out and counts them.
        skip: How the user asks for the latter, for the message of an error; None where no row can be left out.

    Attributes:
        counts: Number of rows left out, by kind of fault.
        first: The first of each kind.
    """

    def __init__(self, policy: OnBadRow = "raise", skip: str | None = "set on_bad_row: skip") -> None:
        if policy not in ("raise", "skip"):
            raise ValueError(f"The policy for bad rows is {policy!r}. Choose 'raise' or 'skip'.")
        self.policy, self._skip = policy, skip
        self.counts: Counter[str] = Counter()
        self.first: dict[str, BadRowError] = {}

    @property
    def total(self) -> int:
        """Number of rows left out."""
        return self.counts.total()

    @property
    def reasons(self) -> str:
        """The reasons for leaving rows out, each with the number of rows and the first one."""
        return ", ".join(f"{n} x {kind} (first: {self.first[kind]})" for kind, n in self.counts.most_common())

    def add(self, where: str, kind: str, reason: str) -> None:
        """Note a bad row.

        Args:
            where: The row's place, as in :class:`Row`.
            kind: A short name of the fault; rows are counted by it.
            reason: What is wrong and what to do.

        Raises:
            BadRowError: If the policy is ``"raise"``.
        """
        if self.policy == "raise":
            advice = ""
            if self._skip is not None:
                skip = f"{self._skip} to leave such rows out and have them counted."
                bundled = where.startswith(bundled_path(""))
                advice = f" {skip[0].upper()}{skip[1:]}" if bundled else f" Correct the row, or {skip}"
            raise BadRowError(where, kind, f"{reason.rstrip('.')}.{advice}")
        self.counts[kind] += 1
        self.first.setdefault(kind, BadRowError(where, kind, reason))

    def add_empty(self, path: str) -> None:
        """Warn of a file without rows.

        Args:
            path: The file.
        """
        _warn(f"{path} has no row.")

    def summary(self) -> dict[str, list[Any]]:
        """For each kind of fault the number of rows, and the place and reason of the first, as JSON values."""
        return {kind: [count, self.first[kind].where, self.first[kind].reason] for kind, count in self.counts.items()}

    def merge(self, summary: Mapping[str, Sequence[Any]]) -> None:
        """Note rows that were counted before.

        Args:
            summary: What :meth:`summary` returned.

        Raises:
            BadRowError: There are any, and the policy is ``"raise"``.
        """
        for kind, (count, where, reason) in summary.items():
            self.add(where, kind, reason)
            self.counts[kind] += count - 1

    def report(self, total_rows: int, name: str) -> None:
        """Warn of all rows that were left out, if any, in one message.

        Args:
            total_rows: Number of rows, good and bad.
            name: The name of what was read.
        """
        if self.counts:
            verb = "was" if self.total == 1 else "were"
            _warn(f"{self.total} of {total_rows} rows of {name} {verb} skipped: {self.reasons}")


def _warn(text: str) -> None:
    """Warns on the first rank. Lightning loads here: it takes seconds, which most readers of rows don't need."""
    from lightning.pytorch.utilities import rank_zero_warn

    rank_zero_warn(text, stacklevel=5)


def bundled_path(pattern: str) -> str:
    """The path of a file that comes with the package, or a glob of several.

    Args:
        pattern: Name of the file, such as ``seeds.en.jsonl``, or a pattern.
    """
    return str(importlib.resources.files("lightning_rlhf.data") / "bundled" / pattern)


def bundled_seeds(lang: str) -> list[str]:
    """Files of the conversations that self-instruct starts from: bundled instructions and seeds, 200 per language.

    Args:
        lang: ``en`` or ``zh``.

    Returns:
        Paths, as :func:`read_rows` takes them.

    Raises:
        ValueError: No seeds of this language come with the package.
    """
    if lang not in ("en", "zh"):
        raise ValueError(f"The package has no seeds in the language {lang!r}. Choose en or zh, or give your own file.")
    return [bundled_path(f"{kind}.{lang}.jsonl") for kind in ("instructions", "seeds")]


def weighted_sources(source: Source) -> list[WeightedSource]:
    """Splits a source into its weighted sources.

    Args:
        source: What :func:`read_rows` takes, which gets weight 1; or a list of :class:`WeightedSource`, of mappings
            with ``source`` and optionally ``weight`` and ``format``, and of paths, which get weight 1.

    Raises:
        ValueError: A weight is not a positive number, or an entry of the list is none of these.
    """
    listed = isinstance(source, Sequence) and not isinstance(source, str)
    if not listed or not any(_is_weighted(item) for item in cast("Sequence[Any]", source)):
        return [WeightedSource(source)]
    made = []
    for item in cast("Sequence[Any]", source):
        if isinstance(item, WeightedSource):
            made.append(item)
        elif _is_weighted(item):
            made.append(WeightedSource(**item))
        elif isinstance(item, (str, os.PathLike)):
            made.append(WeightedSource(item))
        else:
            raise ValueError(
                f"Weighted sources contain a {type(item).__name__}. Write each as {{source: ..., weight: ...}}."
            )
    return made


def _is_weighted(item: object) -> bool:
    if isinstance(item, WeightedSource):
        return True
    return isinstance(item, Mapping) and "source" in item and item.keys() <= {"source", "weight", "format"}


def source_state(source: Source) -> list[Any] | None:
    """Paths, sizes and modification times of files: they tell whether files changed, without reading them.

    Returns:
        That state; None for rows in memory.
    """
    if isinstance(source, (str, os.PathLike)):
        source = [source]
    if _is_dataset(source) or not isinstance(source, Sequence):
        return None
    if not all(isinstance(item, (str, os.PathLike)) for item in source):
        return None
    state: list[Any] = []
    for name in [name for item in source for name in _expand(cast("str | os.PathLike[str]", item))]:
        files = [name] if _kind(name) else [file["filename"] for file in _load_hub(name, "train").cache_files]
        state += [[name, os.path.abspath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]
    return state


def read_rows(source: Source, bad: BadRows, split: str = "train") -> Iterator[Row]:
    """Read rows one after the other.

    Args:
        source: One of

            * a file: JSON Lines (``.jsonl``), JSON (``.json``: an array of objects, an object with one list of them,
              or JSON Lines), ``.csv`` or ``.tsv`` with a header, ``.parquet``, or ``.txt`` (each line is a row with the
              column ``text``); all but Parquet also gzipped, with or without ``.gz``. Text is UTF-8; blank lines are
              skipped. A CSV cell that is a JSON list of messages becomes that list; a row that is such a list becomes
              the column ``messages``. A file without rows causes a warning.
            * a glob (``data/**/*.jsonl``), whose files are read in sorted order
            * a directory: its files of these kinds, without subdirectories, in sorted order
            * the id of a hub data set, ``org/name`` or ``org/name:config``. A path that exists, a pattern, and a name
              with one of the suffixes above always mean files.
            * a list of these
            * a :class:`datasets.Dataset` or a list of dicts
        bad: Gets the rows that can't be read or aren't objects.
        split: The split of a hub data set.

    Yields:
        The rows, in order.

    Raises:
        FileNotFoundError: A file or hub data set isn't found, or a pattern or directory has no file.
        BadRowError: A row is bad and the policy of ``bad`` is ``"raise"``, or the rest of a file can't be read.
        TypeError: ``source`` is none of the above.
        ValueError: A file is of an unknown kind, or a hub data set lacks the split or configuration.
    """
    for where, value in _values(source, bad, split):
        if isinstance(value, Mapping):
            yield Row(dict(value), where, isinstance(value, _Cells))
        elif isinstance(value, (list, tuple)) and is_chat(value):
            yield Row({"messages": value}, where)
        else:
            reason = f"the row is a {type(value).__name__}, not an object. Write it as {{column: value, ...}}"
            bad.add(where, "not an object", reason)


def _values(source: Source, bad: BadRows, split: str) -> Iterator[tuple[str, Any]]:
    """Yield each row's place and value, of whatever type."""
    if isinstance(source, (str, os.PathLike)):
        source = [source]
    if _is_dataset(source):
        dataset = cast("Dataset", source)
        yield from _read_dataset(dataset, f"Dataset ({dataset.split})" if dataset.split else "Dataset")
    elif not isinstance(source, Sequence):
        raise TypeError(
            f"Can't read rows from a {type(source).__name__}. Give a path, a pattern, a hub id, a list of these, a "
            "list of dicts, or one split of a data set (data['train'])."
        )
    elif all(isinstance(item, (str, os.PathLike)) for item in source):
        # Look up everything before reading anything: a misspelled last file shows at once.
        for name in [name for item in source for name in _expand(cast("str | os.PathLike[str]", item))]:
            kind = _kind(name)
            yield from _read_file(name, kind, bad) if kind else _read_hub(name, split)
    else:
        yield from ((f"list[{i}]", item) for i, item in enumerate(source))


def _is_dataset(source: object) -> bool:
    datasets = sys.modules.get("datasets")  # if it isn't imported, nobody has made one
    return datasets is not None and isinstance(source, datasets.Dataset)


def _kind(path: str) -> str | None:
    """The suffix that says how to read the file, or None."""
    lower = path.lower()
    suffix = PurePath(lower.removesuffix(".gz")).suffix
    return suffix if suffix in _READERS and not lower.endswith(".parquet.gz") else None


def _expand(item: str | os.PathLike[str]) -> list[str]:
    """The files that a path, pattern or directory stands for; a hub id as it is."""
    path = os.path.expanduser(os.fspath(item))
    kinds = " ".join(_READERS)
    if os.path.isdir(path):
        # no links in a circle, of which DirEntry.is_file is an error
        entries = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
        files = sorted(entry.path for entry in entries if os.path.isfile(entry.path))
        files = [file for file in files if _kind(file)]
        if not files:
            raise FileNotFoundError(f"{path}: the directory has no file of a known kind ({kinds}).")
        return files
    if os.path.exists(path):
        files = [path]
    elif glob.has_magic(path):
        files = sorted(file for file in glob.glob(path, recursive=True) if not os.path.isdir(file))
        if not files:
            raise FileNotFoundError(f"{path}: no file matches this pattern (working directory: {os.getcwd()}).")
    elif isinstance(item, str) and _HUB_ID.fullmatch(path) and not _kind(path):
        return [path]
    else:
        raise FileNotFoundError(
            f"{path}: no such file or directory (working directory: {os.getcwd()}). Correct the path; a data set of "
            "the hub is written org/name" + (", and a text is a row: {'text': ...}." if re.search(r"\s", path) else ".")
        )
    for file in files:
        if not _kind(file):
            raise ValueError(f"{file}: unknown kind of file. Known kinds are {kinds}, all but .parquet also with .gz.")
        if not os.path.isfile(file):
            raise ValueError(
                f"{file}: this is a pipe or a device, and rows are read more than once. Write them to a file."
            )
    return files


def _read_file(path: str, kind: str, bad: BadRows) -> Iterator[tuple[str, Any]]:
    before, row = bad.total, None
    if os.path.getsize(path):
        for row in _READERS[kind](path, bad):
            yield row
    if row is None and bad.total == before:
        bad.add_empty(path)


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    """Opens a text file, gzipped or not.

    Raises:
        BadRowError: By its first bytes, it is of another kind.
    """
    with open(path, "rb") as file:
        zipped = file.read(2) == _GZIP
    try:
        with gzip.open(path) if zipped else open(path, "rb") as file:
            _check_kind(path, cast("io.BufferedReader", file).peek(len(_LFS)))
            yield cast("IO[bytes]", file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        reason = f"the gzip data is damaged or cut short ({error}). Copy or compress the file again."
        raise BadRowError(path, "damaged gzip", reason) from error


def _check_kind(path: str, head: bytes) -> None:
    """Refuses a file that, by its first bytes, isn't one of rows."""
    if head.startswith(_LFS):
        reason = "this is a Git LFS pointer, not the file itself. Fetch the file with: git lfs pull"
        raise BadRowError(path, "Git LFS pointer", reason)
    if head.startswith(_PARQUET):
        raise BadRowError(path, "other kind of file", "the file is Parquet. Give its name the suffix .parquet")
    for start, name in _PACKED.items():
        if head.startswith(start):
            reason = f"the file is {name} data. Unpack it, or compress it with gzip"
            raise BadRowError(path, "other kind of file", reason)
    if (wide := _wide(head)) is not None:
        raise BadRowError(f"{path}:1", "invalid UTF-8", f"the file is {wide}, not UTF-8. {_convert(path, wide)}")


def _lines(path: str) -> Iterator[tuple[int, str, str | None]]:
    """Yield each line's number, its text with its line ending, and the fault of its encoding or None."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(_BOM)  # inside a file if several were joined
            try:
                yield number, line.decode(), None
            except UnicodeDecodeError as error:
                yield number, line.decode(errors="replace"), not_utf8(line, error.start, path)


def not_utf8(data: bytes, at: int, path: str) -> str:
    """Says where a file is not UTF-8, what encoding it seems to have, and which command converts it.

    Args:
        data: A line, or a whole file.
        at: Where the first wrong byte is.
        path: The file.
    """
    column = at - data.rfind(b"\n", 0, at)
    end = data.find(b"\n", at)
    found = _encoding(data[at - column + 1 : None if end < 0 else end])
    looks = f"the line looks like {found}" if found else "the line is damaged"
    return f"byte {column} of the line (0x{data[at]:02x}) is not UTF-8; {looks}. {_convert(path, found)}"


def _convert(path: str, encoding: str | None) -> str:
    """Says how to convert a file of another encoding."""
    if encoding is None:
        return "Save the file as UTF-8"
    unzip, start = (f"gunzip -c {shlex.quote(path)} | ", "") if path.endswith(".gz") else ("", f" {shlex.quote(path)}")
    return f"Convert it: {unzip}iconv -f {encoding} -t UTF-8{start} > NEW{PurePath(path.removesuffix('.gz')).suffix}"


def _wide(head: bytes) -> str | None:
    """The encoding of a file by its first bytes, if it is one with several bytes per letter."""
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if head[:3] == b"\0\0\0" or head[1:4] == b"\0\0\0":
        return _if_text("UTF-32BE" if head[0] == 0 else "UTF-32LE", head)
    if b"\0" in head[:2]:
        return _if_text("UTF-16BE" if head[0] == 0 else "UTF-16LE", head)
    ends = head.find(b"\0\n"), head.find(b"\n\0")  # Chinese letters have no zeros, but line ends do
    if max(ends) >= 0:
        return "UTF-16BE" if ends[0] >= 0 and ends[0] % 2 == 0 else "UTF-16LE"
    return None


def _if_text(encoding: str, head: bytes) -> str | None:
    """The encoding, unless what it reads is no text: single zeros are damage."""
    text = head[: len(head) // 4 * 4].decode(encoding, errors="replace")
    return encoding if text and all(letter.isprintable() or letter.isspace() for letter in text) else None


def _encoding(line: bytes) -> str | None:
    """Guesses the encoding of a line that isn't UTF-8; None for UTF-8 with damaged bytes, or if it can't be told."""
    if b"\0" in line:
        return "UTF-16"
    high = sum(byte > 127 for byte in line)
    whole = sum(len(letter.encode()) for letter in line.decode(errors="ignore") if ord(letter) > 127)
    if whole > high / 2:
        return None
    pairs = sum(len(run) for run in _HIGH.findall(line) if len(run) > 1)  # Chinese letters have two bytes above 127
    for name, fits in (("GB18030", pairs > high * 0.8), ("WINDOWS-1252", pairs <= high / 2)):
        with suppress(UnicodeDecodeError):
            if fits and line.decode(name):
                return name
    return None


def _read_txt(path: str, bad: BadRows) -> Iterator[tuple[str, Any]]:
    for number, line, fault in _lines(path):
        if fault:
            bad.add(f"{path}:{number}", "invalid UTF-8", fault)
        elif line.strip():
            yield f"{path}:{number}", {"text": line.rstrip("\r\n")}


def _read_jsonl(path: str, bad: BadRows) -> Iterator[tuple[str, Any]]:
    decoder = _Decoder()
    for where, row in _read_txt(path, bad):
        decoder.twice.clear()
        try:
            value = decoder.decode(row["text"])
        except (ValueError, RecursionError) as error:
            bad.add(where, "malformed JSON", f"malformed JSON: {_json_fault(error)}. Each line is one JSON object")
        else:
            yield from decoder.checked(where, value, bad)


class _Decoder(json.JSONDecoder):
    """Notes keys that come twice in an object; Python's own decoder would keep the last without a word."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=self._object)
        self.twice: list[str] = []

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            self.twice += [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]
        return made

    def checked(self, where: str, value: Any, bad: BadRows) -> Iterator[tuple[str, Any]]:
        """The row, unless a key came twice in it."""
        if self.twice:
            bad.add(where, "repeated key", f"the key {self.twice[0]!r} comes twice in one object. Remove one of them")
        else:
            yield where, value


def _json_fault(error: ValueError | RecursionError) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg.removesuffix(' at')} at column {error.colno}"


def _read_json(path: str, bad: BadRows) -> Iterator[tuple[str, Any]]:
    if _holds_json_lines(path):
        yield from _read_jsonl(path, bad)
        return
    with _open(path) as file:
        data = file.read().removeprefix(_BOM)
    try:
        text = data.decode()
        decoder = _Decoder()
        document = decoder.decode(text)
    except UnicodeDecodeError as error:
        where = f"{path}:{data[: error.start].count(10) + 1}"
        raise BadRowError(where, "invalid UTF-8", f"{not_utf8(data, error.start, path)}") from error
    except (ValueError, RecursionError) as error:
        where = f"{path}:{error.lineno}" if isinstance(error, json.JSONDecodeError) else path
        reason = f"malformed JSON: {_json_fault(error)}. Nothing of the file was read; correct it."
        raise BadRowError(where, "malformed JSON", reason) from error
    # a list of turns is one conversation; flat messages of trees have their text in a column of another name
    single = isinstance(document, list) and is_chat(document) and all({"content", "value"} & t.keys() for t in document)
    if isinstance(document, list) and not single:
        for i, (line, value) in enumerate(_elements(text, len(document), decoder)):
            yield from decoder.checked(f"{path}[{i}] (line {line})", value, bad)
    elif (rows := _only_list(document)) is not None and not decoder.twice:
        yield from ((f"{path}[{i}]", value) for i, value in enumerate(rows))
    else:
        yield from decoder.checked(f"{path}:1", document, bad)


def _holds_json_lines(path: str) -> bool:
    """Returns whether the first line is an object of its own and more lines follow, which no JSON document has."""
    filled = (line for _, line, _ in _lines(path) if line.strip())
    first = next(filled, "")
    if not first.lstrip().startswith("{"):  # avoids parsing a long array on one line
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return next(filled, None) is not None


def _elements(text: str, count: int, decoder: _Decoder) -> Iterator[tuple[int, Any]]:
    """Yield the line and value of each element of a valid JSON array."""
    line, seen, at = 1, 0, text.index("[") + 1
    for _ in range(count):
        at = cast("re.Match[str]", _BETWEEN_ELEMENTS.match(text, at)).end()
        line, seen = line + text.count("\n", seen, at), at
        decoder.twice.clear()
        value, at = decoder.raw_decode(text, at)
        yield line, value


def _only_list(document: Any) -> list[Any] | None:
    """The rows of ``{"data": [...]}``: the one list of objects, unless it is the turns of a single conversation."""
    lists = [value for value in document.values() if isinstance(value, list)] if isinstance(document, dict) else []
    one = lists[0] if len(lists) == 1 else []
    rows = bool(one) and (is_chat(one[0]) or (isinstance(one[0], dict) and not {"role", "from"} & one[0].keys()))
    return one if rows else None


def _read_csv(path: str, bad: BadRows, delimiter: str = ",") -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(max(csv.field_size_limit(), 2**30))  # the default of 128 KiB is too small for long texts
    broken: list[tuple[int, str]] = []  # lines that aren't UTF-8 among those of the record being read

    def lines() -> Iterator[str]:
        for number, line, fault in _lines(path):
            if fault:
                broken.append((number, fault))
            yield line

    # strict: otherwise a stray quote swallows the rest of the file into one field
    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    decoder = _Decoder()
    while True:
        start = reader.line_num + 1
        fault: tuple[int, str, str] | None = None
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            record = []
            span = f"in lines {start} to {reader.line_num}"
            fault = start, "malformed CSV", f"malformed CSV {span}: {error}. Check the quotes"
        if broken:
            fault = broken[0][0], "invalid UTF-8", broken[0][1]
            broken.clear()
        if header is None:
            if fault:
                raise BadRowError(f"{path}:{fault[0]}", fault[1], f"{fault[2]}. It is part of the header.")
            _check_columns(path, record)
            header = record or None
        elif fault:
            bad.add(f"{path}:{fault[0]}", fault[1], fault[2])
        elif record and len(record) != len(header):
            sizes = f"the record has {len(record)} fields, the header {len(header)}"
            bad.add(f"{path}:{start}", "wrong number of fields", f"{sizes}. Quote fields that hold {delimiter!r}")
        elif record:
            decoder.twice.clear()
            cells = _Cells(zip(header, (_cell(text, decoder) for text in record), strict=True))
            yield from decoder.checked(f"{path}:{start}", cells, bad)


def _cell(text: str, decoder: _Decoder) -> Any:
    """A cell as messages if it is a JSON list of messages, or one message; otherwise as text, even if it is JSON."""
    if not text.lstrip().startswith(("[", "{")):
        return text
    noted = len(decoder.twice)
    value = read_json(text, decoder)
    if is_chat(value if isinstance(value, list) else [value]):
        return value
    del decoder.twice[noted:]
    return text


def is_chat(value: Any) -> bool:
    """Returns whether these are turns: objects that each have a role."""
    return bool(value) and all(isinstance(turn, Mapping) and {"role", "from"} & turn.keys() for turn in value)


def read_json(text: str, decoder: json.JSONDecoder | None = None) -> Any:
    """The value of a JSON text; None if it isn't JSON."""
    try:
        return (decoder or json.JSONDecoder()).decode(text)
    except (ValueError, RecursionError):
        return None


def _check_columns(path: str, columns: Sequence[str]) -> None:
    twice = [name for name, n in Counter(columns).items() if n > 1]
    if twice:
        raise BadRowError(path, "repeated column", f"several columns have the name {twice[0]!r}. Rename all but one.")


def _read_parquet(path: str, bad: BadRows) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet

    index = 0
    with open(path, "rb") as file:
        head = file.read(len(_LFS))
    if not head.startswith(_PARQUET):
        _check_kind(path, head)
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            _check_columns(path, names)
            for batch in table.iter_batches(batch_size=1024):
                for i in range(batch.num_rows):
                    where = f"{path}[{index}]"
                    index += 1
                    try:
                        value = {name: column[i].as_py() for name, column in zip(names, batch.columns, strict=True)}
                    except UnicodeDecodeError as error:
                        bad.add(where, "invalid UTF-8", f"{error}. Write the file with UTF-8 text")
                    except (ValueError, OverflowError, ImportError) as error:  # such as times that Python can't tell
                        reason = f"a value can't be read: {error}. Write it as text or as a number"
                        bad.add(where, "unreadable value", reason)
                    else:
                        yield where, value
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # names of columns are no text
        reason = f"can't be read as Parquet after {index} rows ({error}). Write the file again."
        raise BadRowError(path, "damaged Parquet", reason) from error


def _read_hub(name: str, split: str) -> Iterator[tuple[str, Any]]:
    return _read_dataset(_load_hub(name, split), f"{name} ({split})")


def _load_hub(name: str, split: str) -> Dataset:
    import datasets

    path, _, config = name.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split=split)
    except OSError as error:
        raise FileNotFoundError(
            f"{name}: no such file or directory (working directory: {os.getcwd()}), and as a data set of the hub it "
            f"can't be loaded: {error}"
        ) from error
    except ValueError as error:
        raise ValueError(
            f"{name}: the split {split!r} of this data set can't be loaded: {error} "
            "A configuration is chosen by org/name:config."
        ) from error


def _read_dataset(dataset: Dataset, name: str) -> Iterator[tuple[str, Any]]:
    # without a format: a data set may be set to give tensors
    yield from ((f"{name}[{i}]", value) for i, value in enumerate(dataset.with_format(None)))


_READERS: dict[str, Callable[[str, BadRows], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".parquet": _read_parquet,
    ".txt": _read_txt,
}
