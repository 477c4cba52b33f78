"""The models that a server serves, by name."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lightning_rlhf.data.formats import Message
from lightning_rlhf.data.tokens import TokenizeError, encode_prompt
from lightning_rlhf.models import Policy
from lightning_rlhf.rollout import room
from lightning_rlhf.serving.errors import ApiError
from lightning_rlhf.serving.lengths import far_over
from lightning_rlhf.serving.worker import Worker


@dataclass
class Served:
    """A model that requests name.

    Attributes:
        name: Its name in requests.
        policy: The model.
        tokenizer: Its tokenizer.
        stops: Tokens that end an answer.
        worker: What generates its answers.
        engine: The class that does so, for people.
        piece: Tokens of a prompt that run in one step. None: all.
        adapter: peft's name of the model's adapter, if several models share a backbone.
        lead: The blank that the chat template writes before an answer, and that is not part of it.
        created: When it was loaded, in seconds since 1970.
    """

    name: str
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    stops: Sequence[int]
    worker: Worker
    engine: str
    lead: str
    piece: int | None = None
    adapter: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def context(self) -> int | None:
        """Number of tokens that the model reads, if it says so."""
        most = 2**40
        return found if (found := room(self.policy, (), most)) < most else None

    def encode(self, prompt: Sequence[Message] | str) -> list[int]:
        """Tokenizes a prompt as inference does.

        Raises:
            ApiError: The chat template refuses the messages, there are no tokens, there is no chat template, or the
                prompt is far longer than the context.
        """
        param = "prompt" if isinstance(prompt, str) else "messages"
        texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
        context = self.context
        if context is not None and far_over(self.tokenizer, texts, context):
            raise ApiError(
                400,
                f"This model's context is {context} tokens, but the request has more than {2 * context} "
                "tokens of the prompt. Shorten the prompt.",
                param,
                "context_length_exceeded",
            )
        try:
            return encode_prompt(self.tokenizer, prompt, stop_ids=self.stops)
        except TokenizeError as error:
            raise ApiError(400, f"{param}: {error}.", param) from error
        except ValueError as error:
            raise ApiError(400, f"The model {self.name} cannot chat: {error}", "model") from error
