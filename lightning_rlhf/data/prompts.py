"""Prompts for rollouts, with the columns that reward functions get, and texts or pairs beside them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data.base import BUNDLED, TreeDataModule, shared_arguments
from lightning_rlhf.data.errors import DataError
from lightning_rlhf.data.formats import Conversation, Message
from lightning_rlhf.data.instruction import InstructionDataModule
from lightning_rlhf.data.oasst import prompt_rows
from lightning_rlhf.data.packed import Size, StepTotals
from lightning_rlhf.data.planner import Bin, PlannedLoader
from lightning_rlhf.data.preference import PreferenceDataModule
from lightning_rlhf.data.prompt_formats import Prompt, to_prompt
from lightning_rlhf.data.sources import BadRows, OnBadRow, Row, Source
from lightning_rlhf.data.tokens import TokenizeError, encode_prompt
from lightning_rlhf.protocols import LimitsPrompts, SamplePrompt
from lightning_rlhf.utils.text import show


@dataclass(eq=False)
class PromptBatch:
    """One rank's prompts of an iteration, B of them; B may be 0 if there are fewer prompts than ranks.

    Attributes:
        prompts: The token ids of each prompt, as inference feeds them: with the generation prompt, without padding.
        messages: The messages, or the plain text, of each prompt.
        rows: The prompts' row numbers in the data.
        columns: The rows' other columns for reward functions, B values each; None for a row that lacks the column. All
            batches have the same columns.
        total: Prompts of the iteration over all ranks.
    """

    prompts: list[list[int]]
    messages: list[list[Message] | str]
    rows: tuple[int, ...]
    columns: dict[str, list[Any]]
    total: int

    def select(self, chosen: Sequence[int]) -> PromptBatch:
        """The prompts of these indices, in a batch of the same iteration."""
        return PromptBatch(
            prompts=[self.prompts[i] for i in chosen],
            messages=[self.messages[i] for i in chosen],
            rows=tuple(self.rows[i] for i in chosen),
            columns={name: [column[i] for i in chosen] for name, column in self.columns.items()},
            total=self.total,
        )

    def to(self, device: Any, non_blocking: bool = False) -> PromptBatch:
        """The batch itself: it has no tensors. Without this method, Lightning would look at every token."""
        return self


# ------------------------------------------------------------------------------------------------------------- batches


class _PromptRow(NamedTuple):
    ids: list[int]
    messages: list[Message] | str
    columns: dict[str, Any]

    @property
    def size(self) -> Size:
        """What the planner needs to know about the prompt."""
        return Size(len(self.ids), StepTotals(sequences=1))


def prompt_row(row: Mapping[str, Any]) -> _PromptRow:
    """A tokenized row's token ids, messages and other columns."""
    return _PromptRow(row["prompt"], json.loads(row["messages"]), json.loads(row["further"]))


def prompt_columns(row: Mapping[str, Any]) -> list[Any]:
    """The names of a tokenized row's other columns."""
    return list(json.loads(row["further"]))


def collate_prompts(rows: list[_PromptRow], chosen: Bin, names: tuple[str, ...]) -> PromptBatch:
    """Makes a batch of a bin's rows, with the columns ``names``."""
    return PromptBatch(
        prompts=[row.ids for row in rows],
        messages=[row.messages for row in rows],
        rows=chosen.rows,
        columns={name: [row.columns.get(name) for row in rows] for name in names},
        total=int(chosen.totals.sequences),
    )


