"""The cache of tokenized rows: each is tokenized once, kept in Arrow files by content, and read memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.errors import DataError
from lightning_rlhf.data.formats import UnfitRowError
from lightning_rlhf.data.packed import Size
from lightning_rlhf.data.sources import BadRows, OnBadRow

#: Raise it when the same rows would be read, tokenized or stored differently.
_CACHE_VERSION = 9
#: Rows that a process tokenizes at a time, and how many times as many are written at once.
_ROWS, _BLOCK = 256, 64
#: Columns that every file of tokens has besides those of its data module.
_COLUMNS = {"where": str, "cut": bool}

Item = TypeVar("Item")


class SizedRows(Protocol):
    """Index to tree, with the trees' sizes as numbers, and a hash of their tokens."""

    sizes: NDArray[np.float64]
    key: str

    def __call__(self, index: int) -> Any: ...  # noqa: D102


class TokenRows:
    """Tokenized rows, memory-mapped: index to tree.

    Args:
        stores: The folder of each source's rows.
        tree: Makes a row's tree, or whatever else batches are made of.
        sizes: (rows, ``len(Size.NAMES)``) the rows' :class:`~lightning_rlhf.data.packed.Size` as numbers.
        sources: Number of rows and weight of each source, in order.
        blocks: For each source, the number of rows of every batch in its Arrow file.
        content: A hash of the rows and their order.

    Attributes:
        key: A hash of the rows' tokens: of ``content``, the tokenizer and how rows become tokens.
    """

    def __init__(
        self,
        stores: Sequence[Path],
        tree: Callable[[Mapping[str, Any]], Any],
        sizes: NDArray[np.float64],
        sources: list[tuple[int, float]],
        blocks: Sequence[Sequence[int]],
        content: str,
    ) -> None:
        self.tree, self.sizes, self.sources, self.content = tree, sizes, sources, content
        self.key = hashlib.sha256("\0".join([content, *(path.name for path in stores)]).encode()).hexdigest()
        self._files = [str(path / "tokens.arrow") for path in stores]
        self._blocks = [(file, block) for file, counts in enumerate(blocks) for block in range(len(counts))]
        self._ends = list(accumulate(chain.from_iterable(blocks)))
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __call__(self, index: int) -> Any:
        """The row's tree."""
        return self.tree(self.row(index))

    def size(self, index: int) -> Size:
        """The row's size."""
        return Size.of_numbers(self.sizes[index].tolist())

    def column(self, name: str) -> list[Any]:
        """One column of all rows."""
        return [value for n in range(len(self._blocks)) for value in self._block(n).column(name).to_pylist()]

    def row(self, index: int) -> dict[str, Any]:
        """The row's columns."""
        number = bisect_right(self._ends, index)
        batch = self._block(number)
        [row] = batch.slice(index - self._ends[number] + batch.num_rows, 1).to_pylist()
        return dict(row)

    def _block(self, number: int) -> Any:
        import pyarrow as pa

        file, block = self._blocks[number]
        if file not in self._readers:
            self._readers[file] = pa.ipc.open_file(pa.memory_map(self._files[file]))
        return self._readers[file].get_batch(block)  # nothing is copied

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sizes": None, "_readers": {}}  # workers open files themselves, and need no sizes


class Record(NamedTuple):
    """A row before it is tokenized.

    Attributes:
        where: The row's place.
        text: All that its tokens depend on, as JSON.
        unread: List of the keys that nothing reads, as JSON.
    """

    where: str
    text: str
    unread: str


class _Encoded(NamedTuple):
    """Some rows after tokenizing: the good ones as an Arrow batch, the refused ones, and what to note about them."""

    good: Any
    sizes: NDArray[np.float64]
    refused: list[tuple[str, str, str]]
    facts: list[Any]
    cut: int
    extra_stops: int
    unread: Counter[str]
    content: str


