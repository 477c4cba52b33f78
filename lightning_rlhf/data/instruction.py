"""Instruction data for supervised fine-tuning: rows of any known format as planned, packed batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.checks import check_arguments
from lightning_rlhf.data.base import BUNDLED, TreeDataModule, shared_arguments
from lightning_rlhf.data.formats import Conversation, to_conversation
from lightning_rlhf.data.oasst import instruction_rows
from lightning_rlhf.data.packed import Branch, Tree
from lightning_rlhf.data.sources import OnBadRow, Source
from lightning_rlhf.data.tokens import LossOn, TokenizeError, check_answers, encode, truncate


def instruction_tree(row: Mapping[str, Any]) -> Tree:
    """A tokenized row as a prompt (all before the first scored token) with one completion."""
    ids, scored = row["input_ids"], row["scored"]
    first = scored.index(True)
    return Tree(ids[:first], [Branch(ids[first:], scored[first:])])


class InstructionDataModule(TreeDataModule[Conversation]):
    """Instruction data for supervised fine-tuning.

    Args:
        loss_on: Tokens that the loss reads: those of every ``assistant`` turn, those of the ``last`` one, or ``all``.
        truncate: Cut longer rows at ``max_length`` instead of treating them as bad; a warning tells how many were cut.

    The other arguments are those of :class:`~lightning_rlhf.data.base.TreeDataModule`.
    """

    columns: ClassVar[Mapping[str, Any]] = {"input_ids": [int], "scored": [bool]}
    bundled = "instructions.*.jsonl"
    tree = staticmethod(instruction_tree)
    tree_rows = staticmethod(instruction_rows)

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
        on_bad_row: OnBadRow = "raise",
        batch_size: int = 8,
        max_tokens: int | None = None,
        eval_batch_size: int = 8,
        val_fraction: float = 0.1,
        seed: int = 0,
        num_proc: int | None = None,
        num_workers: int = 0,
        cache_dir: str | os.PathLike[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        streaming_window: int | None = None,
    ) -> None:
        check_arguments(InstructionDataModule.__init__, locals())
        super().__init__(**shared_arguments(locals()))
        self.loss_on, self.truncate = loss_on, truncate

    def parse(self, row: Mapping[str, Any], part: str, format: str) -> Conversation:
        """A conversation or plain text."""
        return to_conversation(row, format, self.system)

    def reading(self) -> dict[str, Any]:
        """The system prompt."""
        return {"system": self.system}

    def first_user_turn(self, item: Conversation) -> str:
        """The first user turn, or the text."""
        return item.first_user_turn

    def dump(self, item: Conversation) -> list[Any]:
        """Messages, text, and what the chat template gets beside them."""
        return [item.messages, item.text, item.options]

    def encoder(self, limit: int) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
        """:func:`encode_instruction`, with what the loss reads and the length limit."""
        arguments = {"loss_on": self.loss_on, "limit": limit, "cut": self.truncate, "stop_ids": self.stop_ids}
        return encode_instruction, arguments

    def messages(self, item: Conversation) -> list[dict[str, str]] | None:
        """The messages before the last answer."""
        if item.messages is None:
            return None
        return [{"role": m["role"], "content": m["content"]} for m in item.messages[:-1]]


def encode_instruction(
    row: list[Any],
    tokenizer: PreTrainedTokenizerBase,
    loss_on: LossOn,
    limit: int,
    cut: bool,
    stop_ids: Sequence[int] = (),
) -> dict[str, Any]:
    """One row's tokens; runs in worker processes."""
    messages, text, options = row
    conversation = Conversation(None if messages is None else tuple(messages), text, options)
    tokens = encode(tokenizer, conversation, loss_on, stop_ids)
    if tokens.extra_stops:
        check_answers(tokenizer, conversation.messages or (), stop_ids)
    length = len(tokens.input_ids)
    if length > limit and not cut:
        reason = f"{length} tokens are over max_length={limit}; raise it, shorten the row, or set truncate: true"
        raise TokenizeError("too long", reason)
    kept = truncate(tokens, limit)
    if kept is None:
        raise TokenizeError("nothing to learn", f"no scored token within max_length={limit}")
    if not any(kept.scored):
        raise TokenizeError("nothing to learn", "the loss reads none of its tokens")
    return {
        "input_ids": kept.input_ids,
        "scored": kept.scored,
        "cut": length > limit,
        "unread": kept.unread,
        "extra_stops": kept.extra_stops,
    }