class PromptsWith:
    """Batches ``{"prompts": PromptBatch, NAME: PackedBatch}``; an epoch is one pass over the prompts.

    Like :class:`~lightning_rlhf.data.planner.PlannedLoader`, it is a plain iterable with a state. What is beside the
    prompts starts its next epoch, in a new order, as soon as all of it was used, wherever the prompts are.

    Args:
        prompts: The loader whose epochs count.
        beside: The loaders of packed batches, by name: ``ptx``, ``pairs``.
    """

    def __init__(self, prompts: PlannedLoader, beside: dict[str, PlannedLoader]) -> None:
        self.prompts, self.beside = prompts, beside
        self._rounds: dict[str, Iterator[Any]] | None = None

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """This loader: Lightning looks here for ``sampler.set_epoch``."""
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch of the prompts; the others count their own."""
        self.prompts.set_epoch(epoch)

    def __len__(self) -> int:
        """Iterations per epoch."""
        return len(self.prompts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if self._rounds is None:
            self._rounds = {name: _rounds(loader) for name, loader in self.beside.items()}
        for prompts in self.prompts:
            yield {"prompts": prompts, **{name: next(rounds) for name, rounds in self._rounds.items()}}

    def state_dict(self) -> dict[str, Any]:
        """The places of all loaders."""
        return {"prompts": self.prompts.state_dict(), **{k: v.state_dict() for k, v in self.beside.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the places.

        Raises:
            ValueError: One of the plans differs, or the checkpoint was made without what is beside the prompts now.
        """
        if missing := [name for name in self.beside if name not in state]:
            raise ValueError(f"The checkpoint was made without {missing[0]}. Resume without it, or start a new run.")
        self.prompts.load_state_dict(state["prompts"])
        for name, loader in self.beside.items():
            loader.load_state_dict(state[name])
            if loader.position == len(loader):  # saved when all of it was used
                loader.set_epoch(loader.epoch + 1)
        self._rounds = None


def _rounds(loader: PlannedLoader) -> Iterator[Any]:
    while True:
        yield from loader
        loader.set_epoch(loader.epoch + 1)


# --------------------------------------------------------------------------------------------------------- data module


@dataclass(frozen=True)
class Ptx:
    """Texts beside the prompts; with them, training batches are ``{"prompts": PromptBatch, "ptx": PackedBatch}``.

    Args:
        source: Instruction data or plain texts, as ``train`` of ``InstructionDataModule``. Default: none. The share
            ``val_fraction`` of it is held out, as in fine-tuning.
        batch_size: Sequences per iteration, over all ranks.
        max_length: Maximum number of tokens per text. Default: the model's context.

    Raises:
        ValueError: A number is below 1.
    """

    source: Source | None = None
    batch_size: int = 8
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_arguments(Ptx, vars(self), "ptx.", batch_size=Range(1), max_length=Range(1))


@dataclass(frozen=True)
class DataPairs:
    """Pairs beside the prompts; with them, training batches are ``{"prompts": PromptBatch, "pairs": PackedBatch}``.

    Args:
        source: Preference data, as ``train`` of ``PreferenceDataModule``. Default: none. The share ``val_fraction`` of
            it is held out, as in DPO.
        batch_size: Answers per iteration, over all ranks: two per pair.
        max_length: Maximum number of tokens of a prompt with its answer. Default: the model's context.

    Raises:
        ValueError: A number is below 1.
    """

    source: Source | None = None
    batch_size: int = 16
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_arguments(DataPairs, vars(self), "pairs.", batch_size=Range(1), max_length=Range(1))


_NO_PTX, _NO_PAIRS = Ptx(), DataPairs()


