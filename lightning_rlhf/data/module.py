"""What the data modules share: sources, bad rows, the split, the cache of tokens, planned batches."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, TypeVar

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.formats import FormatError
from lightning_rlhf.data.planner import PlannedLoader, Planner, Size
from lightning_rlhf.data.sources import BadRows, Row, Source, read_rows

#: Changes whenever the same rows would be tokenised or stored otherwise.
_CACHE_VERSION = 3
BUNDLED = "bundled"

Item = TypeVar("Item")
OnBadRow = Literal["raise", "skip"]


class TokenRows:
    """Tokenised rows, memory-mapped: index to tree.

    Args:
        dataset: A ``datasets.Dataset`` of what ``encode`` returned.
        tree: Makes a tree of a row, or what else batches are made of.
    """

    def __init__(self, dataset: Any, tree: Callable[[Mapping[str, Any]], Any]) -> None:
        self.dataset, self.tree = dataset, tree

    def __len__(self) -> int:
        return len(self.dataset)

    def __call__(self, index: int) -> Any:
        """The row's tree."""
        return self.tree(self.dataset[index])

    def sizes_of(self, index: int) -> Size:
        """What the planner needs of a row."""
        row = self.dataset[index]
        return Size(*(row[name] for name in SIZE_COLUMNS))

    def sizes(self) -> list[Size]:
        """What the planner needs."""
        columns = self.dataset.with_format(None)
        return [Size(*sizes) for sizes in zip(*(columns[name] for name in SIZE_COLUMNS), strict=True)]


#: Columns of a tokenised row that say how large it is, in the order of :class:`~lightning_rlhf.data.planner.Size`.
SIZE_TYPES = {"num_tokens": int, "num_scored": int, "num_sequences": int, "pair_weight": float}
SIZE_COLUMNS = tuple(SIZE_TYPES)


