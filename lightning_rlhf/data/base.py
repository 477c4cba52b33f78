"""The base of the data modules: sources, bad rows, the train/validation split, tokenizing, planned batches."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data.errors import DataError
from lightning_rlhf.data.formats import FormatError, import_format, parse_row
from lightning_rlhf.data.oasst import OASST, TreeRows, expand_trees
from lightning_rlhf.data.planner import PlannedLoader, Planner
from lightning_rlhf.data.preference_formats import read_name
from lightning_rlhf.data.sources import (
    BadRows,
    OnBadRow,
    Row,
    Source,
    bundled_path,
    read_rows,
    source_state,
    weighted_sources,
)
from lightning_rlhf.data.token_cache import Record, RowEncoder, SizedRows, TokenCache, TokenRows, cache_key, distinct
from lightning_rlhf.moved import refuse_moved
from lightning_rlhf.protocols import HasContext, HasTokenizer, SamplePrompt, stop_tokens_of

BUNDLED = "bundled"
Item = TypeVar("Item")


class TreeDataModule(L.LightningDataModule, ABC, Generic[Item]):
    """Rows of any source, checked, tokenized once and dealt into packed batches.

    A subclass says what a row is (:meth:`parse`, :meth:`first_user_turn`, :meth:`dump`), what its tokens are
    (:meth:`encoder`) and how they make a tree (``tree``).

    Args:
        train: Training rows: files or globs (JSON, JSONL, CSV, Parquet, text; gzipped too), a hub data set id, a
            ``datasets.Dataset``, a list of dicts, or ``bundled``: rows in Chinese and English that come with the
            package. Several sources are a list of ``{source: ..., weight: ..., format: ...}``.
        val: Validation rows. Default: ``val_fraction`` of the training rows.
        test: Rows for ``trainer.test``. Default: the validation rows.
        predict: Rows for ``trainer.predict``. Default: the validation rows.
        format: Name of the row format, or the import path of your own. ``auto`` finds out for each row.
        system: System prompt for rows that have none.
        max_length: Maximum number of tokens per sequence. Longer rows are bad rows. Default: the model's context.
        on_bad_row: ``raise`` stops at the first bad row and names file, line and reason. ``skip`` leaves bad rows out
            and reports their number by reason.
        batch_size: Sequences per optimizer step, over all ranks and micro-batches.
        max_tokens: Maximum number of tokens per micro-batch. A larger value needs more memory; a step that exceeds it
            is an error that names the accumulation that fits. Default: no limit.
        eval_batch_size: Sequences per evaluation batch on each rank. A larger value needs more memory.
        val_fraction: Share of the training rows to hold out for validation. Rows with the same first user turn are
            either all held out or all trained on.
        seed: Seed of the held-out share and of the shuffle.
        num_proc: Number of processes that tokenize rows. Default: this process alone.
        num_workers: Number of processes that pack batches ahead of time. 0 packs them in this process.
        cache_dir: Folder in which tokenized rows are kept. Default: the environment variable
            ``LIGHTNING_RLHF_CACHE``, or ``~/.cache/lightning_rlhf``.
        tokenizer: Default: the module's, with its chat template.
        streaming_window: For data sets larger than memory: number of rows to shuffle and plan at a time. A larger
            value mixes better and needs more memory; 65536 is a good start. Rows are then read one by one into the
            cache, which is found again by the files' names, sizes and times. Default: all rows are held in memory.

    Attributes:
        bad_rows: For each part, the rows that were left out in reading and tokenizing.
        unread: For each part, the keys that no setting reads, each with the number of rows that have it.
        extra_stops: For each part, the number of rows whose answers had a stop token of their own, which was left out.
    """

    #: Files of the package that ``bundled`` stands for.
    bundled: str
    #: Types of the columns that ``tree`` reads: a type, or a list of one.
    columns: ClassVar[Mapping[str, Any]]
    #: Makes a tree of a tokenized row; a function of a module, since worker processes get it.
    tree: Callable[..., Any]
    #: The rows that a tree of messages gives.
    tree_rows: TreeRows
    #: What to note about a tokenized row, once for all rows that share it: a function of a module.
    facts: Callable[[Mapping[str, Any]], Iterable[Any]] = staticmethod(lambda row: ())
    #: A word for messages that tells this data module from the Trainer's own, such as ``ptx``.
    name = ""

    def __new__(cls, *args: Any, **given: Any) -> Any:
        """Refuses former names of arguments with their present place."""
        refuse_moved(cls, given)
        return super().__new__(cls)

    def __init__(
        self,
        train: Source,
        val: Source | None,
        test: Source | None,
        predict: Source | None,
        format: str,
        system: str | None,
        max_length: int | None,
        on_bad_row: OnBadRow,
        batch_size: int,
        eval_batch_size: int,
        val_fraction: float,
        seed: int,
        num_proc: int | None,
        cache_dir: str | os.PathLike[str] | None,
        tokenizer: PreTrainedTokenizerBase | None,
        streaming_window: int | None,
        max_tokens: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_arguments(
            TreeDataModule.__init__,
            locals(),
            max_length=Range(1),
            batch_size=Range(1),
            max_tokens=Range(1),
            eval_batch_size=Range(1),
            val_fraction=Range(0, 1, below=True),
            num_proc=Range(0),
            num_workers=Range(0),
            streaming_window=Range(1),
        )
        self.sources = {"train": train, "val": val, "test": test, "predict": predict}
        self._weighted = {part: weighted_sources(s) for part, s in self.sources.items() if s is not None}
        for part, sources in self._weighted.items():
            for source in sources:
                if part != "train" and source.weight != 1:
                    raise ValueError(
                        f"{part} gives {source.name} the weight {source.weight:g}. Only training data has weights: "
                        "an evaluation goes through every row once."
                    )
        self.max_length, self.on_bad_row = max_length, on_bad_row
        self.batch_size, self.max_tokens, self.eval_batch_size = batch_size, max_tokens, eval_batch_size
        self.val_fraction, self.seed = val_fraction, seed
        self.num_proc, self.num_workers = num_proc, num_workers
        default = os.environ.get("LIGHTNING_RLHF_CACHE", Path.home() / ".cache" / "lightning_rlhf")
        self.cache = TokenCache(Path(cache_dir or default) / "tokens")
        self.bad_rows: dict[str, list[BadRows]] = {}
        self.unread: dict[str, Counter[str]] = {}
        self.extra_stops: dict[str, int] = {}
        self._tokenizer = tokenizer
        self.streaming_window, self.format, self.system = streaming_window, format, system
        self._items: dict[str, list[list[tuple[str, Item]]]] = {}
        self._rows: dict[str, TokenRows] = {}
        self._reported: set[tuple[str, int]] = set()
        self._empty: defaultdict[tuple[str, int], list[str]] = defaultdict(list)  # files without rows, not told of yet
        self._usual: dict[str, str | None] = {}

    @property
    def streaming(self) -> bool:
        """True if each epoch reads the rows again; False if memory holds them."""
        return self.streaming_window is not None

    # ------------------------------------------------------------------------------------------------- subclasses

    @abstractmethod
    def parse(self, row: Mapping[str, Any], part: str, format: str) -> Item:
        """Reads a row.

        Args:
            row: Its columns.
            part: ``train``, ``val``, ``test`` or ``predict``.
            format: The format of its source.

        Raises:
            FormatError: The row can't be used.
        """

    @abstractmethod
    def reading(self) -> dict[str, Any]:
        """The arguments that :meth:`parse` and :meth:`dump` depend on, except the format, as JSON."""

    @abstractmethod
    def first_user_turn(self, item: Item) -> str:
        """The text that decides on which side of the train/validation split a row is."""

    @abstractmethod
    def dump(self, item: Item) -> Any:
        """All that the row's tokens depend on, as JSON."""

    @abstractmethod
    def encoder(self, limit: int) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
        """Returns the function that tokenizes a row, and its further arguments.

        The function must be at the top of a module; the cache's key includes the arguments.

        The function is called with the value of :meth:`dump`, the tokenizer and those arguments, and raises
        ``TokenizeError`` for a bad row. It returns the columns that ``tree`` reads, and may return ``cut`` (whether the
        row was shortened), ``unread`` (keys that it did not use) and ``extra_stops`` (whether it left out a stop token
        that an answer ended with).
        """

    @abstractmethod
    def messages(self, item: Item) -> SamplePrompt | None:
        """A row's prompt, for samples: messages or a plain text; None if it has none."""

    def finish(self, facts: list[Any], part: str) -> Callable[[Mapping[str, Any]], Any]:
        """Called with all ``facts`` of a part, in order of appearance; returns the function that makes trees."""
        return self.tree

    def where(self, part: str, row: int) -> str:
        """File and line of a row by its number in the part's batches (``PackedBatch.rows``)."""
        return str(self._rows[part].row(row)["where"])

    def every_row(self, part: str) -> PlannedLoader:
        """Each row of a part once, whatever its source weighs, in order: for what is computed before a run.

        Args:
            part: A part that was set up.
        """
        return self._in_order(self._rows[part])

    def _in_order(self, rows: SizedRows) -> PlannedLoader:
        """Each row once, in order, dealt over ranks."""
        ranks, rank = self._ranks()
        planner = Planner(rows.sizes, self.eval_batch_size * ranks, 1, ranks, shuffle=False)
        return PlannedLoader(rows, planner, rank, self.num_workers, pin_memory=torch.cuda.is_available())

    def longest(self, part: str) -> int:
        """Maximum number of tokens of a part's rows; 0 if the part has none or was not set up."""
        rows = self._rows.get(part)
        return int(rows.sizes[:, 0].max()) if rows else 0

    def languages(self, part: str) -> dict[str, str]:
        """Language by place of the row, from the columns ``lang`` and ``language``; reads the source again."""
        sources = self._weighted[self._side(part)[0]]
        rows = (row for source in sources for row in self._open(source.source, BadRows("skip")))
        return {row.where: name for row in rows if (name := read_name(row.value, "lang", "language"))}

    # ------------------------------------------------------------------------------------------------- Lightning

    def prepare_data(self) -> None:
        """Tokenizes into the cache; Lightning calls it once per node."""
        for part in self._parts(None if self.trainer is None else self.trainer.state.fn):
            self._stores(part)

    def setup(self, stage: str | None = None) -> None:
        """Maps the rows that a stage (fit, validate, test, predict) needs; tokenizes those that are not in the cache.

        Raises:
            DataError: The stage has no rows. (Training without validation rows is fine.)
        """
        new = [part for part in self._parts(stage) if part not in self._rows]
        for part in new:
            self._rows[part] = self._tokenized(part)
        self._report_keys(new)
        if stage in ("fit", None):
            self.check_validation()
        elif not len(self._rows[part := self._parts(stage)[0]]):
            raise DataError(f"There are no {part} rows. {self._none_held_out()} Give data.{part}.")

    def train_dataloader(self) -> PlannedLoader:
        """Shuffled batches; each optimizer step is dealt over ranks and micro-batches."""
        trainer = self.trainer
        k = 1 if trainer is None else trainer.accumulate_grad_batches
        return self._loader("train", self.batch_size, k, shuffle=True)

    def val_dataloader(self) -> PlannedLoader | list[Any]:
        """Validation rows in order; an empty list if there are none."""
        return self._eval_loader("val")

    def test_dataloader(self) -> PlannedLoader | list[Any]:
        """Test rows in order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> PlannedLoader | list[Any]:
        """Rows to predict, in order."""
        return self._eval_loader("predict")

    def sample_prompts(self, n: int) -> list[SamplePrompt]:
        """Prompts of the first ``n`` validation rows, for samples; of training rows if there are none."""
        return [prompt for prompt, _ in self._samples(n)]

    def sample_columns(self, n: int) -> list[dict[str, Any]]:
        """Returns the other columns of the prompts of :meth:`sample_prompts`, for reward functions."""
        return [{} for _ in self._samples(n)]

    def _samples(self, n: int) -> list[tuple[SamplePrompt, Item]]:
        """Returns the prompts of :meth:`sample_prompts`, each with the item that it was made of."""
        for part in ("val", "train"):
            sources = range(len(self._weighted[self._side(part)[0]]))
            items = (item for i in sources for _, item in self._rows_of(part, i))
            first = next(items, None)
            if first is not None:
                found = ((p, item) for item in chain((first,), items) if (p := self.messages(item)) is not None)
                return list(islice(found, n))
        return []

    # ------------------------------------------------------------------------------------------------- loaders

    def _eval_loader(self, part: str) -> PlannedLoader | list[Any]:
        if not len(self._rows[part]):
            return []
        return self._loader(part, self.eval_batch_size * self._ranks()[0], 1, shuffle=False)

    def _ranks(self) -> tuple[int, int]:
        """Data-parallel size and rank, which may differ from the world's."""
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (1, 0) if not kwargs else (kwargs["num_replicas"], kwargs["rank"])

    def _loader(self, part: str, batch_size: int, micro_batches: int, shuffle: bool) -> PlannedLoader:
        ranks, rank = self._ranks()
        rows = self._rows[part]
        planner = Planner(
            rows.sizes,
            batch_size,
            micro_batches,
            ranks,
            self.max_tokens,
            shuffle,
            self.seed,
            sources=rows.sources,
            window=self.streaming_window,
            content=rows.content,
        )
        return PlannedLoader(rows, planner, rank, self.num_workers, pin_memory=torch.cuda.is_available())

    # ------------------------------------------------------------------------------------------------- rows

    def _parts(self, stage: str | None) -> list[str]:
        return {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}.get(
            stage or "", ["train", "val", *(p for p in ("test", "predict") if self.sources[p] is not None)]
        )

    def _side(self, part: str) -> tuple[str, bool | None]:
        """Whose sources a part's rows come from, and whether they are the held-out ones; None: they are all rows."""
        if part in ("test", "predict") and self.sources[part] is None:
            part = "val"
        if self.sources["val"] is None and part in ("train", "val"):
            return "train", part == "val"
        return part, None

    def _rows_of(self, part: str, i: int) -> Iterator[tuple[str, Item]]:
        """(where, item) of a part's rows from one source. Bad rows of a stream are left out without a word."""
        origin, held_out = self._side(part)
        rows = self._convert(origin, i, _Found("skip", [])) if self.streaming else self._read(origin)[i]
        return self._of_side(rows, origin, held_out)

    def _of_side(
        self, rows: Iterable[tuple[str, Item]], origin: str, held_out: bool | None
    ) -> Iterator[tuple[str, Item]]:
        if held_out is None:
            yield from rows
            return
        usual = self._usual_opening(origin) if self.val_fraction else None
        for where, item in rows:
            if held_out == (self._held_out(item) and self.first_user_turn(item) != usual):
                yield where, item

    def _usual_opening(self, origin: str) -> str | None:
        """The first user turn that more than half of the rows have, if any: it always stays in training."""
        if origin not in self._usual:
            found, ahead = None, 0
            for item in self._all_items(origin):  # Boyer and Moore's majority vote
                opening = self.first_user_turn(item)
                if not ahead:
                    found = opening
                ahead += 1 if opening == found else -1
            alike: Counter[bool] = Counter()
            if found is not None and self._drawn(found):  # otherwise it is trained on anyway
                alike.update(self.first_user_turn(item) == found for item in self._all_items(origin))
            self._usual[origin] = found if alike[True] > alike[False] else None
        return self._usual[origin]

    def _all_items(self, origin: str) -> Iterator[Item]:
        for i in range(len(self._weighted[origin])):
            bad = _Found(self.on_bad_row, [])
            rows = self._convert(origin, i, bad) if self.streaming else self._read(origin)[i]
            yield from (item for _, item in rows)

    def _read(self, origin: str) -> list[list[tuple[str, Item]]]:
        """(where, item) of each source's rows, held in memory; bad rows are raised or counted."""
        if origin not in self._items:
            found = []
            for i in range(len(self._weighted[origin])):
                bad = _Found(self.on_bad_row, self._empty[origin, i])
                found.append(list(self._convert(origin, i, bad)))
                self._report(origin, i, bad, len(found[-1]))
            self._check_any(origin, sum(map(len, found)))
            self._items[origin] = found
        return self._items[origin]

    def _report(self, origin: str, i: int, bad: BadRows, good: int) -> None:
        """Warns once of rows that could not be read."""
        if (origin, i) not in self._reported:
            self._reported.add((origin, i))
            self.bad_rows.setdefault(origin, []).append(bad)
            bad.report(good + bad.total, self._called(origin, i))
            if not good and not bad.total and not self._empty[origin, i]:
                self._empty[origin, i].append(self._weighted[origin][i].name)

    def _check_any(self, origin: str, good: int) -> None:
        if not good:
            sources = ", ".join(source.name for source in self._weighted[origin])
            bad = self.bad_rows.get(origin, [])
            reasons = ", ".join(b.reasons for b in bad if b.total)
            why = f"all {sum(b.total for b in bad)} were skipped: {reasons}" if reasons else "there is none. Add rows."
            raise DataError(f"No usable row in the {self._part(origin)} data ({sources}): {why}")
        for i in range(len(self._weighted[origin])):  # only now: an error would tell of them a second time
            for name in self._empty.pop((origin, i), []):
                rank_zero_warn(f"{self._part(origin)}: {name} has no row.")

    def _part(self, part: str) -> str:
        """The name of a part in messages."""
        return f"{self.name} {part}".strip()

    def _called(self, part: str, i: int) -> str:
        """The name of a part's source in messages."""
        sources = self._weighted[self._side(part)[0]]
        return self._part(part) if len(sources) == 1 else f"{self._part(part)} ({sources[i].name})"

    def _convert(self, origin: str, i: int, bad: BadRows) -> Iterator[tuple[str, Item]]:
        source = self._weighted[origin][i]
        format = source.format or self.format
        named = "auto" if format == OASST else format
        for row in expand_trees(self._open(source.source, bad), type(self).tree_rows, bad, format):
            try:
                item = parse_row(row, lambda columns: self.parse(columns, origin, named))
            except FormatError as error:
                bad.add(row.where, error.kind, str(error))
            else:
                yield row.where, item

    def _open(self, source: Source, bad: BadRows) -> Iterable[Row]:
        return read_rows(self._files(source), bad)

    def _files(self, source: Source) -> Source:
        if isinstance(source, str) and source == BUNDLED:
            return bundled_path(self.bundled)
        return source

    def _held_out(self, item: Item) -> bool:
        """Decided by a hash of the first user turn and the seed: adding, moving or repeating rows changes nothing."""
        return self._drawn(self.first_user_turn(item))

    def _drawn(self, opening: str) -> bool:
        key = f"{self.seed}\0{opening}".encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64 < self.val_fraction

    # ------------------------------------------------------------------------------------------------- tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was given, or the module's.

        Raises:
            ValueError: There is neither.
        """
        if self._tokenizer is not None:
            return self._tokenizer
        if isinstance(self._module, HasTokenizer):
            return self._module.tokenizer
        raise ValueError(f"{type(self).__name__} has no tokenizer. Give one, or use it with a module that has one.")

    @property
    def stop_ids(self) -> list[int]:
        """The module's ``stop_token_ids``; empty if it has none."""
        return list(stop_tokens_of(self._module))

    @property
    def _module(self) -> object:
        """The Trainer's module."""
        return None if self.trainer is None else self.trainer.lightning_module

    def _limit(self) -> int:
        """Maximum number of tokens per row: the argument, or the model's context, or the tokenizer's maximum."""
        if self.max_length is not None:
            return self.max_length
        context = self._module.context_length if isinstance(self._module, HasContext) else None
        return int(context or self.tokenizer.model_max_length)

    def _tokenized(self, part: str) -> TokenRows:
        stores = self._stores(part)
        notes = [json.loads((path / "notes.json").read_text(encoding="utf-8")) for path in stores]
        origin, held_out = self._side(part)
        every = BadRows("skip")
        for i, note in enumerate(notes):
            read, refused = BadRows(self.on_bad_row), BadRows(self.on_bad_row)
            if note["read"] is not None:
                read.merge(note["read"])
                self._report(origin, i, read, note["parsed"])
            refused.merge(note["refused"])
            every.merge(note["refused"])
            total = note["rows"] + refused.total
            self.bad_rows.setdefault(part, []).append(refused)
            refused.report(total, self._called(part, i))
            if note["cut"]:
                rank_zero_warn(
                    f"{self._called(part, i)}: {note['cut']} of {total} rows were cut at max_length; the loss never "
                    "reads their stop token."
                )
        parsed = sum(note["parsed"] for note in notes) if self.streaming else sum(map(len, self._read(origin)))
        self._check_any(origin, parsed)
        if not any(note["rows"] for note in notes) and not held_out:
            split = f"; {parsed - every.total} of {parsed} are held out for validation" if held_out is False else ""
            skipped = f"all {every.total} were skipped: {every.reasons}" if every.total else "there is none"
            more = ". Give data.val, or lower data.val_fraction" if parsed > every.total else ""
            raise DataError(f"No usable row in the {self._part(part)} data: {skipped}{split}{more}")
        self.unread[part] = Counter()
        for note in notes:
            self.unread[part].update(note["unread"])
        self.extra_stops[part] = sum(note["extra_stops"] for note in notes)
        sources = [
            (note["rows"], source.weight if part == "train" else 1.0)
            for note, source in zip(notes, self._weighted[origin], strict=True)
        ]
        if part == "train" and (len(sources) > 1 or sources[0][1] != 1):
            for source, (count, weight) in zip(self._weighted[origin], sources, strict=True):
                rank_zero_info(f"{source.name}: {count:,} rows x {float(weight)}")
        tree = self.finish(list(distinct(fact for note in notes for fact in note["facts"])), part)
        blocks = [note["blocks"] for note in notes]
        content = hashlib.sha256("".join(note["content"] for note in notes).encode()).hexdigest()[:16]
        return TokenRows(stores, tree, self.cache.sizes(stores), sources, blocks, content)

    # ------------------------------------------------------------------------------------------------- reports

    def _report_keys(self, parts: Sequence[str]) -> None:
        """Logs which keys nothing reads, and how many answers had a stop token of their own."""
        once = {self._side(part): part for part in reversed(parts)}.values()
        unread = sum((self.unread[part] for part in once), Counter())
        start = f"{self.name}: " if self.name else ""
        if unread:
            rank_zero_info(f"{start}keys that no setting reads: {count_keys(unread)}")
        if extra_stops := sum(self.extra_stops[part] for part in once):
            rank_zero_info(
                f"{start}{extra_stops} rows have answers with their own stop tokens; each answer is trained with one."
            )

    def check_validation(self) -> None:
        """Warns that nothing will be validated, if the user asked for it or a callback waits for it."""
        off = getattr(self.trainer, "limit_val_batches", None) == 0
        if self.name or not (off or not len(self._rows["val"])):
            return
        waiting = [
            c for c in getattr(self.trainer, "callbacks", ()) if str(getattr(c, "monitor", "")).startswith("val/")
        ]
        why = "trainer.limit_val_batches is 0." if off else self._none_held_out()
        remedy = "Raise it" if off else "Give data.val, or raise data.val_fraction"
        for callback in waiting:
            if isinstance(callback, EarlyStopping) and callback.strict:
                raise DataError(
                    f"{why} EarlyStopping waits for {callback.monitor}, which never comes. {remedy}, or remove it."
                )
        if waiting:
            names = ", ".join(f"{type(callback).__name__} ({callback.monitor})" for callback in waiting)
            why += f" Nothing is validated, so these callbacks wait for values that never come: {names}."
        if waiting or (self.val_fraction and not off):
            rank_zero_warn(f"{why} {remedy}.")

    def _none_held_out(self) -> str:
        """Why there are no validation rows."""
        if not self.val_fraction:
            return "No row is held out for validation: val_fraction is 0."
        if skipped := sum(bad.total for bad in self.bad_rows.get("val", ())):
            return f"All {skipped} rows held out for validation were skipped."
        rows, openings = 0, set()
        for item in self._all_items("train"):
            rows += 1
            openings.add(self.first_user_turn(item))
        if len(openings) == 1:
            why = "rows with the same first user turn stay together, and these rows have 1 first user turn"
        else:
            why = f"each of their {len(openings):,} first user turns is drawn with this chance, and none was"
        return f"val_fraction={self.val_fraction} holds out none of the {rows:,} rows for validation: {why}."

    def _stores(self, part: str) -> list[Path]:
        """The folder of tokenized rows of each of the part's sources; made if it is missing."""
        encode, arguments = self.encoder(self._limit())
        origin, held_out = self._side(part)
        paths = []
        for i, source in enumerate(self._weighted[origin]):
            state = source_state(self._files(source.source)) if self.streaming else None
            if state is not None:
                format = source.format or self.format
                what = [state, origin == "predict", held_out, self.seed, self.val_fraction, format, self._code(format)]
                key = cache_key(self.tokenizer, type(self).__name__, arguments, [json.dumps([*what, self.reading()])])
            else:
                texts = chain.from_iterable(self._records(self._rows_of(part, i)))
                if self.streaming:  # the notes count the rows of both sides
                    texts = chain([str(sum(1 for _ in self._all_items(origin)))], texts)
                options = {**arguments, "streaming": self.streaming}
                key = cache_key(self.tokenizer, type(self).__name__, options, texts)
            path = self.cache.folder / key
            if not path.exists():
                bad = _Found(self.on_bad_row, self._empty[origin, i])
                all_rows = _Counted(self._convert(origin, i, bad) if self.streaming else self._read(origin)[i])
                rows = self._of_side(all_rows, origin, held_out)
                records = self._records(rows, source.source != BUNDLED)
                work = partial(encode, tokenizer=self.tokenizer, **arguments)
                encoder = RowEncoder(work, self.columns, type(self).tree, type(self).facts)
                notes = partial(self._notes, bad, all_rows)
                self.cache.write(key, records, encoder, self.num_proc, self.on_bad_row, notes)
                rank_zero_info(f"{self._called(part, i)}: tokenized rows are kept in {path}")
            paths.append(path)
        return paths

    def _code(self, format: str) -> list[str]:
        """The source of the modules in which users wrote what makes an item of a row: their classes, and a format.

        A cache that is found by the files alone would outlive a change of it.
        """
        names = {kind.__module__ for kind in type(self).__mro__}
        if import_format(format) is not None:
            names.add(format.rpartition(":" if ":" in format else ".")[0])
        packages = {__name__.partition(".")[0], "lightning", "abc", "builtins", "typing"}
        found = []
        for name in sorted(name for name in names if name.partition(".")[0] not in packages):
            with suppress(OSError, TypeError):  # nobody can tell in an interactive session
                found.append(inspect.getsource(sys.modules[name]))
        return found

    def _notes(self, bad: BadRows, rows: _Counted) -> dict[str, Any]:
        """Notes about reading the rows."""
        return {"read": bad.summary() if self.streaming else None, "parsed": rows.count}

    def _records(self, rows: Iterable[tuple[str, Item]], of_user: bool = True) -> Iterator[Record]:
        """Rows as the encoder gets them. A file name may hold bytes that are not text."""
        for where, item in rows:
            unread = getattr(item, "unread", ()) if of_user else ()
            place = where.encode(errors="backslashreplace").decode()
            yield Record(place, json.dumps(self.dump(item), ensure_ascii=False), json.dumps(unread))


class _Found(BadRows):
    """Bad rows, and files without rows, which are not told of at once: a source is read several times.

    Args:
        policy: As of :class:`BadRows`.
        empty: Gets the files.
    """

    def __init__(self, policy: OnBadRow, empty: list[str]) -> None:
        super().__init__(policy)
        self._empty = empty

    def add_empty(self, path: str) -> None:
        """Notes a file without rows."""
        self._empty.append(path)


def shared_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Picks from a subclass's arguments those that :class:`TreeDataModule` takes."""
    names = inspect.signature(TreeDataModule.__init__).parameters.keys() - {"self"}
    return {name: value for name, value in given.items() if name in names}


class _Counted:
    """Counts the items that it passes on."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items, self.count = items, 0

    def __iter__(self) -> Iterator[Any]:
        for item in self.items:
            self.count += 1
            yield item


def count_keys(counts: Counter[str]) -> str:
    """Keys, each with the number of rows that have it, in words."""
    return ", ".join(f"{key} ({n:,} row{'' if n == 1 else 's'})" for key, n in counts.most_common())
