"""What every rollout engine takes and gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.checks import check_arguments
from lightning_rlhf.data.formats import Message
from lightning_rlhf.data.templates import answer_lead
from lightning_rlhf.models.backbone import Backbone


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn.

    Args:
        max_new_tokens: Length limit of a completion, its stop token included.
        min_new_tokens: Stop tokens are impossible, and stop strings do not count, before that many.
        temperature: 0 is greedy.
        top_k: Draw from so many of the likeliest tokens; 0: off.
        top_p: Draw from the fewest tokens whose probabilities reach this sum, after ``top_k``; 1: off.
        repetition_penalty: Of tokens that the prompt or the completion has already, as transformers defines it; 1: off.
        stop_strings: Texts that end a completion, and are not part of its text. They may hold special tokens, as
            written: ``<|im_end|>``.

    Raises:
        ValueError: A setting is out of range; the message says which.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
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
            ("repetition_penalty", positive, "above 0 (1 is off)"),
            ("stop_strings", all(self.stop_strings), "texts of at least one character"),
        ):
            if not right:
                raise ValueError(f"sampling.{name} must be {rule}; got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Request:
    """A prompt, and a key for each completion wanted.

    Args:
        prompt: Token ids, at least one.
        keys: One completion a key, which is a function of (weights, prompt, key, sampling) alone.
    """

    prompt: Sequence[int]
    keys: Sequence[int]


class Completion(NamedTuple):
    """What was sampled.

    Attributes:
        input_ids: The sampled tokens, stop token included.
        logprobs: Of each of them, log-softmax of ``logits / temperature`` (temperature 1 when greedy), in fp32, before
            top-k, top-p, penalty and minimum length.
        text: What the tokens add to the prompt's text: without special tokens and the stop token, cut before a stop
            string.
        finish_reason: ``stop`` for a stop token or string, ``length`` at the limit.
    """

    input_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: Literal["stop", "length"]

    @property
    def truncated(self) -> bool:
        """Whether the completion was cut at its length limit."""
        return self.finish_reason == "length"


def as_answers(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[Message] | str],
    found: Sequence[Sequence[Completion]],
) -> list[list[Completion]]:
    """Completions whose text is an answer's content.

    Behind messages the model itself writes the blank that some chat templates have between the generation prompt and
    the answer; it is the template's, and is taken off. Behind plain texts nothing changes.

    Args:
        tokenizer: The model's.
        prompts: Messages or plain texts.
        found: Completions of each.
    """
    chats = not all(isinstance(prompt, str) for prompt in prompts)
    lead = answer_lead(tokenizer) if chats and tokenizer.chat_template else ""
    return [
        [c if isinstance(prompt, str) else c._replace(text=c.text.removeprefix(lead)) for c in completions]
        for prompt, completions in zip(prompts, found, strict=True)
    ]


class RolloutEngine(Protocol):
    """Prompts and a policy in, completions out; the policy and the global random state stay as they were."""

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
            policy: A backbone whose model can generate; active adapters apply.
            tokenizer: The model's.
            requests: Prompts, in any number.
            sampling: How to draw.
            stop_token_ids: Tokens that end a completion.

        Returns:
            For each request, a completion for each of its keys, in order.

        Raises:
            ValueError: A request can't be served: no prompt, a token that the model has not, or longer than its
                context.
        """
        ...
