"""Calibration rows and held-out rows, from any file that the data modules read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lightning_rlhf.data import Branch, Conversation, InstructionDataModule, Message, Tree
from lightning_rlhf.data.errors import DataError
from lightning_rlhf.data.formats import FORMATS, FormatError
from lightning_rlhf.data.preference_formats import PREFERENCE_FORMATS, to_preference
from lightning_rlhf.data.prompt_formats import PROMPT_FORMATS, to_prompt
from lightning_rlhf.data.sources import OnBadRow, Source
from lightning_rlhf.data.tokens import TokenizeError, encode
from lightning_rlhf.models.loading import load_config
from lightning_rlhf.quantize.grid import blocks_of, linear_layers, weight_of
from lightning_rlhf.utils.random import generator

TOKENS_PER_INPUT = 4
"""Calibration tokens that a layer needs per input. With fewer, GPTQ fits the noise of its Hessian and loses to plain
rounding."""
FOREIGN = 3.0
"""The perplexity of the calibration text may be this many times that of the held-out rows before there is a warning."""
_UNANSWERED = ("last turn not assistant", "no assistant turn")


class Rows(NamedTuple):
    """Rows of token ids, each a 1-D int64 tensor of at least two tokens.

    Attributes:
        calibration: What quantizers see.
        held_out: What quality is measured on. None has the first user turn of a calibration row.
    """

    calibration: list[Tensor]
    held_out: list[Tensor]


def read_rows(
    data: Source,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    *,
    held_out: Source | None = None,
    max_rows: int = 512,
    max_held_out: int = 128,
    held_out_share: float = 0.1,
    seed: int = 0,
    on_bad_row: OnBadRow = "raise",
) -> Rows:
    """Reads calibration rows and held-out rows.

    Conversations and plain texts are taken whole, preferences with their best answer, prompts without an answer. The
    tokenizer's chat template renders them.

    Args:
        data: Files, globs, a hub id, rows in memory, or ``bundled``: all rows that come with the package
            except the seeds.
        tokenizer: The model's tokenizer.
        context: Maximum number of tokens per row. Longer rows are bad rows.
        held_out: Held-out rows. Default: a share of ``data``, drawn by the first user turn.
        max_rows: Maximum number of calibration rows, drawn at random. More rows give better weights and take longer.
        max_held_out: Maximum number of held-out rows, drawn at random. More rows give exacter figures.
        held_out_share: Share of ``data`` to hold out, if ``held_out`` is not given.
        seed: Seed of what is held out and drawn.
        on_bad_row: ``raise`` stops at the first bad row and names file and line. ``skip`` leaves bad rows out and
            reports their number by reason.

    Raises:
        DataError: A row can't be used, or there is no calibration row or no held-out row.
        FileNotFoundError: A file does not exist.
        ValueError: Rows have messages, and the tokenizer has no chat template.
    """
    texts = _Texts(
        data,
        val=held_out,
        max_length=context,
        on_bad_row=on_bad_row,
        val_fraction=0.0 if held_out is not None else held_out_share,
        seed=seed,
        tokenizer=tokenizer,
    )
    texts.setup("fit")
    calibration, apart = (texts.rows(part) for part in ("train", "val"))
    if not apart:
        raise DataError(f"{texts.none_held_out()} Give more rows, or other rows as --held-out.")
    openings = {opening for opening, _ in apart}
    kept = [row for row in calibration if row[0] not in openings]
    if not kept:
        raise DataError("Every calibration row has the first user turn of a held-out row. Give other rows.")
    if dropped := len(calibration) - len(kept):
        rank_zero_warn(
            f"{dropped} of {len(calibration)} calibration rows have the first user turn of a held-out row: left out."
        )
    return Rows(_draw(kept, max_rows, seed), _draw(apart, max_held_out, seed))


def shapes_of(source: str | os.PathLike[str], trust_remote_code: bool = False) -> PreTrainedModel:
    """Builds a model without weights, for checks of shapes.

    Args:
        source: Directory or hub id of a model or of adapters.
        trust_remote_code: Run code that comes with the model.
    """
    config = load_config(source, trust_remote_code)
    with torch.device("meta"):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))


def check_tokens(rows: Sequence[Tensor], model: PreTrainedModel) -> None:
    """Checks that there are enough calibration tokens for a model's widest layer. It needs no weights, only shapes.

    Args:
        rows: Calibration rows.
        model: The model to quantize.

    Raises:
        DataError: There are fewer than ``TOKENS_PER_INPUT`` tokens per input. The message says how many more it needs.
    """
    name, blocks = blocks_of(model)
    widths = {f"{name}.{part}": weight_of(layer).shape[1] for part, layer in linear_layers(blocks).items()}
    layer, inputs = max(widths.items(), key=lambda item: item[1])
    found, needed = sum(map(len, rows)), TOKENS_PER_INPUT * inputs
    if found < needed:
        raise DataError(
            f"{found:,} calibration tokens are too few for {layer} with {inputs:,} inputs, which needs "
            f"{TOKENS_PER_INPUT} per input: {needed - found:,} more are needed. Give more rows as --data, or use rtn, "
            "which needs none."
        )


def check_text(calibration: float, held_out: float) -> None:
    """Warns if the model knows the calibration text much less well than the held-out rows.

    Args:
        calibration: The unquantized model's perplexity on the calibration rows.
        held_out: Its perplexity on the held-out rows.
    """
    if calibration > FOREIGN * held_out:
        rank_zero_warn(
            f"The model's perplexity is {calibration:.4g} on the calibration text and {held_out:.4g} on the held-out "
            "rows. Weights are fitted to the calibration text: give text like that which the model will read, in its "
            "language and with its chat template."
        )


def _draw(rows: Sequence[tuple[str, list[int]]], most: int, seed: int) -> list[Tensor]:
    order = torch.randperm(len(rows), generator=generator(seed)).tolist()
    return [torch.tensor(rows[i][1]) for i in order[:most]]


# -------------------------------------------------------------------------------------------------------- data module


def _text_tree(row: Mapping[str, Any]) -> Tree:
    return Tree(row["input_ids"][:1], [Branch(row["input_ids"][1:])])


class _Texts(InstructionDataModule):
    """Rows of all data modules as texts of which every token is read: ``val`` is held out of ``train``."""

    columns: ClassVar[Mapping[str, Any]] = {"input_ids": [int], "opening": str}
    bundled = "[!s]*.jsonl"  # without the seeds: the figures in docs/quantize.md are of these rows
    tree = staticmethod(_text_tree)

    def parse(self, row: Mapping[str, Any], part: str, format: str) -> Conversation:
        """A conversation; of a preference that with the best answer, of a prompt the turns before the answer."""
        preference = PREFERENCE_FORMATS.detect(row)
        if preference is not None and preference.name != "unpaired":
            found = to_preference(row)
            return Conversation((*found.prompt, *found.answers[0]), options=found.options, unread=found.unread)
        try:
            return super().parse(row, part, format)
        except FormatError as error:
            unanswered = FORMATS.detect(row) is None or error.kind in _UNANSWERED
            if not unanswered or PROMPT_FORMATS.detect(row) is None:
                raise
        made = to_prompt(row)
        assert not isinstance(made.prompt, str)
        return Conversation(made.prompt, unread=made.unread)

    def dump(self, item: Conversation) -> list[Any]:
        """Messages without weights, text, what the chat template gets beside them, and the first user turn."""
        turns = item.messages and [{k: v for k, v in turn.items() if k != "weight"} for turn in item.messages]
        return [turns, item.text, item.options, item.first_user_turn]

    def encoder(self, limit: int) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
        """:func:`_encode_text` with the length limit."""
        return _encode_text, {"limit": limit}

    def rows(self, part: str) -> list[tuple[str, list[int]]]:
        """First user turn and token ids of a part's rows."""
        rows = self._rows[part]
        return list(zip(rows.column("opening"), rows.column("input_ids"), strict=True))

    def none_held_out(self) -> str:
        """Why there are no held-out rows."""
        return self._none_held_out()

    def _part(self, part: str) -> str:
        return {"train": "calibration", "val": "held-out"}[part]

    def _check_validation(self) -> None:
        """Leaves it to :func:`read_rows` to say that nothing is held out."""


def _encode_text(row: list[Any], tokenizer: PreTrainedTokenizerBase, limit: int) -> dict[str, Any]:
    """One row's tokens; runs in worker processes."""
    messages: list[Message] | None
    messages, text, options, opening = row
    conversation = Conversation(None if messages is None else tuple(messages), text, options)
    ids = encode(tokenizer, conversation, "all").input_ids
    if len(ids) > limit:
        raise TokenizeError("too long", f"{len(ids)} tokens are over the model's context of {limit}")
    return {"input_ids": ids, "opening": opening}