@dataclass(frozen=True)
class RowEncoder:
    """Tokenizes records; it travels to worker processes, so its functions are those of a module.

    Attributes:
        encode: Makes a row's columns from the JSON value of its text; raises ``UnfitRowError`` for a bad row.
        columns: Names and types of those that are stored: a type, or a list of one.
        tree: Makes a row's tree, which has a ``size``.
        facts: What to note about a row, once for all rows that share it.
    """

    encode: Callable[[Any], dict[str, Any]]
    columns: Mapping[str, Any]
    tree: Callable[[Mapping[str, Any]], Any]
    facts: Callable[[Mapping[str, Any]], Iterable[Any]]

    def __call__(self, records: Sequence[Record]) -> _Encoded:
        """Tokenizes some rows."""
        import pyarrow as pa

        good: list[dict[str, Any]] = []
        refused = []
        unread: Counter[str] = Counter()
        content = hashlib.sha256()
        for where, text, keys in records:
            try:
                row = self.encode(json.loads(text))
            except UnfitRowError as error:
                refused.append((where, error.kind, error.reason))
            else:
                good.append({"cut": False, **row, "where": where})
                unread.update({*json.loads(keys), *row.get("unread", ())})
                content.update(text.encode() + b"\0")
        return _Encoded(
            good=pa.RecordBatch.from_pylist(good, self.schema),
            sizes=np.array([self.tree(row).size.numbers for row in good]).reshape(-1, len(Size.NAMES)),
            refused=refused,
            facts=list(distinct(fact for row in good for fact in self.facts(row))),
            cut=sum(row["cut"] for row in good),
            extra_stops=sum(row.get("extra_stops", False) for row in good),
            unread=unread,
            content=content.hexdigest(),
        )

    @property
    def schema(self) -> Any:
        """Arrow's schema of the columns."""
        import pyarrow as pa

        def arrow(kind: Any) -> Any:
            if isinstance(kind, list):
                return pa.list_(arrow(kind[0]))
            return {str: pa.string(), int: pa.int32(), float: pa.float64(), bool: pa.bool_()}[kind]

        return pa.schema([(name, arrow(kind)) for name, kind in {**_COLUMNS, **self.columns}.items()])


