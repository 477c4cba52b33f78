"""Answers to prompts: by a model, or from a file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.formats import FormatError, Message
from lightning_rlhf.data.prompt_formats import to_prompt
from lightning_rlhf.data.sources import BadRowError, BadRows, read_rows
from lightning_rlhf.data.templates import set_chat_template, stop_token_ids
from lightning_rlhf.data.tokens import TokenizeError, encode_prompt
from lightning_rlhf.evaluation.judges import Answer
from lightning_rlhf.models import Policy, load_causal_lm, load_tokenizer
from lightning_rlhf.models.backbone import Backbone
from lightning_rlhf.models.loading import Dtype, load_stop_token_ids
from lightning_rlhf.rollout import CachedEngine, Completion, Request, RolloutEngine, Sampling, as_answers, sample_key

#: Columns in which a file may have an answer, in the order in which they are tried.
COLUMNS = ("completion", "answer", "response", "output")
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class Refuse(BadRows):
    """No row is skipped."""

    def add(self, where: str, kind: str, reason: str) -> NoReturn:
        """Raises."""
        raise BadRowError(where, kind, f"{reason}.")


# ------------------------------------------------------------------------------------------------------------- models


def room(policy: Backbone, prompt: Sequence[int], most: int) -> int:
    """Tokens that the model's context leaves for an answer, at most so many."""
    context = getattr(policy.transformer.config.get_text_config(), "max_position_embeddings", None)
    return most if context is None else min(most, context - len(prompt))


def complete(
    engine: RolloutEngine,
    policy: Backbone,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    sampling: Sampling,
    stop_token_ids: Sequence[int],
) -> list[Completion]:
    """A completion of each prompt, which ends where the model's context does.

    Args:
        engine: What samples.
        policy: A backbone whose model can generate.
        tokenizer: The model's.
        prompts: Token ids of each; they leave room for a token.
        keys: Of each completion; see :class:`~lightning_rlhf.rollout.Request`.
        sampling: How to draw.
        stop_token_ids: Tokens that end a completion.

    Returns:
        One a prompt, in order.

    Raises:
        ValueError: A prompt that fills the context.
    """
    by_limit: dict[int, list[int]] = {}
    for i, ids in enumerate(prompts):
        by_limit.setdefault(room(policy, ids, sampling.max_new_tokens), []).append(i)
    found: dict[int, Completion] = {}
    for limit, rows in by_limit.items():
        if limit < 1:
            raise ValueError(
                f"Prompt {rows[0]} has {len(prompts[rows[0]])} tokens and fills the model's context: shorten it."
            )
        requests = [Request(prompts[i], [keys[i]]) for i in rows]
        limited = replace(sampling, max_new_tokens=limit)
        groups = engine.generate(policy, tokenizer, requests, limited, stop_token_ids)
        found |= {i: completion for i, [completion] in zip(rows, groups, strict=True)}
    return [found[i] for i in range(len(prompts))]


def generate_answers(
    pretrained: str | os.PathLike[str],
    prompts: Mapping[int, list[Message] | str],
    sampling: Sampling,
    seed: int = 0,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_ids: Sequence[int] = (),
    chat_template: str | None = None,
    dtype: Dtype = "float32",
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    trust_remote_code: bool = False,
) -> Iterator[tuple[int, Answer]]:
    """Answers of a model.

    Models that are given the same seed draw by the same noise, prompt by prompt: the same model gives the same answers,
    and the difference of two models varies less.

    Args:
        pretrained: Directory or hub id of a causal LM, or of adapters.
        prompts: By number, which keys the sampling.
        sampling: How to draw.
        seed: Of the sampling.
        tokenizer: Default: the model's.
        stop_ids: Tokens that end an answer besides those of the tokenizer and of the model.
        chat_template: Preset name, path of a Jinja file, or None for the tokenizer's own.
        dtype: Of the weights.
        device: Where the model runs.
        batch_size: Answers in the making at a time.
        trust_remote_code: Run code that comes with the model.

    Yields:
        Number and answer of each prompt, in order.

    Raises:
        OSError: Nothing is there.
        ValueError: A prompt that can't be encoded, or that fills the model's context; the message says which.
    """
    try:
        if tokenizer is None:
            tokenizer = load_tokenizer(pretrained, trust_remote_code)
            stop_ids = [*stop_ids, tokenizer.eos_token_id]  # which a template may replace
            needed = chat_template is not None or not all(isinstance(prompt, str) for prompt in prompts.values())
            if needed and set_chat_template(tokenizer, chat_template):
                raise ValueError(f"the model does not know the tokens of chat_template={chat_template!r}.")
        model = load_causal_lm(pretrained, dtype=dtype, vocab_size=len(tokenizer), trust_remote_code=trust_remote_code)
    except OSError as error:
        raise OSError(f"{pretrained} can't be loaded as a model: {error}") from error
    except ValueError as error:
        raise ValueError(f"{pretrained}: {error}") from error
    policy = Policy(model.requires_grad_(False).to(device), layout="padded")
    encoded = {}
    for i, prompt in prompts.items():
        try:
            encoded[i] = encode_prompt(tokenizer, prompt)
        except TokenizeError as error:
            raise ValueError(f"{pretrained} can't read the prompt {shown(prompt)[:40]!r}: {error}.") from error
        if room(policy, encoded[i], 1) < 1:
            raise ValueError(
                f"The prompt {shown(prompt)[:40]!r} has {len(encoded[i])} tokens and fills the context of {pretrained}."
            )
    further = [*stop_ids, *load_stop_token_ids(pretrained, trust_remote_code)]
    stops, engine = stop_token_ids(tokenizer, further), CachedEngine()
    numbers = list(encoded)
    for start in range(0, len(numbers), batch_size):
        part = numbers[start : start + batch_size]
        keys = [sample_key(seed, i) for i in part]
        with torch.no_grad():  # not around what is yielded to
            found = complete(engine, policy, tokenizer, [encoded[i] for i in part], keys, sampling, stops)
        answers = as_answers(tokenizer, [prompts[i] for i in part], [[c] for c in found])
        yield from ((i, Answer(c.text, c.truncated)) for i, (c,) in zip(part, answers, strict=True))


