"""Single answers for KTO, each good or bad by itself: answers of one prompt share a tree, and each has a mismatch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.checks import Range, check_arguments
from lightning_rlhf.data.base import BUNDLED, TreeDataModule, shared_arguments
from lightning_rlhf.data.errors import DataError
from lightning_rlhf.data.oasst import preference_rows
from lightning_rlhf.data.packed import Branch, PackedBatch, Size, Tree
from lightning_rlhf.data.planner import Bin, PlannedLoader, pack_bin
from lightning_rlhf.data.preference import encode_answers
from lightning_rlhf.data.sources import BadRows, OnBadRow, Source
from lightning_rlhf.data.token_cache import TokenRows
from lightning_rlhf.data.unpaired_formats import Unpaired, to_unpaired
from lightning_rlhf.protocols import ReadsMismatched
from lightning_rlhf.utils.random import generator

#: Sets the draw of mismatched answers apart from the shuffle, which has the same seed and epoch.
_MISMATCH = 0x4B544F
#: How a label is stored.
_LABELS = {True: 1, False: 0, None: -1}


# --------------------------------------------------------------------------------------------------------------- rows


def unpaired_tree(row: Mapping[str, Any], origins: Mapping[tuple[str, ...], int] | None = None) -> Tree:
    """A tokenized answer as a tree with one branch, its label, and the number of its origin where they are known."""
    return Tree(
        row["prompt"],
        [Branch(row["answer"], row["scored"])],
        origin=origins[tuple(row["names"])] if origins else 0,
        labels=[] if row["label"] < 0 else [bool(row["label"])],
    )


def unpaired_names(row: Mapping[str, Any]) -> list[Any]:
    """A tokenized answer's origin: source and language."""
    return [row["names"]]


