"""Inputs and outputs of all rollout engines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_rlhf.checks import check_arguments
from lightning_rlhf.data import Message
from lightning_rlhf.data.templates import answer_lead
from lightning_rlhf.models.backbone import Backbone


@dataclass(frozen=True)
class Sampling:
    """Settings of how completions are sampled.

    Args:
        max_new_tokens: Maximum number of tokens per completion, its stop token included. A larger value allows longer
            completions and takes more memory.
        min_new_tokens: Number of tokens before which a completion cannot stop: stop tokens have probability 0, and
            stop strings are ignored. A larger value forces longer completions.
        temperature: The logits are divided by it. A larger value samples more diverse tokens; 0 is greedy.
        top_k: Sample from this many of the likeliest tokens. A larger value samples more diverse tokens; 0: off.
        top_p: Sample from the smallest set of likeliest tokens whose probabilities add up to this, after ``top_k``. A
            larger value samples more diverse tokens; 1: off.
        min_p: Sample only from tokens that are at least this many times as likely as the likeliest one. A larger value
            samples less diverse tokens; 0: off.
        repetition_penalty: Penalty on tokens that the prompt or the completion already has, as in transformers. A
            larger value avoids repetition more; 1: off.
        presence_penalty: Number that is subtracted from the logits of tokens that the completion already has, as in
            OpenAI's API. A larger value avoids repetition more; 0: off.
        frequency_penalty: The same number for each time that the completion has the token.
        logit_bias: Numbers that are added to the logits of single tokens, by token id.
        stop_strings: Texts that end a completion and are removed from its text. They may contain special tokens, such
            as ``<|im_end|>``.

    Raises:
        ValueError: A setting is out of range; the message says which.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop_strings, str):
            raise ValueError(f"sampling.stop_strings must be a list of texts; write [{self.stop_strings!r}].")
        object.__setattr__(self, "stop_strings", tuple(self.stop_strings))  # YAML brings a list
        check_arguments(Sampling, vars(self), "sampling.")
        positive = self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)
        for name, right, rule in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("min_new_tokens", 0 <= self.min_new_tokens <= self.max_new_tokens, "between 0 and max_new_tokens"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0 (0 is greedy)"),
            ("top_k", self.top_k >= 0, "at least 0 (0 is off)"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (1 is off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("repetition_penalty", positive, "above 0 (1 is off)"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number (0 is off)"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number (0 is off)"),
            ("logit_bias", _is_bias(self.logit_bias), "finite numbers by token id"),
            ("stop_strings", all(self.stop_strings), "texts of at least one character"),
        ):
            if not right:
                raise ValueError(f"sampling.{name} must be {rule}; got {getattr(self, name)!r}.")


def _is_bias(given: Mapping[int, float]) -> bool:
    return all(isinstance(i, int) and i >= 0 and math.isfinite(value) for i, value in given.items())


@dataclass(frozen=True)
class Request:
    """A prompt, and one key per completion to sample.

    Args:
        prompt: Token ids, at least one.
        keys: Seeds, one per completion. A completion depends on (weights, prompt, key, sampling) only.
        alternatives: Number of likeliest tokens to report beside each sampled token.
        adapter: peft's name of the adapter to use, or ``__base__`` for none; in a session, requests with different
            adapters share a batch. None: the active adapter.
        max_new_tokens: Maximum number of tokens per completion, at least 1, in place of ``sampling.max_new_tokens``.
    """

    prompt: Sequence[int]
    keys: Sequence[int]
    alternatives: int = 0
    adapter: str | None = None
    max_new_tokens: int | None = None


class Token(NamedTuple):
    """A token of a completion.

    Attributes:
        id: The token's id.
        logprob: Its log-prob; see :class:`Completion`.
        alternatives: The likeliest tokens of this step with their log-probs, the likeliest first.
        text: The new text that can be shown. It may be empty, and it may belong to earlier tokens.
    """

    id: int
    logprob: float
    alternatives: Sequence[tuple[int, float]] = ()
    text: str = ""


class Episode(NamedTuple):
    """What policy and environment said to each other in a completion of several turns.

    Attributes:
        prompt: Token ids of what the environment began with.
        opening: The messages that it began with.
        turns: The messages that followed, in order; the policy's have the role ``assistant``.
        sampled: For each of the completion's tokens, whether the policy sampled it.
        reward: Sum of the environment's rewards.
    """

    prompt: list[int]
    opening: list[Message]
    turns: list[Message]
    sampled: list[bool]
    reward: float


class Completion(NamedTuple):
    """A sampled completion.

    Attributes:
        input_ids: The sampled tokens, the stop token included; in an episode also the tokens of the environment.
        logprobs: Log-prob of each sampled token: log-softmax of ``logits / temperature`` (temperature 1 if greedy), in
            fp32, before top-k, top-p, min-p, penalties, biases and minimum length.
        text: Text of the tokens after the prompt, without special tokens, and cut before a stop string. In an episode:
            the texts of its turns, each on a line of its own, those of the environment behind their role in brackets.
        finish_reason: ``stop`` after a stop token or a stop string, ``length`` at the length limit.
        alternatives: For each token, the likeliest tokens of its step with their log-probs, as many as the request asks
            for.
        episode: What was said, where an environment took part.
    """

    input_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: Literal["stop", "length"]
    alternatives: Sequence[Sequence[tuple[int, float]]] = ()
    episode: Episode | None = None

    @property
    def truncated(self) -> bool:
        """Whether the length limit cut the completion."""
        return self.finish_reason == "length"


def as_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message] | str],
    found: Sequence[Sequence[Completion]],
) -> list[list[Completion]]:
    """Removes the chat template's text from completions, so that their text is an answer's content.

    Some chat templates put a space between the generation prompt and the answer. The model generates this space, but it
    belongs to the template. Completions of plain texts do not change.

    Args:
        tokenizer: The model's tokenizer.
        prompts: Messages or plain texts.
        found: Completions of each prompt.
    """
    chats = not all(isinstance(prompt, str) for prompt in prompts)
    lead = answer_lead(tokenizer) if chats and tokenizer.chat_template else ""
    return [
        [
            c if isinstance(prompt, str) or c.episode is not None else c._replace(text=c.text.removeprefix(lead))
            for c in completions
        ]
        for prompt, completions in zip(prompts, found, strict=True)
    ]