class PromptDataModule(TreeDataModule[Prompt]):
    """Prompts for PPO and its family, one batch per iteration.

    ``trainer.accumulate_grad_batches`` has no effect: an iteration is one batch, which the module cuts itself.

    Args:
        as_text: Take each prompt as plain text that no chat template touches, for base models.
        max_length: Maximum number of tokens per prompt. Longer rows are bad rows. Default, and upper limit: what leaves
            room for a completion in the model's context.
        batch_size: Prompts per iteration, over all ranks.
        drop_last: Leave out the last batch of an epoch if it is smaller.
        order_by: Column of numbers by which each epoch of training is sorted, the smallest first: with a column of
            difficulties, easy prompts come before hard ones. Prompts with the same number are shuffled. Default: all
            prompts are shuffled.
        descending: The largest number first.
        eval_batch_size: Prompts per evaluation batch on each rank. A larger value needs more memory.
        ptx: Texts for a language-model loss beside PPO's (PPO-ptx, Ouyang et al. 2022).
        pairs: Pairs for online DPO beside those that it samples.

    Attributes:
        beside: The data modules of ``ptx`` and ``pairs``, by these names, where they have a source.

    The other arguments are those of :class:`~lightning_rlhf.data.base.TreeDataModule`. ``bundled`` are the first user
    turns of the bundled instruction data.
    """

    columns: ClassVar[Mapping[str, Any]] = {"prompt": [int], "messages": str, "further": str}
    bundled = "instructions.*.jsonl"
    tree = staticmethod(prompt_row)
    tree_rows = staticmethod(prompt_rows)
    facts = staticmethod(prompt_columns)

    def __init__(
        self,
        train: Source = BUNDLED,
        val: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        format: str = "auto",
        system: str | None = None,
        as_text: bool = False,
        max_length: int | None = None,
        on_bad_row: OnBadRow = "raise",
        batch_size: int = 64,
        drop_last: bool = False,
        order_by: str | None = None,
        descending: bool = False,
        eval_batch_size: int = 16,
        ptx: Ptx = _NO_PTX,
        pairs: DataPairs = _NO_PAIRS,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_proc: int | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streaming_window: int | None = None,
    ) -> None:
        check_arguments(PromptDataModule.__init__, locals())
        super().__init__(**shared_arguments(locals()))
        for name, group, kind in (("ptx", ptx, Ptx), ("pairs", pairs, DataPairs)):
            if not isinstance(group, kind):
                raise ValueError(
                    f"{name} is a {type(group).__name__}. Give {kind.__name__}(source, batch_size=..., max_length=...)."
                )
        if as_text and system is not None:
            raise ValueError(
                "as_text makes prompts plain texts, which have no system prompt. Leave out as_text or system."
            )
        if descending and order_by is None:
            raise ValueError("descending turns the order of a column around: set order_by, or leave out descending.")
        if order_by is not None and streaming_window is not None:
            raise ValueError("order_by sorts all prompts, and streaming_window reads some at a time: leave out one.")
        self.as_text, self.drop_last = as_text, drop_last
        self.order_by, self.descending = order_by, descending
        self.beside: dict[str, InstructionDataModule | PreferenceDataModule] = {}
        for name, group, maker in (("ptx", ptx, InstructionDataModule), ("pairs", pairs, PreferenceDataModule)):
            if group.source is not None:
                self.sources[name] = group.source
                self.beside[name] = maker(
                    group.source,
                    max_length=group.max_length,
                    on_bad_row=on_bad_row,
                    batch_size=group.batch_size,
                    val_fraction=val_fraction,
                    seed=seed,
                    num_proc=num_proc,
                    cache_dir=cache_dir,
                    tokenizer=tokenizer,
                    streaming_window=streaming_window,
                )
                self.beside[name].name = name
        self._names: dict[str, tuple[str, ...]] = {}

    # ------------------------------------------------------------------------------------------------- rows

    def parse(self, row: Mapping[str, Any], part: str, format: str) -> Prompt:
        """A prompt with its other columns."""
        return to_prompt(row, format, self.system, self.as_text)

    def reading(self) -> dict[str, Any]:
        """The system prompt, and whether prompts are texts."""
        return {"system": self.system, "as_text": self.as_text}

    def first_user_turn(self, item: Prompt) -> str:
        """The first user turn, as in fine-tuning, or the text."""
        if isinstance(item.prompt, str):
            return item.prompt
        return Conversation(item.prompt).first_user_turn

    def dump(self, item: Prompt) -> dict[str, Any]:
        """The prompt, and the other columns as ASCII JSON, which keeps every value as it is."""
        return {"prompt": item.prompt, "further": json.dumps(item.columns)}

    def encoder(self, limit: int) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
        """:func:`encode_prompt_row` with the length limit."""
        return encode_prompt_row, {"limit": limit, "given": self.max_length == limit}

    def messages(self, item: Prompt) -> SamplePrompt:
        """The prompt."""
        if isinstance(item.prompt, str):
            return item.prompt
        return [{"role": m["role"], "content": m["content"]} for m in item.prompt]

    def sample_columns(self, n: int) -> list[dict[str, Any]]:
        """The other columns of those prompts."""
        return [dict(item.columns) for _, item in self._samples(n)]

    def finish(self, facts: list[Any], part: str) -> Callable[[Mapping[str, Any]], _PromptRow]:
        """Notes the columns that any row has, so that all batches have the same ones."""
        self._names[part] = tuple(facts)
        return prompt_row

    def _open(self, source: Source, bad: BadRows) -> Iterable[Row]:
        rows = super()._open(source, bad)
        if not (isinstance(source, str) and source == BUNDLED):
            return rows
        return (Row(_opening(row.value, self.as_text), row.where) for row in rows)

    def _limit(self) -> int:
        """The smaller of ``max_length`` and what leaves room for a completion."""
        room = self._module.prompt_limit if isinstance(self._module, LimitsPrompts) else None
        if room is None:
            return super()._limit()
        if room < 1:
            raise DataError(
                f"max_new_tokens leaves no room for a prompt in the model's context: it is {1 - room} too large. Lower "
                "model.rollout.sampling.max_new_tokens."
            )
        return int(room if self.max_length is None else min(room, self.max_length))

    # ------------------------------------------------------------------------------------------------- Lightning

    def prepare_data(self) -> None:
        """Tokenizes into the cache; Lightning calls it once per node."""
        super().prepare_data()
        for data in self._beside().values():
            data.prepare_data()

    def setup(self, stage: str | None = None) -> None:
        """Maps the rows that a stage (fit, validate, test, predict) needs; tokenizes those not in the cache."""
        super().setup(stage)
        for data in self._beside(stage).values():
            data.setup(stage)

    def train_dataloader(self) -> PlannedLoader | PromptsWith:  # type: ignore[override]
        """Shuffled prompts, dealt over ranks; with texts and pairs beside them where there are any."""
        loader = self._loader("train", self.batch_size, 1, shuffle=True)
        beside = {name: data.train_dataloader() for name, data in self._beside("fit").items()}
        return PromptsWith(loader, beside) if beside else loader

    def _beside(self, stage: str | None = None) -> dict[str, InstructionDataModule | PreferenceDataModule]:
        """The data modules beside the prompts, with this one's Trainer, if the stage needs them."""
        stage = stage or (None if self.trainer is None else self.trainer.state.fn)
        if stage not in (None, "fit"):
            return {}
        for data in self.beside.values():
            data.trainer = self.trainer
        return self.beside

    def _loader(self, part: str, batch_size: int, micro_batches: int, shuffle: bool) -> PlannedLoader:
        loader = super()._loader(part, batch_size, micro_batches, shuffle)
        # Completions cost more than prompts, and each about the same: balance the number of prompts, then of tokens.
        drops = self.drop_last and part == "train"
        keys = self._keys() if part == "train" and self.order_by is not None else None
        planner = replace(loader.planner, overhead=self.longest(part), drop_last=drops, keys=keys)
        loader.planner = planner
        loader.pin_memory = False  # it has no tensors
        loader.collate = partial(collate_prompts, names=self._names.get(part, ()))
        if drops and planner.num_trees < batch_size:
            raise ValueError(
                f"drop_last leaves no batch: batch_size is {batch_size}, and there are {planner.num_trees} prompts. "
                "Lower batch_size."
            )
        return loader

    def _keys(self) -> NDArray[np.float64]:
        """(rows,) what training rows are sorted by.

        Raises:
            DataError: A row has no number in that column.
        """
        found = []
        for i, text in enumerate(self._rows["train"].column("further")):
            columns = json.loads(text)
            value = columns.get(self.order_by)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                what = f"is {show(value)}" if self.order_by in columns else "is missing"
                near = f" (columns: {', '.join(map(str, columns))})" if columns and self.order_by not in columns else ""
                raise DataError(
                    f"{self.where('train', i)}: the column {self.order_by!r} of order_by {what}{near}: each row needs "
                    "a number there."
                )
            found.append(-float(value) if self.descending else float(value))
        return np.asarray(found)


def _opening(row: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    """A bundled conversation up to its first user turn; as text, that turn alone."""
    first = next(i for i, turn in enumerate(row["messages"]) if turn["role"] == "user")
    further = {name: value for name, value in row.items() if name != "messages"}
    opening = row["messages"][first]["content"] if as_text else row["messages"][: first + 1]
    return {"prompt": opening, **further}


def encode_prompt_row(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int, given: bool
) -> dict[str, Any]:
    """One row's tokens; runs in worker processes."""
    ids = encode_prompt(tokenizer, row["prompt"])
    if len(ids) > limit:
        bound = f"max_length={limit}; raise it"
        if not given:
            bound = f"the {limit} that the model has room for; lower max_new_tokens"
        reason = f"the prompt's {len(ids)} tokens are over {bound}, or shorten the row"
        raise TokenizeError("too long", reason)
    return {"prompt": ids, "messages": json.dumps(row["prompt"]), "further": row["further"]}
