"""Generates answers to prompts, or reads them from a file."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data import Message
from lightning_rlhf.data.formats import FormatError
from lightning_rlhf.data.prompt_formats import to_prompt
from lightning_rlhf.data.sources import BadRowError, BadRows, read_rows
from lightning_rlhf.data.templates import set_chat_template, stop_token_ids
from lightning_rlhf.data.tokens import TokenizeError, encode_prompt
from lightning_rlhf.models import Policy, load_causal_lm, load_tokenizer
from lightning_rlhf.models.loading import Dtype, load_stop_token_ids
from lightning_rlhf.rewards.judges import Answer
from lightning_rlhf.rollout import CachedEngine, Sampling, as_answers, complete, room, sample_key

#: Columns that may hold the answer in a file; the first that exists is used.
COLUMNS = ("completion", "answer", "response", "output")
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


# ------------------------------------------------------------------------------------------------------------- models


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
    """Generates a model's answers.

    With the same seed two models sample with the same noise for each prompt. So the same model gives the same answers,
    and the difference of two models varies less.

    Args:
        pretrained: Directory or hub id of a causal LM or of adapters.
        prompts: Prompts by their numbers. The number is part of the sampling's seed.
        sampling: Sampling settings.
        seed: Seed of the sampling.
        tokenizer: Tokenizer to use. Default: the model's tokenizer.
        stop_ids: Tokens that end an answer, in addition to the tokenizer's and the model's.
        chat_template: Preset name, path of a Jinja file, or None for the tokenizer's template.
        dtype: Data type of the weights.
        device: Device on which the model runs.
        batch_size: Number of answers that are generated together. A larger value is faster and takes more memory.
        trust_remote_code: Run code that comes with the model.

    Yields:
        Number and answer of each prompt, in order.

    Raises:
        OSError: The model does not exist or cannot be read.
        ValueError: A prompt cannot be encoded, or fills the model's context; the message says which one.
    """
    try:
        if tokenizer is None:
            tokenizer = load_tokenizer(pretrained, trust_remote_code)
            stop_ids = [*stop_ids, tokenizer.eos_token_id]  # a template may replace it
            needed = chat_template is not None or not all(isinstance(prompt, str) for prompt in prompts.values())
            if needed and set_chat_template(tokenizer, chat_template):
                raise ValueError(f"the model does not know the tokens of chat_template={chat_template!r}.")
        model = load_causal_lm(
            pretrained, dtype=dtype, inference=True, vocab_size=len(tokenizer), trust_remote_code=trust_remote_code
        )
    except OSError as error:
        raise OSError(f"{pretrained} cannot be loaded as a model: {error}") from error
    except ValueError as error:
        raise ValueError(f"{pretrained}: {error}") from error
    policy = Policy(model.requires_grad_(False).to(device), layout="padded")
    encoded = {}
    for i, prompt in prompts.items():
        try:
            encoded[i] = encode_prompt(tokenizer, prompt)
        except TokenizeError as error:
            raise ValueError(f"{pretrained} cannot encode the prompt {prompt_text(prompt)[:40]!r}: {error}.") from error
        if room(policy, encoded[i], 1) < 1:
            raise ValueError(
                f"The prompt {prompt_text(prompt)[:40]!r} has {len(encoded[i])} tokens and fills the context of "
                f"{pretrained}. Shorten it."
            )
    further = [*stop_ids, *load_stop_token_ids(pretrained, trust_remote_code)]
    stops, engine = stop_token_ids(tokenizer, further), CachedEngine()
    numbers = list(encoded)
    for start in range(0, len(numbers), batch_size):
        part = numbers[start : start + batch_size]
        keys = [sample_key(seed, i) for i in part]
        with torch.no_grad():  # must not extend over the yield
            found = complete(engine, policy, tokenizer, [encoded[i] for i in part], keys, sampling, stops)
        answers = as_answers(tokenizer, [prompts[i] for i in part], [[c] for c in found])
        yield from ((i, Answer(c.text, c.truncated)) for i, (c,) in zip(part, answers, strict=True))


# -------------------------------------------------------------------------------------------------------------- files


def names_file(name: str) -> bool:
    """Whether a text is the path of an existing file, or has the suffix of a data file."""
    return os.path.isfile(name) or (not os.path.isdir(name) and name.lower().removesuffix(".gz").endswith(_SUFFIXES))


def read_answers(source: str | os.PathLike[str], prompts: Sequence[list[Message] | str]) -> list[Answer]:
    """Reads answers from a file, such as the files that runs write.

    The answer of a row is the first of :data:`COLUMNS` that it has, or the last turn of its ``messages``. ``truncated``
    or ``ended`` says whether it was cut. If rows have prompts, in any format of prompt data, an answer belongs to the
    equal prompt, or to the only prompt that ends in the same user turn. If a prompt has several answers, the last one
    counts. If rows have no prompts, they must be in the order of ``prompts``.

    Args:
        source: The file, in any format that data modules read.
        prompts: The prompts to find answers for.

    Returns:
        One answer per prompt.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: A row or a prompt has no answer; the message says which one.
    """
    as_text = any(isinstance(prompt, str) for prompt in prompts)
    rows = [(row.where, row.value) for row in read_rows(source, BadRows(skip=None))]
    answers = [_answer(where, row) for where, row in rows]
    found = [_prompt(where, row, as_text) for where, row in rows]
    if not any(found):
        if len(answers) != len(prompts):
            raise ValueError(
                f"{source} has {len(answers)} answers without prompts, but there are {len(prompts)} prompts. Add a "
                "prompt to each row."
            )
        return answers
    for (where, _), prompt in zip(rows, found, strict=True):
        if prompt is None:
            raise BadRowError(where, "no prompt", "the row has no prompt, but other rows have one. Add it.")
    by_prompt = {json.dumps(prompt): answer for prompt, answer in zip(found, answers, strict=True)}
    if twice := len(answers) - len(by_prompt):
        rank_zero_warn(
            f"{source}: {twice} of {len(answers)} answers are left out, because later ones have their prompts."
        )
    # samples.jsonl has only the last turn of a prompt
    by_turn = {prompt_text(p): a for p, a in zip(found, answers, strict=True) if isinstance(p, list) and len(p) == 1}
    only = Counter(prompt_text(json.loads(key)) for key in {json.dumps(prompt) for prompt in prompts})
    matched = []
    for i, prompt in enumerate(prompts):
        answer = by_prompt.get(json.dumps(prompt))
        text = prompt_text(prompt)
        if answer is None and only[text] == 1:
            answer = by_turn.get(text)
        if answer is None:
            raise ValueError(f"{source} has no answer to prompt {i + 1} of {len(prompts)}: {text[:60]!r}. Add one.")
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
            f"{', '.join(COLUMNS[1:])}) or as the last turn of messages."
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


def prompt_text(prompt: Sequence[Message] | str) -> str:
    """Returns the text that represents a prompt: its last turn, or the plain text."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