# -------------------------------------------------------------------------------------------------------------- files


def names_file(name: str) -> bool:
    """Whether a text is a file that is there, or by its suffix looks like one with rows."""
    return os.path.isfile(name) or (not os.path.isdir(name) and name.lower().removesuffix(".gz").endswith(_SUFFIXES))


def read_answers(source: str | os.PathLike[str], prompts: Sequence[list[Message] | str]) -> list[Answer]:
    """Answers from a file, such as runs write.

    A row's answer is in the first of :data:`COLUMNS` that it has, or the last turn of its ``messages``; ``truncated``
    or ``ended`` says whether it was cut. Where rows have prompts, in any format that prompt data may have, an answer
    belongs to the prompt that is the same, or to the only one that ends in the same user turn; of several the last
    counts. Without, rows are in the order of the prompts.

    Args:
        source: The file, of any kind that data modules read.
        prompts: What is answered.

    Returns:
        An answer each.

    Raises:
        FileNotFoundError: It isn't there.
        ValueError: A row without an answer, or a prompt without one; the message says which.
    """
    as_text = any(isinstance(prompt, str) for prompt in prompts)
    rows = [(row.where, row.value) for row in read_rows(source, Refuse())]
    answers = [_answer(where, row) for where, row in rows]
    found = [_prompt(where, row, as_text) for where, row in rows]
    if not any(found):
        if len(answers) != len(prompts):
            raise ValueError(
                f"{source} has {len(answers)} answers and no prompts, and there are {len(prompts)} prompts. Give each "
                "row its prompt."
            )
        return answers
    for (where, _), prompt in zip(rows, found, strict=True):
        if prompt is None:
            raise BadRowError(where, "no prompt", "the row has no prompt, and others have one.")
    by_prompt = {json.dumps(prompt): answer for prompt, answer in zip(found, answers, strict=True)}
    if twice := len(answers) - len(by_prompt):
        rank_zero_warn(f"{source}: {twice} of {len(answers)} answers were left out for later ones to the same prompts.")
    # samples.jsonl has the last turn of a prompt alone
    by_turn = {shown(p): a for p, a in zip(found, answers, strict=True) if isinstance(p, list) and len(p) == 1}
    only = Counter(shown(json.loads(key)) for key in {json.dumps(prompt) for prompt in prompts})
    matched = []
    for i, prompt in enumerate(prompts):
        answer = by_prompt.get(json.dumps(prompt))
        if answer is None and only[shown(prompt)] == 1:
            answer = by_turn.get(shown(prompt))
        if answer is None:
            raise ValueError(f"{source} has no answer to prompt {i + 1} of {len(prompts)}: {shown(prompt)[:60]!r}.")
        matched.append(answer)
    return matched


def _answer(where: str, row: Mapping[str, Any]) -> Answer:
    texts = [row[name] for name in COLUMNS if isinstance(row.get(name), str)]
    turns = row.get("messages")
    if not texts and isinstance(turns, list) and turns and isinstance(turns[-1], dict):
        texts = [turns[-1].get("content")] if turns[-1].get("role") == "assistant" else []
    if not texts or not isinstance(texts[0], str):
        raise BadRowError(
            where, "no answer", f"the row has no answer. Write it as a text in the column {COLUMNS[0]!r} (or "
            f"{', '.join(COLUMNS[1:])}), or as the last turn of messages."
        )  # fmt: skip
    return Answer(texts[0], bool(row.get("truncated", row.get("ended") is False)))


def _prompt(where: str, row: Mapping[str, Any], as_text: bool) -> list[Message] | str | None:
    try:
        prompt = to_prompt(row, as_text=as_text).prompt
    except FormatError as error:
        if error.kind == "unknown format":
            return None
        raise BadRowError(where, error.kind, f"{error}.") from error
    return prompt if isinstance(prompt, str) else [Message(role=m["role"], content=m["content"]) for m in prompt]


def shown(prompt: Sequence[Message] | str) -> str:
    """What is shown of a prompt: its last turn."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
