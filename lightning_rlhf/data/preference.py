"""Preference data for reward models: pairs and rankings of answers, each prompt once with its answers behind it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.checks import check_arguments
from lightning_rlhf.data.base import BUNDLED, TreeDataModule, shared_arguments
from lightning_rlhf.data.formats import Conversation, Message, to_conversation
from lightning_rlhf.data.oasst import preference_rows
from lightning_rlhf.data.packed import Branch, Pair, Tree
from lightning_rlhf.data.preference_formats import PREFERENCE_FORMATS, Preference, to_preference
from lightning_rlhf.data.sources import OnBadRow, Source
from lightning_rlhf.data.tokens import LAST_ALONE, LossOn, TokenizeError, check_answers, encode, encode_prompt

PairWeight = Literal["pair", "prompt"]


def preference_tree(row: Mapping[str, Any], origins: Mapping[tuple[str, ...], int] | None = None) -> Tree:
    """A tokenized row as its prompt with one branch per answer, and the number of its origin where those are known."""
    branches = [Branch(ids, scored) for ids, scored in zip(row["answers"], row["scored"], strict=True)]
    columns = (row["better"], row["worse"], row["margin"], row["weight"])
    pairs = [Pair(*pair) for pair in zip(*columns, strict=True)]
    return Tree(row["prompt"], branches, pairs=pairs, origin=origins[tuple(row["names"])] if origins else 0)


def preference_names(row: Mapping[str, Any]) -> list[Any]:
    """A tokenized row's origin: source and language."""
    return [row["names"]]