class JoinedRows(TokenRows):
    """Tokenized answers, of which those with the same prompt share a tree: index to tree.

    Args:
        answers: The answers, one a row.
        whole_rows: Join what one row of the data became, labeled or not, instead of labeled answers of one prompt.
        most: Maximum number of answers per tree; None for no limit.

    Attributes:
        members: (answers,) their row numbers, tree by tree.
        ends: (trees + 1,) index into ``members`` of each tree's first answer.
        left_out: Answers without a label.
    """

    def __init__(self, answers: TokenRows, whole_rows: bool, most: int | None) -> None:
        vars(self).update(vars(answers))
        labels = np.array(answers.column("label"), dtype=np.int64)
        together = answers.column("where" if whole_rows else "together")
        trees: list[list[int]] = []
        counts: list[int] = []
        first = 0
        for count, _ in answers.sources:
            begun = len(trees)
            open_trees: dict[str, list[int]] = {}
            for row in range(first, first + count):
                if labels[row] < 0 and not whole_rows:
                    continue
                tree = open_trees.get(together[row])
                if tree is None or len(tree) == most:
                    open_trees[together[row]] = tree = []
                    trees.append(tree)
                tree.append(row)
            counts.append(len(trees) - begun)
            first += count
        self.members = np.array([row for tree in trees for row in tree], dtype=np.int64)
        self.ends = np.cumsum([0, *map(len, trees)])
        self.left_out = len(labels) - len(self.members)
        self.sources = [(count, weight) for count, (_, weight) in zip(counts, answers.sources, strict=True)]
        self.sizes = self._joined_sizes(answers.sizes, np.array(answers.column("length"), dtype=np.float64))
        how = f"{whole_rows}\0{most}"
        self.content = hashlib.sha256(f"{answers.content}\0{how}".encode()).hexdigest()[:16]
        self.key = hashlib.sha256(f"{answers.key}\0{how}".encode()).hexdigest()

    def _joined_sizes(self, sizes: NDArray[np.float64], prompts: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sums of the answers' sizes, with each prompt once."""
        if not len(self):
            return np.empty((0, len(Size.NAMES)))
        sums = np.add.reduceat(sizes[self.members], self.ends[:-1])
        sums[:, 0] -= (np.diff(self.ends) - 1) * prompts[self.members[self.ends[:-1]]]
        return sums

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __call__(self, index: int) -> Tree:
        """The tree."""
        trees: list[Tree] = [self.tree(self.answer(place)) for place in range(self.ends[index], self.ends[index + 1])]
        labels = [label for tree in trees for label in tree.labels]
        return trees[0]._replace(
            branches=[branch for tree in trees for branch in tree.branches],
            labels=labels if len(labels) == len(trees) else [],
        )

    def answer(self, place: int) -> dict[str, Any]:
        """The columns of an answer by its place in ``members``."""
        return super().row(int(self.members[place]))

    def row(self, index: int) -> dict[str, Any]:
        """The columns of the tree's first answer."""
        return self.answer(int(self.ends[index]))

    def column(self, name: str) -> list[Any]:
        """One column of the first answers of all trees."""
        every = super().column(name)
        return [every[row] for row in self.members[self.ends[:-1]]]

    def answers(self, name: str) -> list[Any]:
        """One column of all answers, in the order of ``members``."""
        every = super().column(name)
        return [every[row] for row in self.members]


# --------------------------------------------------------------------------------------------------------- mismatches


class MismatchedTrees:
    """For each tree the same prompt with as many answers to other prompts.

    Each answer gets one that belongs to another first user turn, drawn from all of them alike. The draw is a function
    of the seed and the epoch, for the whole data at once: it doesn't depend on batches, ranks or processes.

    Args:
        rows: The trees.
        seed: Seed of the draw.
        limit: Maximum number of tokens of a prompt with an answer. A longer mismatched answer is cut.
        each_epoch: Draw anew in each epoch; otherwise the first epoch's draw serves for all.
    """

    def __init__(self, rows: JoinedRows, seed: int, limit: int, each_epoch: bool) -> None:
        self.rows, self.seed, self.limit, self.each_epoch = rows, seed, limit, each_epoch
        _, self._turns = np.unique(np.array(rows.answers("opening")), return_inverse=True)
        self._drawn: tuple[int, NDArray[np.int64]] | None = None

    @property
    def openings(self) -> int:
        """Number of different first user turns."""
        return int(self._turns.max(initial=-1)) + 1

    def partners(self, epoch: int) -> NDArray[np.int64]:
        """(answers,) the place of each answer's mismatched answer."""
        epoch = epoch if self.each_epoch else 0
        if self._drawn is None or self._drawn[0] != epoch:
            by_turn = np.argsort(self._turns, kind="stable")
            sizes = np.bincount(self._turns)
            starts = np.cumsum(sizes) - sizes
            others = len(by_turn) - sizes[self._turns]
            share = torch.rand(len(by_turn), dtype=torch.float64, generator=generator(self.seed, epoch, _MISMATCH))
            place = np.minimum((share.numpy() * others).astype(np.int64), others - 1)
            place += np.where(place >= starts[self._turns], sizes[self._turns], 0)  # past those with the same turn
            self._drawn = epoch, by_turn[place]
        return self._drawn[1]

    def __call__(self, index: int, epoch: int) -> Tree:
        """A tree's prompt with mismatched answers, in the order of its own."""
        prompt = self.rows.row(index)["prompt"]
        room = self.limit - len(prompt)
        found = [self.rows.answer(int(place)) for place in self.partners(epoch)[self._places(index)]]
        return Tree(prompt, [Branch(row["answer"][:room], row["scored"][:room]) for row in found])

    def _places(self, index: int) -> slice:
        return slice(int(self.rows.ends[index]), int(self.rows.ends[index + 1]))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_drawn": None}


class MismatchedRows:
    """The mismatches of an epoch: index to tree.

    Args:
        trees: Makes them.
        epoch: Number of the epoch.

    Attributes:
        sizes: (trees, ``len(Size.NAMES)``) their sizes as numbers.
        key: A hash of their tokens.
    """

    def __init__(self, trees: MismatchedTrees, epoch: int) -> None:
        self.trees, self.epoch = trees, epoch
        numbers = [self(i).size.numbers for i in range(len(trees.rows))]
        self.sizes = np.array(numbers).reshape(-1, len(Size.NAMES))
        what = f"{trees.rows.key}\0{trees.seed}\0{epoch if trees.each_epoch else 0}\0{trees.limit}"
        self.key = hashlib.sha256(what.encode()).hexdigest()

    def __call__(self, index: int) -> Tree:
        """The tree."""
        return self.trees(index, self.epoch)


@dataclass(frozen=True)
class CollateMismatched:
    """Packs a bin's trees, and beside them their mismatches.

    Attributes:
        mismatched: Makes the mismatches.
    """

    mismatched: MismatchedTrees

    def __call__(self, trees: Sequence[Tree], chosen: Bin) -> PackedBatch:
        """The bin's batch."""
        others = pack_bin([self.mismatched(row, chosen.epoch) for row in chosen.rows], chosen)
        return replace(pack_bin(trees, chosen), mismatched=others)


# --------------------------------------------------------------------------------------------------------- data module


class UnpairedDataModule(TreeDataModule[Unpaired]):
    """Single answers with labels, for KTO.

    Args:
        predict: Rows to score; they need no labels, and may also be conversations of any instruction format or
            preferences. Default: the validation rows.
        threshold: The lowest rating of a good answer, for rows that have a ``rating`` or ``score`` and no label.
        take_apart: Read preferences too: better answers are good, worse ones bad (``docs/data.md`` says what becomes of
            rankings). Otherwise such rows are bad rows.
        max_length: Maximum number of tokens of a prompt with one answer. Longer rows are bad rows. Default: the model's
            context.
        max_answers: Maximum number of answers of one prompt that share a tree. A larger value computes prompts less
            often; the answers of a tree are in one step.
        batch_size: Answers per optimizer step, over all ranks and micro-batches.

    The other arguments are those of :class:`~lightning_rlhf.data.base.TreeDataModule`.

    Attributes:
        origins: For each part, the names (source, language) of the origin numbers in its labels.
    """

    columns: ClassVar[Mapping[str, Any]] = {
        "prompt": [int],
        "answer": [int],
        "scored": [bool],
        "label": int,
        "length": int,
        "names": [str],
        **{name: str for name in ("opening", "together")},
    }
    bundled = "preferences.*.jsonl"
    tree = staticmethod(unpaired_tree)
    tree_rows = staticmethod(preference_rows)
    facts = staticmethod(unpaired_names)

    def __init__(
        self,
        train: Source = BUNDLED,
        val: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        format: str = "auto",
        system: str | None = None,
        threshold: float | None = None,
        take_apart: bool = False,
        max_length: int | None = None,
        max_answers: int = 8,
        on_bad_row: OnBadRow = "raise",
        batch_size: int = 16,
        max_tokens: int | None = None,
        eval_batch_size: int = 16,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_proc: int | None = None,
        num_workers: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streaming_window: int | None = None,
    ) -> None:
        check_arguments(UnpairedDataModule.__init__, locals(), max_answers=Range(1))
        super().__init__(**shared_arguments(locals()))
        self.threshold, self.take_apart, self.max_answers = threshold, take_apart, max_answers
        self.origins: dict[str, list[tuple[str, ...]]] = {}
        self._mismatched: dict[str, MismatchedTrees] = {}

    # ------------------------------------------------------------------------------------------------- rows

    def parse(self, row: Mapping[str, Any], part: str, format: str) -> Unpaired:
        """The row's answers; those to ``predict`` need no labels."""
        return to_unpaired(row, format, self.system, self.threshold, self.take_apart, part != "predict")

    def _convert(self, origin: str, i: int, bad: BadRows) -> Iterator[tuple[str, Unpaired]]:
        return ((where, answer) for where, item in super()._convert(origin, i, bad) for answer in item.apart())

    def reading(self) -> dict[str, Any]:
        """The system prompt, and how labels are found."""
        return {"system": self.system, "threshold": self.threshold, "take_apart": self.take_apart}

    def first_user_turn(self, item: Unpaired) -> str:
        """The first user turn."""
        return item.first_user_turn

    def dump(self, item: Unpaired) -> dict[str, Any]:
        """Messages, the label, and the origin's names."""
        return {
            "prompt": item.prompt,
            "answers": item.answers,
            "options": item.options,
            "label": _LABELS[item.labels[0]],
            "names": [name for name in (item.source, item.lang) if name],
        }

    def encoder(self, limit: int) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
        """:func:`encode_unpaired` with the length limit."""
        return encode_unpaired, {"limit": limit, "stop_ids": self.stop_ids}

    def messages(self, item: Unpaired) -> list[dict[str, str]]:
        """The prompt."""
        return [{"role": m["role"], "content": m["content"]} for m in item.prompt]

    def finish(self, facts: list[Any], part: str) -> Callable[[Mapping[str, Any]], Tree]:
        """Numbers the origins."""
        self.origins[part] = sorted(facts)
        return partial(unpaired_tree, origins={origin: i for i, origin in enumerate(self.origins[part])})

    # ------------------------------------------------------------------------------------------------- trees

    def _tokenized(self, part: str) -> JoinedRows:
        """The part's answers, joined to trees.

        Raises:
            DataError: The training rows have one label, or rows to be mismatched have one first user turn.
        """
        predicts = part == "predict"
        rows = JoinedRows(super()._tokenized(part), predicts, None if predicts else self.max_answers)
        if predicts:
            return rows
        if rows.left_out:
            rank_zero_info(f"{self._part(part)}: {rows.left_out:,} answers in the middle of rankings are left out.")
        good, bad = (int(rows.sizes[:, Size.NAMES.index(name)].sum()) for name in ("good", "bad"))
        if part == "train" and not (good and bad):
            raise DataError(
                f"All {good + bad:,} answers of the train data are {'good' if good else 'bad'}: KTO learns from good "
                "and bad ones. Add rows with the other label, or set data.threshold so that ratings fall on both sides."
            )
        if len(rows) and self._mismatches():
            found = MismatchedTrees(rows, self.seed, self._limit(), each_epoch=part == "train")
            if found.openings == 1:
                raise DataError(
                    f"The {self._part(part)} data have one first user turn alone, so no answer can be mismatched with "
                    "another prompt, which KTO's reference point needs. Add rows with other prompts"
                    f"{'' if part == 'train' else f' to data.{part}, or raise data.val_fraction'}; or set model.loss "
                    "to apo_zero_unpaired, which has no reference point."
                )
            self._mismatched[part] = found
        return rows

    def _mismatches(self) -> bool:
        """Returns whether batches get mismatched answers: if the module reads them, or no module says."""
        return self._module.reads_mismatched if isinstance(self._module, ReadsMismatched) else True

    def every_mismatch(self, part: str, epoch: int) -> PlannedLoader | None:
        """Gives each mismatched answer of an epoch once, as :meth:`every_row` gives rows; None if the part has none.

        Args:
            part: A part that was set up.
            epoch: Number of the epoch.
        """
        if part not in self._mismatched:
            return None
        return self._in_order(MismatchedRows(self._mismatched[part], epoch))

    def _loader(self, part: str, batch_size: int, micro_batches: int, shuffle: bool) -> PlannedLoader:
        loader = super()._loader(part, batch_size, micro_batches, shuffle)
        if part in self._mismatched:
            loader.collate = CollateMismatched(self._mismatched[part])
        return loader


def encode_unpaired(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int, stop_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """One answer's tokens; runs in worker processes."""
    found = encode_answers(row, tokenizer, limit, stop_ids)
    opening = next(message["content"] for message in row["prompt"] if message["role"] == "user").strip()
    return {
        "prompt": found["prompt"],
        "answer": found["answers"][0],
        "scored": found["scored"][0],
        "label": row["label"],
        "length": len(found["prompt"]),
        "names": row["names"],
        "opening": _hash(opening),
        "together": _hash(repr((opening, found["prompt"], row["names"]))),
        "unread": found["unread"],
        "extra_stops": found["extra_stops"],
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
