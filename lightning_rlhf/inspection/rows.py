"""The content of a stage's batches, read from the batches themselves."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Literal

import lightning.pytorch as L
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data import PackedBatch, PlannedLoader, PromptBatch
from lightning_rlhf.data.base import TreeDataModule
from lightning_rlhf.data.prompts import PromptsWith
from lightning_rlhf.data.token_cache import TokenRows
from lightning_rlhf.inspection.pieces import TokenPiece, pieces, special_ids
from lightning_rlhf.inspection.prompts import batch_of, place_of, read_prompts
from lightning_rlhf.inspection.statistics import Statistics, measure
from lightning_rlhf.protocols import DrawsSamples
from lightning_rlhf.stages import RewardModule

Split = Literal["train", "val", "test", "predict"]
#: The Trainer's stage that reads a split.
STAGES = {"train": "fit", "val": "validate", "test": "test", "predict": "predict"}


@dataclass
class AnswerView:
    """A branch of a tree.

    Attributes:
        name: Its name: ``chosen``, ``rejected``, ``answer 2``.
        pieces: Its tokens.
        notes: Further remarks.
    """

    name: str
    pieces: list[TokenPiece]
    notes: list[str] = field(default_factory=list)


@dataclass
class RowView:
    """A row as it is in its batch.

    Attributes:
        number: Its number in the split, as in ``PackedBatch.rows`` and the records of ``predict``.
        where: Its place, such as file and line.
        notes: Remarks on the whole row.
        prompt: The tokens of its prompt.
        answers: The answers; none for a prompt of PPO.
        starts: Remark at the place where generation starts; empty if there is no generation.
        columns: Other columns, for reward functions.
    """

    number: int
    where: str
    notes: list[str]
    prompt: list[TokenPiece]
    answers: list[AnswerView]
    starts: str = ""
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass
class Section:
    """Rows of one kind: a stage's own, or the texts beside PPO's prompts.

    Attributes:
        name: Heading.
        rows: The rows to show.
        statistics: Statistics of all rows.
    """

    name: str
    rows: list[RowView]
    statistics: Statistics


@dataclass
class Inspection:
    """The result of an inspection.

    Attributes:
        title: The stage, its data and split.
        legend: What the marked tokens are; empty if there are none.
        sections: One section, or one more for each of ``ptx`` and ``pairs``.
    """

    title: str
    legend: str
    sections: list[Section]


def inspect_data(
    module: L.LightningModule,
    data: L.LightningDataModule,
    split: Split = "train",
    rows: int = 5,
    row: int | str | None = None,
    seed: int | None = None,
    micro_batches: int = 1,
    ranks: int = 1,
) -> Inspection:
    """Shows the rows that a stage will get. No model is loaded.

    Args:
        module: The stage.
        data: Its data module.
        split: ``train``, ``val``, ``test`` or ``predict``.
        rows: Number of rows to show.
        row: Show only this row: its number, or its place such as ``my.jsonl:17``.
        seed: Show rows drawn with this seed; None shows the first rows.
        micro_batches: ``trainer.accumulate_grad_batches``; the plan depends on it.
        ranks: Data-parallel size; the plan depends on it.

    Returns:
        The rows, and statistics of the whole split.

    Raises:
        ValueError: The data module is not one of this package, there is no such row, or the split has no rows.
        BadRowError: A row can't be used, and ``on_bad_row`` is ``raise``.
    """
    if not isinstance(data, TreeDataModule):
        raise ValueError(f"inspect needs a data module of lightning_rlhf, and {type(data).__name__} is none.")
    with _attached(module, data, split, micro_batches, ranks):
        data.setup(STAGES[split])
        loader = getattr(data, f"{split}_dataloader")()
        assert not isinstance(loader, list)  # setup refuses a split without rows
        parts: list[tuple[str, TreeDataModule[Any], PlannedLoader]] = [("", data, loader)]
        if isinstance(loader, PromptsWith):
            beside = vars(data)["beside"]
            parts = [("prompts", data, loader.prompts), *((k, beside[k], v) for k, v in loader.beside.items())]
        sections = []
        for name, part, planned in parts:
            languages = part.languages(split)
            chosen = _chosen(module, planned.rows, rows, row, seed)  # type: ignore[arg-type]
            views = [_view(module, part.tokenizer, planned, i, languages) for i in chosen]
            sections.append(Section(name, views, measure(module, part, planned, split, languages)))
    kind = type(module).__name__.removesuffix("Module") or type(module).__name__
    reads = "an answer is scored here" if _scores_answers(module) else "read by the loss"
    if all(not row.answers for section in sections for row in section.rows):
        reads = ""
    return Inspection(f"{kind}: {type(data).__name__}, {split}", reads, sections)


@contextmanager
def _attached(
    module: L.LightningModule, data: TreeDataModule[Any], split: Split, micro_batches: int, ranks: int
) -> Iterator[None]:
    """Gives the data module for a while what it needs from a Trainer."""
    before, beside = data.trainer, vars(data).get("beside", {})
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        lightning_module=module,
        accumulate_grad_batches=micro_batches,
        distributed_sampler_kwargs={"num_replicas": ranks, "rank": 0},
        state=SimpleNamespace(fn=STAGES[split]),
    )
    try:
        yield
    finally:
        data.trainer = before
        for own in beside.values():
            own.trainer = before


def _scores_answers(module: L.LightningModule) -> bool:
    """Whether the loss reads one score at each answer's last token."""
    return isinstance(module, RewardModule)