class TreeDataModule(L.LightningDataModule, ABC, Generic[Item]):
    """Rows of any source, checked, tokenised once and dealt into packed batches.

    A subclass says what a row is (:meth:`parse`, :meth:`first_user_turn`, :meth:`dump`), what its tokens are
    (:meth:`encoder`) and how they make a tree (``tree``).

    Args:
        train: Training rows: files, globs, a hub id, a ``datasets.Dataset``, a list of dicts, or ``bundled``.
        val: Validation rows; None takes ``val_fraction`` of the training rows.
        test: Test rows; None uses the validation rows.
        predict: Rows to predict; None uses the validation rows.
        max_length: Most tokens of a sequence; default the model's context.
        on_bad_row: ``raise`` or ``skip``.
        batch_size: Sequences of an optimizer step.
        max_tokens: Most tokens of a micro-batch.
        eval_batch_size: Sequences of an evaluation batch on each rank.
        val_fraction: Share held out by first user turn.
        seed: Of the split and the shuffle.
        num_proc: Processes that tokenise.
        num_workers: Processes that pack batches.
        cache_dir: Where tokenised rows are kept.
        tokenizer: Default: the module's.

    Attributes:
        bad_rows: By part, the rows that reading and tokenising it left out.
    """

    #: Files of the package that ``bundled`` stands for.
    bundled: str
    #: Types of the columns that ``tree`` reads: a type, or a list of one.
    columns: ClassVar[Mapping[str, Any]]
    #: Makes a tree of a tokenised row; a function of a module, since worker processes get it.
    tree: Callable[[Mapping[str, Any]], Any]

    def __init__(
        self,
        train: Source,
        val: Source | None,
        test: Source | None,
        predict: Source | None,
        max_length: int | None,
        on_bad_row: OnBadRow,
        batch_size: int,
        max_tokens: int | None,
        eval_batch_size: int,
        val_fraction: float,
        seed: int,
        num_proc: int | None,
        num_workers: int,
        cache_dir: str | os.PathLike[str] | None,
        tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}.")
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.sources = {"train": train, "val": val, "test": test, "predict": predict}
        self.max_length, self.on_bad_row = max_length, on_bad_row
        self.batch_size, self.max_tokens, self.eval_batch_size = batch_size, max_tokens, eval_batch_size
        self.val_fraction, self.seed = val_fraction, seed
        self.num_proc, self.num_workers = num_proc, num_workers
        default = os.environ.get("LIGHTNING_RLHF_CACHE", Path.home() / ".cache" / "lightning_rlhf")
        self.cache_dir = Path(cache_dir or default) / "tokens"
        self.bad_rows: dict[str, list[BadRows]] = {}
        self._tokenizer = tokenizer
        self._items: dict[str, list[tuple[str, Item]]] = {}
        self._rows: dict[str, TokenRows] = {}

    # ------------------------------------------------------------------------------------------------- subclasses

    @abstractmethod
    def parse(self, row: Mapping[str, Any], part: str) -> Item:
        """What a row of ``part`` (train, val, test, predict) means.

        Raises:
            FormatError: It is unfit.
        """

    @abstractmethod
    def first_user_turn(self, item: Item) -> str:
        """What the split goes by."""

    @abstractmethod
    def dump(self, item: Item) -> Any:
        """The row as JSON, all that its tokens depend on."""

    @abstractmethod
    def encoder(self, limit: int) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
        """A function of a module, called with ``dump``'s value, the tokenizer and these further arguments.

        It returns the columns that ``tree`` reads and those of ``SIZE_COLUMNS``, ``kind`` and ``reason`` (empty
        where the row is good), and ``cut``, whether it was shortened. The arguments are part of the cache's key.
        """

    @abstractmethod
    def messages(self, item: Item) -> list[dict[str, str]] | str | None:
        """The prompt of a row for showing samples: messages or a plain text; None where it has none."""

    def finish(self, table: Any, part: str) -> Any:
        """Adds what depends on the whole part to its table of good rows."""
        return table

    def where(self, part: str, row: int) -> str:
        """File and line of a row by its number in the part's batches (``PackedBatch.rows``)."""
        return str(self._rows[part].dataset[row]["where"])

    def languages(self, part: str) -> dict[str, str]:
        """The languages of rows by their places, where a column ``lang`` or ``language`` says; reads the source."""
        sources = (self.sources[name] for name in dict.fromkeys((part, "val", "train")))
        rows = self._open(next(source for source in sources if source is not None), BadRows("skip"))
        named = ((row.where, row.value.get("lang") or row.value.get("language")) for row in rows)
        return {where: language for where, language in named if isinstance(language, str)}

    # ------------------------------------------------------------------------------------------------- Lightning

    def prepare_data(self) -> None:
        """Tokenises into the cache, on one process a node."""
        for part in self._parts(None if self.trainer is None else self.trainer.state.fn):
            self._store(part)

    def setup(self, stage: str | None = None) -> None:
        """Reads what the stage (fit, validate, test, predict) needs; from the cache where it is there."""
        for part in self._parts(stage):
            if part not in self._rows:
                self._rows[part] = self._tokenised(part)

    def train_dataloader(self) -> PlannedLoader:
        """Shuffled batches, each optimizer step dealt over ranks and micro-batches."""
        trainer = self.trainer
        k = 1 if trainer is None else trainer.accumulate_grad_batches
        return self._loader("train", self.batch_size, k, shuffle=True)

    def val_dataloader(self) -> PlannedLoader | list[Any]:
        """Validation rows in order; an empty list where there are none."""
        return self._eval_loader("val")

    def test_dataloader(self) -> PlannedLoader | list[Any]:
        """Test rows in order."""
        return self._eval_loader("test")

    def predict_dataloader(self) -> PlannedLoader | list[Any]:
        """Rows to predict, in order."""
        return self._eval_loader("predict")

    def sample_prompts(self, n: int) -> list[list[dict[str, str]] | str]:
        """Prompts of the first ``n`` validation rows, for showing samples."""
        return [prompt for prompt, _ in self._shown(n)]

    def _shown(self, n: int) -> list[tuple[list[dict[str, str]] | str, Any]]:
        """Those prompts, with what they were made of."""
        items = (item for _, item in self._read("val") or self._read("train"))
        found = ((prompt, item) for item in items if (prompt := self.messages(item)) is not None)
        return list(islice(found, n))

    # ------------------------------------------------------------------------------------------------- loaders

    def _eval_loader(self, part: str) -> PlannedLoader | list[Any]:
        if not len(self._rows[part]):
            return []
        return self._loader(part, self.eval_batch_size * self._ranks()[0], 1, shuffle=False)

    def _ranks(self) -> tuple[int, int]:
        """Data-parallel size and rank, which need not be the world's."""
        kwargs = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return (1, 0) if not kwargs else (kwargs["num_replicas"], kwargs["rank"])

    def _loader(self, part: str, batch_size: int, micro_batches: int, shuffle: bool) -> PlannedLoader:
        ranks, rank = self._ranks()
        rows = self._rows[part]
        planner = Planner(rows.sizes(), batch_size, micro_batches, ranks, self.max_tokens, shuffle, self.seed)
        return PlannedLoader(rows, planner, rank, self.num_workers, pin_memory=torch.cuda.is_available())

    # ------------------------------------------------------------------------------------------------- rows

    def _parts(self, stage: str | None) -> list[str]:
        return {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}.get(
            stage or "", ["train", "val", *(p for p in ("test", "predict") if self.sources[p] is not None)]
        )

    def _read(self, part: str) -> list[tuple[str, Item]]:
        """(where, row) of a part's rows; bad ones raised or counted."""
        if part not in self._items:
            if part == "train" or self.sources[part] is not None:
                rows = self._convert(self.sources[part], part)
                held_out = part == "train" and self.sources["val"] is None
                self._items[part] = [r for r in rows if not (held_out and self._held_out(r[1]))]
                if held_out:
                    self._items["val"] = [r for r in rows if self._held_out(r[1])]
            elif part == "val":
                self._read("train")
            else:
                self._items[part] = self._read("val")
        return self._items[part]

    def _convert(self, source: Source, part: str) -> list[tuple[str, Item]]:
        bad = BadRows(self.on_bad_row)
        rows: list[tuple[str, Item]] = []
        for row in self._open(source, bad):
            try:
                rows.append((row.where, self.parse(row.value, part)))
            except FormatError as error:
                bad.add(row.where, error.kind, str(error))
        bad.report(len(rows) + bad.total, part)
        self.bad_rows.setdefault(part, []).append(bad)
        if not rows:
            why = f": {bad.reasons}" if bad.total else "."
            raise ValueError(f"No usable row in the {part} data ({_name(source)}); {bad.total} were skipped{why}")
        return rows

    def _open(self, source: Source, bad: BadRows) -> Iterable[Row]:
        if isinstance(source, str) and source == BUNDLED:
            source = str(importlib.resources.files("lightning_rlhf.data") / "bundled" / self.bundled)
        return read_rows(source, bad)

    def _held_out(self, item: Item) -> bool:
        """By a hash of the first user turn and the seed: stable when rows are added, moved or repeated."""
        key = f"{self.seed}\0{self.first_user_turn(item)}".encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") / 2**64 < self.val_fraction

    # ------------------------------------------------------------------------------------------------- tokens

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As given, else the module's.

        Raises:
            ValueError: There is neither.
        """
        module = None if self.trainer is None else self.trainer.lightning_module
        tokenizer = self._tokenizer or getattr(module, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(f"{type(self).__name__} has no tokenizer: give one, or use it with a module that has one.")
        return tokenizer

    def _limit(self) -> int:
        """Most tokens of a row: the argument, else the model's context, else what the tokenizer says."""
        if self.max_length is not None:
            return self.max_length
        module = None if self.trainer is None else self.trainer.lightning_module
        context = getattr(module, "context_length", None)
        return int(context or self.tokenizer.model_max_length)

    def _tokenised(self, part: str) -> TokenRows:
        import datasets

        path = self._store(part)
        if path is None:
            return TokenRows(datasets.Dataset.from_dict({name: [] for name in SIZE_COLUMNS}), self.tree)
        return TokenRows(self.finish(self._without_bad(datasets.load_from_disk(str(path)), part), part), self.tree)

    def _store(self, part: str) -> Path | None:
        """Where the part's tokenised rows lie, made if need be; None where it has no rows."""
        import datasets

        rows = self._read(part)
        if not rows:
            return None
        encode, arguments = self.encoder(self._limit())
        records = [{"where": where, "row": json.dumps(self.dump(item), ensure_ascii=False)} for where, item in rows]
        path = self.cache_dir / self._key(records, arguments)
        if not path.exists():
            columns = {"where": str, **self.columns, **SIZE_TYPES, "kind": str, "reason": str, "cut": bool}
            table = datasets.Dataset.from_list(records).map(
                _encode_row,
                fn_kwargs=dict(encode=encode, tokenizer=self.tokenizer, arguments=arguments),
                remove_columns=["row"],
                # not inferred: that reads the first thousand rows, which may all have empty lists
                features=datasets.Features({name: _feature(kind) for name, kind in columns.items()}),
                num_proc=self.num_proc,
                desc=f"Tokenising {part} rows",
                load_from_cache_file=False,
                new_fingerprint=path.name[:32],
            )
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.mkdtemp(dir=self.cache_dir)
            table.save_to_disk(temporary)
            try:
                os.replace(temporary, path)
            except OSError:  # another process was first; its rows are the same
                if not path.exists():
                    raise
            rank_zero_info(f"{part}: tokenised rows are kept in {path}")
        return path

    def _without_bad(self, table: Any, part: str) -> Any:
        """Raises or counts the rows that could not be tokenised; the cache keeps them."""
        bad = BadRows(self.on_bad_row)
        good: list[int] = []
        for i, (where, kind, reason) in enumerate(zip(table["where"], table["kind"], table["reason"], strict=True)):
            if kind:
                bad.add(where, kind, reason)
            else:
                good.append(i)
        bad.report(len(table), part)
        self.bad_rows.setdefault(part, []).append(bad)
        cut = sum(table["cut"])
        if cut:
            rank_zero_warn(
                f"{part}: {cut} of {len(table)} rows were cut at max_length; the loss never reads their stop token."
            )
        if not good:
            raise ValueError(f"No usable row in the {part} data: all {len(table)} were skipped: {bad.reasons}")
        return table if len(good) == len(table) else table.select(good)

    def _key(self, records: list[dict[str, str]], arguments: dict[str, Any]) -> str:
        """Hash of all that decides the tokens."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        specials = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True)
        options = json.dumps([_CACHE_VERSION, type(self).__name__, arguments])
        digest = hashlib.sha256()
        for text in (options, words, specials, str(tokenizer.chat_template)):
            digest.update(text.encode() + b"\0")
        for record in records:
            digest.update(record["where"].encode() + b"\0" + record["row"].encode() + b"\0")
        return digest.hexdigest()[:40]


def _feature(kind: Any) -> Any:
    """A column's type as ``datasets`` calls it."""
    import datasets

    if isinstance(kind, list):
        return [_feature(kind[0])]
    return datasets.Value({str: "string", int: "int64", float: "float64", bool: "bool"}[kind])


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else f"a {type(source).__name__}"


def _encode_row(
    record: dict[str, str],
    encode: Callable[..., dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Runs in worker processes."""
    return encode(json.loads(record["row"]), tokenizer, **arguments)