class TokenCache:
    """Folders of tokenized rows, named by a hash of all that decides the tokens.

    Args:
        folder: Where they are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(
        self,
        key: str,
        records: Iterable[Record],
        encoder: RowEncoder,
        num_proc: int | None,
        on_bad_row: OnBadRow,
        notes: Callable[[], dict[str, Any]],
    ) -> None:
        """Tokenizes rows into the folder ``key``, whole or not at all, a block of them in memory at a time.

        Args:
            key: From :func:`cache_key`.
            records: The rows.
            encoder: Tokenizes them.
            num_proc: Number of processes; None for this one alone.
            on_bad_row: ``raise`` or ``skip``.
            notes: Called at the end: what to note besides.

        Raises:
            DataError: The folder can't be written, or a row is bad and the policy is ``raise``.
        """
        with self._writable():
            self.folder.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            found = self._write(temporary, records, encoder, num_proc, on_bad_row) | notes()
            with self._writable():
                (temporary / "notes.json").write_text(json.dumps(found), encoding="utf-8")
                _move(temporary, self.folder / key)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _write(
        self,
        folder: Path,
        records: Iterable[Record],
        encoder: RowEncoder,
        num_proc: int | None,
        on_bad_row: OnBadRow,
    ) -> dict[str, Any]:
        import pyarrow as pa

        bad = BadRows(on_bad_row)
        cut = extra_stops = 0
        blocks: list[int] = []
        facts: dict[Any, None] = {}
        unread: Counter[str] = Counter()
        content = hashlib.sha256()
        parts: Iterator[_Encoded] = map_in_order(encoder, batched(records, _ROWS), num_proc)
        with (
            pa.OSFile(str(folder / "tokens.arrow"), "wb") as sink,
            pa.ipc.new_file(sink, encoder.schema) as writer,
            open(folder / "sizes", "wb") as sizes,
        ):
            for block in batched(parts, _BLOCK):
                for part in block:
                    for where, kind, reason in part.refused:
                        bad.add(where, kind, reason)
                    cut += part.cut
                    extra_stops += part.extra_stops
                    unread.update(part.unread)
                    facts.update(dict.fromkeys(part.facts))
                    content.update(part.content.encode())
                table = pa.Table.from_batches([part.good for part in block], encoder.schema).combine_chunks()
                if len(table):
                    blocks.append(len(table))
                    with self._writable():
                        writer.write_table(table)  # as one batch
                        sizes.write(np.concatenate([part.sizes for part in block]).tobytes())
        return {
            "rows": sum(blocks),
            "blocks": blocks,
            "cut": cut,
            "extra_stops": extra_stops,
            "unread": unread,
            "refused": bad.summary(),
            "facts": list(facts),
            "content": content.hexdigest(),
        }

    def sizes(self, stores: Sequence[Path]) -> NDArray[np.float64]:
        """The sizes of the rows in several folders, as one array, memory-mapped."""
        files = [path / "sizes" for path in stores]
        path = files[0]
        if len(files) > 1:
            name = hashlib.sha256("\0".join(map(str, stores)).encode()).hexdigest()[:40]
            path = self.folder / f"{name}.sizes"
            if not path.exists():
                with self._writable(), tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as joined:
                    for file in files:
                        with open(file, "rb") as part:
                            shutil.copyfileobj(part, joined)
                os.replace(joined.name, path)
        if not path.stat().st_size:  # an empty file can't be mapped
            return np.empty((0, len(Size.NAMES)))
        return np.memmap(path, dtype=np.float64, mode="r").reshape(-1, len(Size.NAMES))

    @contextmanager
    def _writable(self) -> Iterator[None]:
        """Says what to do where the cache can't be written."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"The token cache {self.folder} can't be written: {error.strerror or error}. Set data.cache_dir, or "
                "LIGHTNING_RLHF_CACHE in the environment, to a folder that can."
            ) from error


def cache_key(tokenizer: PreTrainedTokenizerBase, kind: str, arguments: Mapping[str, Any], texts: Iterable[str]) -> str:
    """A hash of all that decides the tokens.

    Args:
        tokenizer: With its chat template.
        kind: What encodes the rows.
        arguments: Its arguments, as JSON holds them.
        texts: The rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    specials = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True)
    options = json.dumps([_CACHE_VERSION, kind, arguments])
    digest = hashlib.sha256()
    for text in chain((options, words, specials, str(tokenizer.chat_template)), texts):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()[:40]


def _move(folder: Path, path: Path) -> None:
    try:
        os.replace(folder, path)
    except OSError:  # another process was first; its rows are the same
        if not path.exists():
            raise


def batched(items: Iterable[Item], n: int) -> Iterator[list[Item]]:
    """Lists of ``n`` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, n)):
        yield batch


def map_in_order(work: Callable[[Any], Any], items: Iterable[Any], num_proc: int | None) -> Iterator[Any]:
    """``map`` in several processes, in order, which takes from ``items`` no more than it can start with."""
    if not num_proc or num_proc == 1:
        yield from map(work, items)
        return
    with ProcessPoolExecutor(num_proc, initializer=_set_work, initargs=(work,)) as pool:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(pool.submit(_do_work, item))
            if len(waiting) > 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_work: Callable[[Any], Any]


def _set_work(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work  # the tokenizer travels to each process once


def _do_work(item: Any) -> Any:
    return _work(item)


def distinct(items: Iterable[Any]) -> Iterable[Any]:
    """Each item once, in the order of its first appearance; lists, as JSON has them, become tuples."""
    return dict.fromkeys(tuple(item) if isinstance(item, list) else item for item in items)