class RolloutEngine(Protocol):
    """Generates completions. It changes neither the policy nor the global random state."""

    def generate(
        self,
        policy: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        requests: Sequence[Request],
        sampling: Sampling,
        stop_token_ids: Sequence[int],
    ) -> list[list[Completion]]:
        """Completes prompts.

        Args:
            policy: A backbone whose model can generate. Its active adapters apply.
            tokenizer: The model's tokenizer.
            requests: Any number of prompts with their keys.
            sampling: Sampling settings.
            stop_token_ids: Tokens that end a completion.

        Returns:
            For each request, one completion per key, in order.

        Raises:
            ValueError: A prompt is empty, has a token that the model does not know, or exceeds the model's context.
        """
        ...


@runtime_checkable
class RemoteEngine(RolloutEngine, Protocol):
    """An engine with weights of its own, elsewhere: it learns of new ones only when they are handed over.

    Its log-probs are near those of the policy, not the same.
    """

    def check(self, sampling: Sampling) -> None:
        """Refuses, before a run, settings that the engine can't follow.

        Raises:
            ValueError: It is one; the message names it.
        """
        ...

    def hand_over(
        self,
        policy: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        state_dict: Mapping[str, Tensor] | None = None,
        alone: bool = False,
    ) -> None:
        """Gives the engine the policy's weights of now, which it uses until the next time. All ranks call.

        Args:
            policy: The policy. Its active adapter applies.
            tokenizer: The model's tokenizer.
            state_dict: Whole weights by the names of ``policy.model``, if its tensors are shards; the first rank's
                counts.
            alone: Only this process calls.
        """
        ...