class PreferenceDataModule(TreeDataModule[Preference]):
    """Preference data for reward models.

    Args:
        predict: Rows to score: preferences, or conversations of any instruction format. Default: the validation rows.
        pair_weight: ``pair`` gives every pair the same weight. ``prompt`` gives every prompt the same weight, which its
            pairs share (InstructGPT's loss over rankings).
        use_margin: Give the loss the rows' margins. A row without a margin but with scores gets their difference.
        max_length: Maximum number of tokens of a prompt with one answer. Longer rows are bad rows. Default: the model's
            context.
        batch_size: Answers (two per pair) per optimizer step, over all ranks and micro-batches.

    The other arguments are those of :class:`~lightning_rlhf.data.base.TreeDataModule`.

    Attributes:
        origins: For each part, the names (source, language) of the origin numbers in its pairs.
    """

    columns: ClassVar[Mapping[str, Any]] = {
        "prompt": [int],
        "answers": [[int]],
        "scored": [[bool]],
        **{name: [int] for name in ("better", "worse")},
        **{name: [float] for name in ("margin", "weight")},
        "names": [str],
    }
    bundled = "preferences.*.jsonl"
    tree = staticmethod(preference_tree)
    tree_rows = staticmethod(preference_rows)
    facts = staticmethod(preference_names)

    def __init__(
        self,
        train: Source = BUNDLED,
        val: Source | None = None,
        test: Source | None = None,
        predict: Source | None = None,
        format: str = "auto",
        system: str | None = None,
        pair_weight: PairWeight = "pair",
        use_margin: bool = False,
        max_length: int | None = None,
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
        check_arguments(PreferenceDataModule.__init__, locals())
        super().__init__(**shared_arguments(locals()))
        self.pair_weight, self.use_margin = pair_weight, use_margin
        self.origins: dict[str, list[tuple[str, ...]]] = {}

    def parse(self, row: Mapping[str, Any], part: str, format: str) -> Preference:
        """A preference; for ``predict`` also a conversation, as one answer that is compared with nothing."""
        if part == "predict" and format == "auto" and not _is_preference(row):
            found = to_conversation(row, system=self.system)
            if found.messages is not None:
                prompt, answer = found.messages[:-1], found.messages[-1:]
                return Preference(prompt, (answer,), (), options=found.options, unread=found.unread)
        return to_preference(row, format, self.system)

    def reading(self) -> dict[str, Any]:
        """The system prompt, and the settings of weights and margins."""
        return {"system": self.system, "pair_weight": self.pair_weight, "use_margin": self.use_margin}

    def first_user_turn(self, item: Preference) -> str:
        """The first user turn."""
        return item.first_user_turn

    def dump(self, item: Preference) -> dict[str, Any]:
        """Messages, pairs with their margins and weights, and the origin's names."""
        margins = item.margins or (0.0,) * len(item.pairs)
        if item.margins is None and item.scores is not None:
            margins = tuple(item.scores[better] - item.scores[worse] for better, worse in item.pairs)
        return {
            "prompt": item.prompt,
            "answers": item.answers,
            "options": item.options,
            "better": [better for better, _ in item.pairs],
            "worse": [worse for _, worse in item.pairs],
            "margin": list(margins) if self.use_margin else [0.0] * len(item.pairs),
            "weight": [1.0 if self.pair_weight == "pair" else 1 / len(item.pairs)] * len(item.pairs),
            "names": [name for name in (item.source, item.lang) if name],
        }

    def encoder(self, limit: int) -> tuple[Callable[..., dict[str, Any]], dict[str, Any]]:
        """:func:`encode_preference` with the length limit."""
        return encode_preference, {"limit": limit, "stop_ids": self.stop_ids}

    def messages(self, item: Preference) -> list[dict[str, str]]:
        """The prompt."""
        return [{"role": m["role"], "content": m["content"]} for m in item.prompt]

    def finish(self, facts: list[Any], part: str) -> Callable[[Mapping[str, Any]], Tree]:
        """Numbers the origins."""
        self.origins[part] = sorted(facts)
        return partial(preference_tree, origins={origin: i for i, origin in enumerate(self.origins[part])})


def _is_preference(row: Mapping[str, Any]) -> bool:
    found = PREFERENCE_FORMATS.detect(row)
    return found is not None and found.name != "unpaired"


def encode_preference(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int, stop_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """One row's tokens; runs in worker processes."""
    found = encode_answers(row, tokenizer, limit, stop_ids)
    answers = found["answers"]
    for better, worse in zip(row["better"], row["worse"], strict=True):
        if answers[better] == answers[worse]:
            reason = "two answers of a pair have the same tokens: they differ only in what the chat template trims"
            raise TokenizeError("no difference", f"{reason}, or in a stop token. Remove one of them, or the row")
    return {**found, **{name: row[name] for name in ("better", "worse", "margin", "weight", "names")}}


def encode_answers(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, limit: int, stop_ids: Sequence[int] = ()
) -> dict[str, Any]:
    """The tokens of a prompt and of the answers behind it.

    An answer ends with its stop token, as a sampled completion does. What a template writes behind it (ChatML: a line
    break) is left out, since a reward is read at the last token.

    Args:
        row: ``prompt``, ``answers`` and ``options``.
        tokenizer: With its chat template.
        limit: Maximum number of tokens of the prompt with one answer.
        stop_ids: Further tokens that end an answer.

    Raises:
        TokenizeError: The row can't be trained on.
    """
    messages: list[Message] = row["prompt"]
    answers, scored = [], []
    unread: dict[str, None] = {}
    extra_stops = False
    prompt = encode_prompt(tokenizer, messages, row["options"], stop_ids)
    for answer in row["answers"]:
        # turns of the prompt are not scored: a template may write them differently than when they were the last
        loss_on: LossOn = "last" if len(answer) == 1 else "assistant"
        try:
            tokens = encode(tokenizer, Conversation((*messages, *answer), options=row["options"]), loss_on, stop_ids)
        except TokenizeError as error:
            raise TokenizeError(error.kind, error.reason.replace(LAST_ALONE, "")) from error
        unread.update(dict.fromkeys(tokens.unread))
        if tokens.extra_stops:
            check_answers(tokenizer, (*messages, *answer), stop_ids)
            extra_stops = True
        end = max(i for i, read in enumerate(tokens.scored) if read) + 1
        if tokens.input_ids[: len(prompt)] != prompt:
            reason = "the chat template writes the prompt differently once an answer follows"
            raise TokenizeError("prompt changes", f"{reason}, so answers can't share it")
        answers.append(tokens.input_ids[len(prompt) : end])
        scored.append(tokens.scored[len(prompt) : end])
    longest = len(prompt) + max(map(len, answers))
    if longest > limit:
        reason = f"{longest} tokens are over max_length={limit}; raise it, or shorten the row"
        raise TokenizeError("too long", reason)
    tokens_of = {"prompt": prompt, "answers": answers, "scored": scored}
    return {**tokens_of, "unread": list(unread), "extra_stops": extra_stops}
