"""Asks for answers to instructions, and reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_rlhf.collection.prompts import ask_for_answer
from lightning_rlhf.data.formats import Message
from lightning_rlhf.endpoint import ChatRequest, Reply


@dataclass(frozen=True)
class Writing:
    """How texts are sampled.

    Args:
        temperature: A larger value gives more diverse texts; 0 always takes the likeliest token.
        top_p: Sample from the smallest set of likeliest tokens whose probabilities add up to this; 1: from all.
        max_tokens: Most tokens per reply. A reply that reaches it is cut, and what is cut is not used.

    Raises:
        ValueError: A setting is out of range; the message says which.
    """

    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        for name, right, rule in (
            ("temperature", 0 <= self.temperature <= 2, "between 0 and 2"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
        ):
            if not right:
                raise ValueError(f"{name} must be {rule}; got {getattr(self, name)}.")

    def request(
        self,
        messages: list[Message],
        seed: int,
        sample: int = 0,
        stop: tuple[str, ...] = (),
        extra: dict[str, Any] | None = None,
    ) -> ChatRequest:
        """A request with these settings."""
        return ChatRequest(
            messages,
            sample=sample,
            temperature=self.temperature,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            seed=seed,
            stop=stop or None,
            extra=extra or {},
        )


def answer_request(writing: Writing, lang: str, instruction: str, seed: int) -> ChatRequest:
    """The request for the answer to an instruction."""
    return writing.request(ask_for_answer(lang, instruction), seed)


def read_answer(reply: Reply) -> tuple[str, str | None]:
    """The answer in a reply, and what is wrong with it.

    Returns:
        The text, and the kind of problem or None: ``empty``, ``cut``, or the kind of a request that got no reply.
    """
    if reply.text is None:
        return "", reply.kind or "no reply"
    text = reply.text.strip()
    if not text:
        return "", "empty"
    return text, "cut" if reply.finish_reason == "length" else None
