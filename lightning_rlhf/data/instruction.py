"""Instruction data: rows of any known format to planned, packed batches."""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.formats import Conversation, FormatError, to_conversation
from lightning_rlhf.data.packed import Branch, Tree
from lightning_rlhf.data.planner import PlannedLoader, Planner, Size
from lightning_rlhf.data.sources import BadRows, Row, Source, read_rows
from lightning_rlhf.data.tokens import LossOn, TokenizeError, encode, truncate

#: Changes whenever the same rows would be tokenised otherwise.
_CACHE_VERSION = 1
BUNDLED = "bundled"


class TokenRows:
    """Tokenised rows, memory-mapped: index to tree.

    Args:
        dataset: A ``datasets.Dataset`` of ``input_ids`` and ``scored``.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __call__(self, index: int) -> Tree:
        """The row as a prompt (all before the first scored token) with one completion."""
        row = self.dataset[index]
        ids, scored = row["input_ids"], row["scored"]
        first = scored.index(True)
        return Tree(ids[:first], [Branch(ids[first:], scored[first:])])

    def sizes(self) -> list[Size]:
        """What the planner needs."""
        columns = self.dataset.with_format(None)
        return [Size(t, s, 1) for t, s in zip(columns["num_tokens"], columns["num_scored"], strict=True)]


class InstructionDataModule(L.LightningDataModule):
    """Instruction data for supervised fine-tuning.

    Args:
        train: Files or globs (JSON, JSONL, CSV, Parquet, text; gzip too), a hub data set id, a ``datasets.Dataset``, a
            list of dicts, or ``bundled``: 266 rows in Chinese and English that come with the package.
        val: Validation data; None takes ``val_fraction`` of the training rows.
        test: Test data for ``trainer.test``; None uses the validation rows.
        predict: Rows for ``trainer.predict``; None uses the validation rows.
        format: Row format, or ``auto``.
        system: System prompt of rows that have none.
        loss_on: ``assistant``: every assistant turn; ``last``: the last; ``all``: all tokens.
        max_length: Most tokens of a row; default the model's context.
        truncate: Cut longer rows at ``max_length`` instead of calling them bad; cut rows are counted and reported.
        on_bad_row: ``raise`` names file, line and reason; ``skip`` counts by reason and reports once.
        batch_size: Sequences of an optimizer step, over all ranks and micro-batches.
        max_tokens: Most tokens of a micro-batch; beyond it an error names the accumulation that fits.
        eval_batch_size: Sequences of an evaluation batch on each rank.
        val_fraction: Share held out by first user turn: rows that open alike stay on one side.
        seed: Of the split and the shuffle.
        num_proc: Processes that tokenise; None for one.
        num_workers: Processes that pack batches.
        cache_dir: Where tokenised rows are kept, by content; default ``~/.cache/lightning_rlhf``, or the environment's
            ``LIGHTNING_RLHF_CACHE``.
        tokenizer: Default: the module's, with its chat template.
    """

    def __init__(
        self,
        train: Source = BUNDLED,
        val: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        format: str = "auto",
        system: str | None = None,
        loss_on: LossOn = "assistant",
        max_length: int | None = None,
        truncate: bool = False,
        on_bad_row: Literal["raise", "skip"] = "raise",
        batch_size: int = 8,
        max_tokens: int | None = None,
        eval_batch_size: int = 8,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_proc: int | None = None,
        num_workers: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}.")
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        self.sources = {"train": train, "val": val, "test": test, "predict": predict}
        self.format, self.system, self.loss_on = format, system, loss_on
        self.max_length, self.truncate, self.on_bad_row = max_length, truncate, on_bad_row
        self.batch_size, self.max_tokens, self.eval_batch_size = batch_size, max_tokens, eval_batch_size
        self.val_fraction, self.seed = val_fraction, seed
        self.num_proc, self.num_workers = num_proc, num_workers
        default = os.environ.get("LIGHTNING_RLHF_CACHE", Path.home() / ".cache" / "lightning_rlhf")
        self.cache_dir = Path(cache_dir or default) / "tokens"
        self._tokenizer = tokenizer
        self._conversations: dict[str, list[tuple[str, Conversation]]] = {}
        self._rows: dict[str, TokenRows] = {}

    # ------------------------------------------------------------------------------------------------- Lightning

    def prepare_data(self) -> None:
        """Tokenises into the cache, on one process a node."""
        for part in self._parts(None):
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

    def sample_prompts(self, n: int) -> list[list[dict[str, str]]]:
        """Messages before the last answer of the first ``n`` validation rows, for showing samples."""
        prompts: list[list[dict[str, str]]] = []
        for _, conversation in self._read("val") or self._read("train"):
            if conversation.messages is not None and len(prompts) < n:
                prompts.append([{"role": m["role"], "content": m["content"]} for m in conversation.messages[:-1]])
        return prompts

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
        import torch

        return PlannedLoader(rows, planner, rank, self.num_workers, pin_memory=torch.cuda.is_available())

    # ------------------------------------------------------------------------------------------------- rows

    def _parts(self, stage: str | None) -> list[str]:
        return {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}.get(
            stage or "", ["train", "val", *(p for p in ("test", "predict") if self.sources[p] is not None)]
        )

    def _read(self, part: str) -> list[tuple[str, Conversation]]:
        """(where, conversation) of a part's rows; bad ones raised or counted."""
        if part not in self._conversations:
            if part == "train" or self.sources[part] is not None:
                rows = self._convert(self.sources[part], part)
                held_out = part == "train" and self.sources["val"] is None
                self._conversations[part] = [r for r in rows if not (held_out and self._held_out(r[1]))]
                if held_out:
                    self._conversations["val"] = [r for r in rows if self._held_out(r[1])]
            elif part == "val":
                self._read("train")
            else:
                self._conversations[part] = self._read("val")
        return self._conversations[part]

    def _convert(self, source: Source, part: str) -> list[tuple[str, Conversation]]:
        bad = BadRows(self.on_bad_row)
        rows: list[tuple[str, Conversation]] = []
        for row in self._open(source, bad):
            try:
                rows.append((row.where, to_conversation(row.value, self.format, self.system)))
            except FormatError as error:
                bad.add(row.where, error.kind, str(error))
        bad.report(len(rows) + bad.total, part)
        if not rows:
            raise ValueError(f"No usable row in the {part} data ({_name(source)}); {bad.total} were skipped.")
        return rows

    def _open(self, source: Source, bad: BadRows) -> Iterable[Row]:
        if isinstance(source, str) and source == BUNDLED:
            folder = importlib.resources.files("lightning_rlhf.data") / "bundled"
            source = str(folder / "instructions.*.jsonl")
        return read_rows(source, bad)

    def _held_out(self, conversation: Conversation) -> bool:
        """By a hash of the first user turn and the seed: stable when rows are added, moved or repeated."""
        key = f"{self.seed}\0{conversation.first_user_turn}".encode()
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
            raise ValueError("InstructionDataModule has no tokenizer: give one, or use it with a module that has one.")
        return tokenizer

    def _limit(self) -> int:
        """Most tokens of a row: the argument, else the model's context, else what the tokenizer says."""
        if self.max_length is not None:
            return self.max_length
        module = None if self.trainer is None else self.trainer.lightning_module
        model = getattr(getattr(module, "policy", None), "model", None)
        context = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        return int(context or self.tokenizer.model_max_length)

    def _tokenised(self, part: str) -> TokenRows:
        import datasets

        path = self._store(part)
        if path is None:
            return TokenRows(datasets.Dataset.from_dict({"num_tokens": [], "num_scored": []}))
        return TokenRows(self._without_bad(datasets.load_from_disk(str(path)), part))

    def _store(self, part: str) -> Path | None:
        """Where the part's tokenised rows lie, made if need be; None where it has no rows."""
        import datasets

        conversations = self._read(part)
        if not conversations:
            return None
        tokenizer, limit = self.tokenizer, self._limit()
        records = [
            {"where": where, "conversation": json.dumps([c.messages, c.text], ensure_ascii=False)}
            for where, c in conversations
        ]
        path = self.cache_dir / self._key(tokenizer, records, limit)
        if not path.exists():
            table = datasets.Dataset.from_list(records).map(
                _tokenise,
                fn_kwargs=dict(tokenizer=tokenizer, loss_on=self.loss_on, limit=limit, cut=self.truncate),
                remove_columns=["conversation"],
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
        cut = sum(table["cut"])
        if cut:
            rank_zero_warn(
                f"{part}: {cut} of {len(table)} rows were cut at max_length; the loss never reads their stop token."
            )
        if not good:
            raise ValueError(f"No usable row in the {part} data: all {len(table)} were skipped.")
        return table if len(good) == len(table) else table.select(good)

    def _key(self, tokenizer: PreTrainedTokenizerBase, records: list[dict[str, str]], limit: int) -> str:
        """Hash of all that decides the tokens."""
        backend = getattr(tokenizer, "backend_tokenizer", None)
        words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
        specials = json.dumps({k: str(v) for k, v in tokenizer.special_tokens_map.items()}, sort_keys=True)
        options = json.dumps([_CACHE_VERSION, self.loss_on, limit, self.truncate])
        digest = hashlib.sha256()
        for text in (options, words, specials, str(tokenizer.chat_template)):
            digest.update(text.encode() + b"\0")
        for record in records:
            digest.update(record["where"].encode() + b"\0" + record["conversation"].encode() + b"\0")
        return digest.hexdigest()[:40]


def _name(source: Source) -> str:
    return str(source) if isinstance(source, (str, os.PathLike)) else f"a {type(source).__name__}"


def _tokenise(
    row: dict[str, str], tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, limit: int, cut: bool
) -> dict[str, Any]:
    """One row's tokens, or why it has none; runs in worker processes."""
    messages, text = json.loads(row["conversation"])
    conversation = Conversation(None if messages is None else tuple(messages), text)
    empty: dict[str, Any] = {"input_ids": [], "scored": [], "num_tokens": 0, "num_scored": 0, "cut": False}
    try:
        tokens = encode(tokenizer, conversation, loss_on)
    except TokenizeError as error:
        return {**empty, "kind": error.kind, "reason": str(error)}
    length = len(tokens.input_ids)
    if length > limit:
        if not cut:
            reason = f"{length} tokens are over max_length={limit}; raise it, shorten the row, or set truncate: true"
            return {**empty, "kind": "too long", "reason": reason}
        shortened = truncate(tokens, limit)
        if shortened is None:
            return {**empty, "kind": "nothing to learn", "reason": f"no scored token within max_length={limit}"}
        tokens = shortened
    if not any(tokens.scored):
        return {**empty, "kind": "nothing to learn", "reason": "no token that the loss reads"}
    return {
        "input_ids": tokens.input_ids,
        "scored": tokens.scored,
        "num_tokens": len(tokens.input_ids),
        "num_scored": sum(tokens.scored),
        "kind": "",
        "reason": "",
        "cut": length > limit,
    }