# --------------------------------------------------------------------------------------------------------------- rows


def _view(
    module: L.LightningModule,
    tokenizer: PreTrainedTokenizerBase,
    loader: PlannedLoader,
    number: int,
    languages: Mapping[str, str],
) -> RowView:
    """Shows one row, from a batch of its own."""
    rows: TokenRows = loader.rows  # type: ignore[assignment]
    batch = batch_of(loader, [number])
    view = (_prompt if isinstance(batch, PromptBatch) else _tree)(module, tokenizer, batch)
    record = rows.row(number)
    view.number, view.where = number, place_of(module, record["where"])
    if language := languages.get(record["where"]):
        view.notes.append(language)
    if record["cut"]:
        view.notes.append("cut at max_length: the loss never reads its stop token")
    return view


def _chosen(
    module: L.LightningModule, rows: TokenRows, count: int, row: int | str | None, seed: int | None
) -> Sequence[int]:
    if row is None:
        count = min(count, len(rows))
        return range(count) if seed is None else sorted(random.Random(seed).sample(range(len(rows)), count))
    if isinstance(row, int) or row.isdigit():
        if not 0 <= int(row) < len(rows):
            raise ValueError(f"There is no row {row}: the split has {len(rows)}, numbered from 0.")
        return [int(row)]
    places = [place_of(module, where) for where in rows.column("where")]
    found = [i for i, where in enumerate(places) if where == row or where.endswith(f"/{row}")]
    if not found:
        raise ValueError(
            f"No row of this split comes from {row!r}: it may be in another split, or left out. Places look like "
            f"{places[0]!r}."
        )
    return found


def scored_tokens(batch: PackedBatch) -> list[int]:
    """(N,) index into T of each scored token: it follows its predictor, or is the first of its branch."""
    starts = [branch.start for _, branches in batch.forest.trees for branch in branches]
    return [
        predictor + 1 if predictor >= starts[sequence] else starts[sequence]
        for predictor, sequence in zip(batch.predictor.tolist(), batch.sequence.tolist(), strict=True)
    ]


def _tree(module: L.LightningModule, tokenizer: PreTrainedTokenizerBase, batch: PackedBatch) -> RowView:
    """Shows a batch of one tree."""
    specials = special_ids(tokenizer)
    read = set(batch.last.tolist() if _scores_answers(module) else scored_tokens(batch))
    marks = [i in read for i in range(batch.num_tokens)]
    ids = batch.input_ids.tolist()
    [(prompt, branches)] = batch.forest.trees
    shown = list(pieces(tokenizer, ids[: prompt.length], marks[: prompt.length], specials))
    answers = []
    for branch in branches:
        own = slice(branch.start, branch.start + branch.length)
        answers.append(AnswerView("", list(pieces(tokenizer, ids[own], marks[own], specials, shown))))
    _name(answers, batch)
    return RowView(0, "", [f"{len(ids)} tokens", f"{len(read)} read by the loss"], shown, answers)


def _name(answers: list[AnswerView], batch: PackedBatch) -> None:
    """Names the answers, and notes which are good and which are better than which."""
    pairs = list(zip(*(column.tolist() for column in batch.pairs[:4]), strict=True))
    names = [f"answer {i}" if len(answers) > 1 else "answer" for i in range(len(answers))]
    if len(answers) == 2 and len(pairs) == 1:
        names[pairs[0][0]], names[pairs[0][1]] = "chosen", "rejected"
    for answer, name in zip(answers, names, strict=True):
        answer.name = name
    for i, good in zip(batch.labels.sequence.tolist(), batch.labels.good.tolist(), strict=True):
        answers[i].notes.append("good" if good else "bad")
    for better, worse, margin, weight in pairs:
        by = f" by a margin of {margin:g}" if margin else ""
        weighs = f", weight {weight:.3g}" if weight != 1 else ""
        answers[better].notes.append(f"better than {names[worse]}{by}{weighs}")


def _prompt(module: L.LightningModule, tokenizer: PreTrainedTokenizerBase, batch: PromptBatch) -> RowView:
    """Shows a batch of one prompt."""
    [ids] = read_prompts(module, batch)
    shown = list(pieces(tokenizer, ids, [False] * len(ids), special_ids(tokenizer)))
    starts = "generation starts here"
    if isinstance(module, DrawsSamples):
        count, most = module.samples_per_prompt, module.sampling.max_new_tokens
        starts += f": {'a completion' if count == 1 else f'{count} completions'} of at most {most} tokens"
    columns = {name: value for name, (value,) in batch.columns.items()}
    return RowView(0, "", [f"{len(ids)} tokens"], shown, [], starts, columns)
