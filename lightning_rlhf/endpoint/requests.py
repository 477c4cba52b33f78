"""What is asked, and what comes back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_rlhf.utils.text import SURROGATE


@dataclass(frozen=True)
class ChatRequest:
    """A conversation to continue. None leaves a setting to the server.

    Attributes:
        messages: ``{"role": ..., "content": ...}``, ending in the turn to reply to.
        sample: Number of the sample. Requests that differ in it alone are asked apart.
        temperature: A larger value gives more varied replies; 0: greedy.
        top_p: Share of the probability that is sampled from.
        max_tokens: Maximum number of tokens of the reply. A budget needs it.
        seed: The server's seed, where it has one.
        stop: Texts that end the reply.
        extra: Further fields of the request's body, such as ``max_completion_tokens``.

    Raises:
        ValueError: There are no messages, a text has half a surrogate pair, which UTF-8 cannot hold, or ``extra`` asks
            for a stream or for several replies.
    """

    messages: Sequence[Mapping[str, Any]]
    sample: int = 0
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    stop: Sequence[str] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.messages:
            raise ValueError("ChatRequest: there are no messages.")
        if odd := sorted({"messages", "model", "n", "stream"} & set(self.extra)):
            raise ValueError(f"ChatRequest: extra can't have {odd[0]!r}. A request has one whole reply; see sample.")
        if found := SURROGATE.search(json.dumps(self.body(""), ensure_ascii=False)):
            raise ValueError(
                f"ChatRequest: a text has half a surrogate pair (U+{ord(found[0]):04X}), which UTF-8 cannot hold. "
                "Replace it: lightning_rlhf.utils.text.replace_surrogates(text)."
            )

    def body(self, model: str) -> dict[str, Any]:
        """Returns the body to send to ``/chat/completions``.

        Args:
            model: Name of the model on the server.
        """
        settings = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "stop": None if self.stop is None else list(self.stop),
        }
        body: dict[str, Any] = {"model": model, "messages": [dict(message) for message in self.messages]}
        return {**body, **{name: value for name, value in settings.items() if value is not None}, **self.extra}

    def key(self, model: str) -> str:
        """Returns the request's key in the ledger: SHA-256 of the whole body and the sample's number.

        Args:
            model: Name of the model on the server.
        """
        return hashlib.sha256(canonical({"body": self.body(model), "sample": self.sample}).encode()).hexdigest()


@dataclass(frozen=True)
class Usage:
    """Tokens of one reply, as the server counted them.

    Attributes:
        prompt: Tokens of the prompt, with the cached ones.
        cached: Those of the prompt that the server had cached.
        completion: Tokens of the reply.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0


@dataclass(frozen=True)
class Reply:
    """What came of a request.

    Attributes:
        key: The request's key in the ledger.
        text: The reply's text. None if the request got none that can be used.
        finish_reason: Why the reply ended: ``stop``, or ``length`` at the token limit.
        usage: Tokens as the server counted them. None if it did not say, or nothing credible.
        problem: What went wrong, for people. None if there is a text.
        kind: The kind of that problem, by which it is counted, such as ``http_400`` or ``timeout``.
        notes: Oddities of a reply that has a text, counted likewise: ``length``, ``no_usage``, ``usage_zero``,
            ``usage_high``, ``other_model``, ``surrogates``.
    """

    key: str
    text: str | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    problem: str | None = None
    kind: str | None = None
    notes: tuple[str, ...] = ()


def canonical(value: Any) -> str:
    """Returns JSON that is the same for equal values, whatever the order of their keys.

    Args:
        value: Anything that JSON can hold.

    Raises:
        ValueError: A number is not finite.
        TypeError: JSON cannot hold a value.
    """
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)
